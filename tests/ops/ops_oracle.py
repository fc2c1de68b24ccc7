"""The rules of docs/semantics.md as slow Python loops in float64, and cases to try them on.

Written from the rules alone: nothing of ``deltadecode`` is used here. And the backends to test.
"""

import importlib.util
import math
from dataclasses import dataclass, field
from fractions import Fraction

import pytest
import torch

# Triton has no release for some systems; the development extra brings it wherever it has one.
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="there is no Triton for this system")
BACKENDS = ["reference", "torch", pytest.param("triton", marks=needs_triton)]
# Of make_case.
LAYOUTS = ["paged", "interleaved", "rows", "heads", "strided"]


def select(scores, n, page_size, budget, recent, sinks, share=0.0):
    """Pages that R3 and R4 select for one sequence of n tokens."""
    pages = (n + page_size - 1) // page_size
    budget = max(budget, math.ceil(Fraction(round(share * 10_000), 10_000) * pages))
    if pages <= budget:
        return list(range(pages))
    selected = set(range(sinks)) | set(range(pages - recent, pages))
    while len(selected) < budget:
        best = None
        for page in range(pages):
            if page in selected:
                continue
            score = scores[page]
            if (
                best is None
                or (math.isnan(scores[best]) and not math.isnan(score))
                or score > scores[best]
            ):
                best = page
        selected.add(best)
    return sorted(selected)


def weights(q, keys, scale, softcap, sink):
    """Softmax weights of one query head over the given keys (R2, R7)."""
    logits = []
    for key in keys:
        logit = scale * sum(a * b for a, b in zip(q, key, strict=True))
        if softcap is not None:
            logit = softcap * math.tanh(logit / softcap)
        logits.append(logit)
    top = max(logits if sink is None else [*logits, sink])
    exps = [math.exp(logit - top) for logit in logits]
    total = sum(exps) + (0.0 if sink is None else math.exp(sink - top))
    return [e / total for e in exps]


