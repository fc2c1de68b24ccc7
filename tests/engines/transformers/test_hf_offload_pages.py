"""Lookup, replacement and fetching of pages, against a plain least-recently-used cache."""

import weakref

import pytest
import torch
from hf_tiny import make_model, make_prompt, small_config

import deltadecode as dd
from deltadecode.engines.transformers import offload_host
from deltadecode.engines.transformers.offload_host import Transfer, free_host_bytes
from deltadecode.engines.transformers.offload_pages import PageDirectory
from deltadecode.engines.transformers.rows import RowGroup

ROWS, PAGE, BUDGET = 3, 4, 6
CFG = dd.DeltaConfig(
    page_size=PAGE, budget_pages=BUDGET, recent_pages=1, dense_layers=(), delta_layers=(0,)
)
CPU = torch.device("cpu")


def selection(pages: int, seed: int) -> torch.Tensor:
    """Ascending page ids of each row, the last page among them."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randperm(pages - 1, generator=generator)[: BUDGET - 1] for _ in range(ROWS)]
    return torch.stack([torch.cat([row, torch.tensor([pages - 1])]).sort().values for row in ids])


def steps(directory: PageDirectory, lengths: range, members: list[int], fewer: bool = False):
    """With ``fewer`` rows select 4 to 6 pages, and the columns behind them name other pages."""
    for length in lengths:
        pages = -(-length // PAGE)
        ids = selection(pages, length)[members].int()
        group = RowGroup(members, ROWS, 2, length, CPU)
        directory.begin(CFG, ROWS, length + 2, CPU)
        counts = torch.full((len(members),), BUDGET, dtype=torch.int32)
        for place, row in enumerate(members if fewer else []):
            left_out = (length + row) % 3
            counts[place], ids[place] = BUDGET - left_out, ids[place].roll(-left_out)
        yield length, (ids, counts) if fewer else ids, directory.request(CFG, group, ids, counts)


@pytest.mark.parametrize("members", [[0, 1, 2], [2]])
def test_the_directory_is_a_least_recently_used_cache(members: list[int]) -> None:
    directory = PageDirectory()
    capacity = 2 * BUDGET
    # Of each row: page -> when it was used last, and its cell. Free cells are the oldest.
    plain = [{-1 - n: (0, n) for n in range(capacity)} for _ in members]
    fetched = 0
    each = steps(directory, range(60, 110), members, fewer=True)
    for clock, (length, (ids, counts), request) in enumerate(each, 1):
        assert directory.capacity == capacity
        for row, held in enumerate(plain):
            wanted = ids[row, : counts[row]].tolist()
            unused = BUDGET - len(wanted)
            first = members[row] * (capacity + 1)
            absent = [page for page in wanted if page not in held]
            held.update({page: (clock, held[page][1]) for page in wanted if page in held})
            for page in absent:
                oldest = min(set(held) - set(wanted), key=held.__getitem__)
                held[page] = clock, held.pop(oldest)[1]
            cells = {page: first + held[page][1] for page in wanted}
            assert request.cells[row].tolist() == [*cells.values(), *[first + capacity] * unused]
            # A page that begins with the new token has nothing to fetch.
            missing = [page in absent and page * PAGE < length - 1 for page in wanted]
            assert request.missing[row].tolist() == missing + [False] * unused
            assert request.table[row].nonzero()[:, 0].tolist() == [
                page for page, cell in cells.items() if cell
            ]
            assert all(request.table[row, page] == cell for page, cell in cells.items())
            tokens = torch.tensor(wanted)[:, None] * PAGE + torch.arange(PAGE)
            tokens = (tokens + 2).where(tokens < length - 1, -1)
            assert torch.equal(request.tokens[row, : len(wanted)], tokens)
            assert (request.tokens[row, len(wanted) :] == -1).all()
            assert request.newest[row] == cells[(length - 1) // PAGE]
        fetched += int(request.missing.sum())
        assert request.place == (length - 1) % PAGE
    assert 0 < fetched < 50 * len(members) * BUDGET


def test_pages_are_forgotten_when_the_tokens_have_changed() -> None:
    directory = PageDirectory()
    everything = BUDGET * ROWS
    list(steps(directory, range(60, 70), [0, 1, 2]))
    *_, (_, _, again) = steps(directory, range(72, 73), [0, 1, 2])
    assert int(again.missing.sum()) == everything
    directory.forget()
    *_, (_, _, again) = steps(directory, range(73, 74), [0, 1, 2])
    # The new token is the first of its page.
    assert int(again.missing.sum()) == everything - ROWS


def test_the_kernel_copies_what_the_plain_transfer_copies() -> None:
    kernel = pytest.importorskip("deltadecode.engines.transformers.offload_kernel")
    directory = PageDirectory()
    for dtype, dim in ((torch.float32, 12), (torch.bfloat16, 6), (torch.float64, 12)):
        directory.forget()
        host = torch.randn(120, 2, ROWS, 2, dim).to(dtype)
        plain = torch.zeros(ROWS * (2 * BUDGET + 1), PAGE, 2, 2, dim, dtype=dtype)
        ours = plain.clone()
        for length, ids, request in steps(directory, range(60, 65), [0, 1, 2]):
            Transfer().fetch(host, plain, request)
            kernel.gather_pages(host, ours, request)
            # Tokens that are not on the host yet may be anything.
            held = ids.long()[:, :, None] * PAGE + torch.arange(PAGE) < length - 1
            held &= request.missing[:, :, None]
            cells = request.cells[:, :, None].expand_as(held)[held]
            places = torch.arange(PAGE).expand_as(held)[held]
            assert torch.equal(ours[cells, places], plain[cells, places])
        assert ours.any()


# Sizes of a head that fill the kernel's blocks, leave some of one free, and need more than one.
@pytest.mark.parametrize(
    ("dtype", "dim"),
    [(torch.float32, 12), (torch.bfloat16, 64), (torch.float64, 600), (torch.int8, 48)],
)
def test_the_kernel_appends_what_the_plain_transfer_appends(dtype: torch.dtype, dim: int) -> None:
    kernel = pytest.importorskip("deltadecode.engines.transformers.offload_kernel")
    heads = 1 if dtype == torch.int8 else 2
    host = torch.randint(-100, 100, (120, 2, ROWS, heads, dim)).to(dtype)
    pool = torch.zeros(ROWS * (2 * BUDGET + 1), PAGE, 2, heads, dim, dtype=dtype)
    states = torch.randint(-100, 100, (2, ROWS, heads, 1, dim)).to(dtype)
    # One after the other, one in a row, heads behind numbers, and one for all rows.
    keys, values = states
    odd = keys.transpose(1, 3).contiguous().transpose(1, 3), values[1:2].expand(ROWS, -1, -1, -1)
    apart = torch.cat([states, states], dim=4)[..., ::2].unbind()
    assert odd[0].stride(3) == heads and apart[0].stride(3) == 2
    directory = PageDirectory()
    for key, value in ((keys, values), odd, apart):
        for members in ([0, 1, 2], [2, 0], [1]):
            plain, ours = ((host.clone(), pool.clone()) for _ in range(2))
            for length, _, request in steps(directory, range(60, 63), members):
                token = length + 1
                # Of the host the plain one writes all rows.
                Transfer().append(plain[0], token, plain[1], [request], key, value)
                kernel.append_token(ours[0], token, ours[1], request, key, value)
                others = [row for row in range(ROWS) if row not in members]
                assert torch.equal(ours[0][token][:, others], host[token][:, others])
                ours[0][token][:, others] = plain[0][token][:, others]
            assert torch.equal(ours[0], plain[0])
            assert torch.equal(ours[1], plain[1])
            assert ours[1].any()


def test_stats() -> None:
    cfg = small_config()
    model = make_model("llama", "sdpa")
    dd.enable(model, cfg)
    stats = dd.stats(model).offload
    assert (stats.hit_rate, stats.host_bytes, stats.fetched_bytes_per_step) == (1.0, 0, 0.0)
    cache = dd.DeltaOffloadedCache(model.config, cfg, transfer=Transfer())
    copied = []

    class Counting(Transfer):
        def fetch(self, host, pool, request, *ticket):
            copied.append(int(request.missing.sum()))
            return super().fetch(host, pool, request, *ticket)

    cache.shared.transfer = Counting()
    model.generate(make_prompt(41, rows=2), past_key_values=cache, max_new_tokens=31)
    assert stats.steps == 30
    assert stats.read_pages == 30 * 2 * 5 * 3
    assert stats.fetched_pages == sum(copied)
    of_page = 4 * 2 * 2 * 8 * 4
    assert stats.fetched_bytes == sum(copied) * of_page
    assert stats.hit_rate == 1 - sum(copied) / stats.read_pages
    assert 0.3 < stats.hit_rate < 1
    # Three sparse layers: room for 1,024 more tokens on the host, pools of twice the budget.
    assert stats.host_bytes == 3 * (41 + 1024) * 2 * of_page // 4
    pools = 3 * 2 * (2 * 5 + 1) * of_page
    held = sum(cache.layers[layer].keys.untyped_storage().nbytes() * 2 for layer in (0, 1, 3))
    assert stats.device_bytes == pools + held
    assert "hit_rate=0." in repr(stats)
    dd.stats(model).reset()
    assert (stats.steps, stats.fetched_pages, stats.hit_rate) == (0, 0, 1.0)
    del cache
    assert stats.host_bytes == 0


def test_free_host_bytes() -> None:
    free = free_host_bytes()
    assert free is None or free > 0


@pytest.mark.parametrize(
    ("limit", "usage", "files", "unlimited"),
    [
        ("memory.max", "memory.current", "file", "max"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", str(2**63 - 4096)),
    ],
)
def test_free_host_bytes_of_a_control_group(
    tmp_path, monkeypatch, limit: str, usage: str, files: str, unlimited: str
) -> None:
    """Version 2, and version 1, which has a folder of its own for memory."""
    folder = tmp_path / "memory" if "bytes" in limit else tmp_path
    groups = [
        (tmp_path / where.relative_to(offload_host._CGROUP), *names)
        for where, *names in offload_host._GROUPS
    ]
    monkeypatch.setattr(offload_host, "_GROUPS", groups)
    whole = free_host_bytes()
    folder.mkdir(exist_ok=True)
    (folder / limit).write_text("1000\n")
    (folder / usage).write_text("900\n")
    assert free_host_bytes() == 100
    (folder / "memory.stat").write_text(f"anon 7\n{files} 50\n")
    assert free_host_bytes() == 150
    (folder / usage).write_text("1100\n")
    assert free_host_bytes() == 0
    (folder / limit).write_text(f"{unlimited}\n")
    there = free_host_bytes()
    assert there is None if whole is None else there > 1000


def test_a_pool_is_freed_by_a_crop_and_is_in_no_pickle() -> None:
    cfg = small_config()
    model = make_model("llama", "sdpa")
    dd.enable(model, cfg)
    cache = dd.DeltaOffloadedCache(model.config, cfg, transfer=Transfer())
    model.generate(make_prompt(41), past_key_values=cache, max_new_tokens=3)
    layer, freed = cache.layers[2], []
    weakref.finalize(layer._pool.untyped_storage(), freed.append, True)
    kept = layer.__getstate__()
    assert (kept["_pool"], kept["_halves"]) == (None, ()) and not freed
    cache.crop(-1)
    assert freed