@dataclass
class Case:
    """One batch: logical keys and values per row, and the same laid out as a paged cache."""

    q: torch.Tensor  # [B, Hq, D]
    keys: list  # per row [n, Hkv, D]
    values: list
    page_size: int
    scale: float
    sinks: torch.Tensor | None
    softcap: float | None
    k_cache: torch.Tensor = field(repr=False)
    v_cache: torch.Tensor = field(repr=False)
    block_table: torch.Tensor

    @property
    def seq_lens(self):
        return torch.tensor([k.shape[0] for k in self.keys], dtype=torch.int32)

    @property
    def pages(self):
        return self.block_table.shape[1] * self.k_cache.shape[1] // self.page_size

    @property
    def arguments(self):
        return (self.q, self.k_cache, self.v_cache, self.block_table, self.seq_lens)

    @property
    def options(self):
        return {
            "scale": self.scale,
            "page_size": self.page_size,
            "sinks": self.sinks,
            "softcap": self.softcap,
        }

    def row(self, row):
        """The case of one row alone, in a cache of its own shape."""
        return Case(
            self.q[row : row + 1], [self.keys[row]], [self.values[row]], self.page_size,
            self.scale, self.sinks, self.softcap, self.k_cache, self.v_cache,
            self.block_table[row : row + 1],
        )  # fmt: skip

    def slot(self, row, token):
        size = self.k_cache.shape[1]
        return int(self.block_table[row, token // size]), token % size

    def attend(self, pages=None):
        """Expected output [B, Hq, D] and page scores [B, pages], float64.

        ``pages``: per row the list of pages to attend to; None for all.
        """
        out = torch.zeros(self.q.shape, dtype=torch.float64)
        scores = torch.zeros(self.q.shape[0], self.pages, dtype=torch.float64)
        heads, group = self.q.shape[1], self.q.shape[1] // self.k_cache.shape[2]
        for row, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            tokens = [
                t
                for t in range(keys.shape[0])
                if pages is None or t // self.page_size in pages[row]
            ]
            if not tokens:
                continue
            best = [0.0] * len(tokens)
            for head in range(heads):
                q = self.q[row, head].double().tolist()
                k = keys[tokens, head // group].double().tolist()
                v = values[tokens, head // group].double().tolist()
                sink = None if self.sinks is None else float(self.sinks[head])
                alpha = weights(q, k, self.scale, self.softcap, sink)
                for d in range(len(q)):
                    out[row, head, d] = sum(a * x[d] for a, x in zip(alpha, v, strict=True))
                best = [max(a, b) for a, b in zip(alpha, best, strict=True)]
            for t, s in zip(tokens, best, strict=True):
                scores[row, t // self.page_size] += s
        return out, scores


def make_case(
    seed,
    lengths,
    *,
    page_size=4,
    pages_per_block=1,
    kv_heads=2,
    group=2,
    dim=4,
    dtype=torch.float32,
    layout="paged",
    sinks=False,
    softcap=None,
    poison=float("nan"),
    contrast=2.0,
):
    """Draw a case; every slot that no token of a row owns holds ``poison``.

    ``layout``: "paged" shuffles the blocks of all rows among spare ones and fills unused table
    entries with junk; "interleaved" deals blocks out to the rows in turn; "rows" gives each row one
    block (pages_per_block is then what the longest row needs); "heads" is "rows" with the heads
    before the tokens in memory; "strided" is "paged" with gaps between all elements but the last
    dimension's.
    """
    rng = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    rows, longest = len(lengths), max([*lengths, 1])
    if layout in ("rows", "heads"):
        pages_per_block = -(-longest // page_size) + 1
    size = page_size * pages_per_block
    per_row = -(-longest // size)
    used = [-(-n // size) for n in lengths]
    if layout in ("rows", "heads"):
        blocks, table = rows, torch.arange(rows, dtype=torch.int32)[:, None]
    elif layout == "interleaved":
        blocks = rows * per_row
        table = torch.arange(blocks, dtype=torch.int32).view(per_row, rows).T.contiguous()
    else:
        blocks = sum(used) + 2
        junk = torch.tensor([-1, 10**6, -(2**31)], dtype=torch.int32)
        table = junk[torch.randint(0, 3, (rows, per_row + 1), generator=rng)]
        free = torch.randperm(blocks, generator=rng).int().tolist()
        for row in range(rows):
            for place in range(used[row]):
                table[row, place] = free.pop()
    k_cache, v_cache = (
        _empty_cache(layout, blocks, size, kv_heads, dim, dtype).fill_(poison) for _ in range(2)
    )

    q = (randn(rows, kv_heads * group, dim) * contrast).to(dtype)
    keys = [randn(n, kv_heads, dim).to(dtype) for n in lengths]
    values = [randn(n, kv_heads, dim).to(dtype) for n in lengths]
    case = Case(
        q, keys, values, page_size, 0.8 * dim**-0.5,  # as no default has it
        randn(kv_heads * group).float() if sinks else None, softcap, k_cache, v_cache, table,
    )  # fmt: skip
    for row, n in enumerate(lengths):
        for token in range(n):
            k_cache[case.slot(row, token)] = keys[row][token]
            v_cache[case.slot(row, token)] = values[row][token]
    return case


def _empty_cache(layout, blocks, size, kv_heads, dim, dtype):
    if layout == "heads":
        return torch.empty(blocks, kv_heads, size, dim, dtype=dtype).transpose(1, 2)
    if layout == "strided":
        return torch.empty(blocks, size + 1, kv_heads + 1, dim + 3, dtype=dtype)[
            :, 1:, :kv_heads, 2 : dim + 2
        ]
    return torch.empty(blocks, size, kv_heads, dim, dtype=dtype)


def poison_outside(case, pages, value):
    """Overwrite every token outside the given pages of each row, in the cache only."""
    for row, keys in enumerate(case.keys):
        for token in range(keys.shape[0]):
            if token // case.page_size not in pages[row]:
                case.k_cache[case.slot(row, token)] = value
                case.v_cache[case.slot(row, token)] = value


def pack(pages, width):
    """Page lists as page_ids [B, width] and page_counts [B]."""
    ids = torch.full((len(pages), width), -1, dtype=torch.int32)
    for row, chosen in enumerate(pages):
        ids[row, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    return ids, torch.tensor([len(chosen) for chosen in pages], dtype=torch.int32)


def close(got, expected, dtype):
    """Compare with the rounding that a dtype allows."""
    tolerance = {
        torch.float64: 1e-12,
        torch.float32: 2e-5,
        torch.float16: 4e-3,
        torch.bfloat16: 2e-2,
    }[dtype]
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
