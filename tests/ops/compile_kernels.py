"""Compile every kernel for Hopper, which takes no GPU: a process of its own, without interpreter.

``python compile_kernels.py DTYPE`` takes queries of a dtype, and prints how many kernels there are.
With bfloat16, what has no queries is compiled too: the selection, and the kernels of Transformers'
caches. Queries of float8 are those of plans, whose output is bfloat16. The interpreter runs kernels
as Python and lets pass what the compiler refuses.
"""

import dataclasses
import itertools
import sys
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deltadecode import ops
from deltadecode.config import DeltaConfig
from deltadecode.engines.transformers import offload_kernel, packing_kernel
from deltadecode.ops import dispatch
from deltadecode.ops.triton import attention, finish, index, plans, selection, wide

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.bool: "*i1",
    torch.float8_e4m3fn: "*fp8e4nv",
}


class Compiled:
    """Takes the place of a kernel: compiles what a launch asks for."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.arg_names = kernel.arg_names
        self.seen = set()

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, num_warps=4, num_stages=3, **constants):
        names = self.kernel.arg_names
        signature = {}
        for name, value in zip(names, args, strict=False):
            if isinstance(value, torch.Tensor):
                signature[name] = TYPES[value.dtype]
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
        signature |= dict.fromkeys(names[len(args) :], "constexpr")
        key = str((sorted(signature.items()), constants))
        if key in self.seen:
            return
        self.seen.add(key)
        values = {(names.index(name),): value for name, value in constants.items()}
        source = ASTSource(self.kernel, signature, values)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def plan_float8():
    """Plans of float8 queries and caches, with drafts and without: a Δ-layer and a sparse one."""
    kv = torch.zeros(40, 16, 2, 128, dtype=torch.float8_e4m3fn)
    table, lens = torch.zeros(2, 20, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    for queries in ((2,), (2, 4)):
        q, out = (
            torch.zeros(*queries, 12, 128, dtype=dtype) for dtype in (kv.dtype, torch.bfloat16)
        )
        ids = [torch.zeros(*queries, width, dtype=torch.int32) for width in (8, 1024)]
        ones = torch.ones(queries, dtype=torch.int32)
        layers = (None, None, DeltaConfig()), *((each, ones, None) for each in ids)
        for ids, counts, cfg in layers:
            inputs = ops.DecodeInputs(
                out, kv, kv, table, lens, 0.1, 16, ids, counts, return_page_scores=ids is None
            )
            plan = ops.plan_decode(inputs, cfg, 0, q.dtype)
            plan.run(q, kv, kv, table, lens, None, out, ops.Scratch(), ids, counts)


def index_of_tokens(dtype):
    """What CLSA does in a step: scores of an index, its tokens, attention to those."""
    q, kv = torch.zeros(2, 20, 128, dtype=dtype), torch.zeros(2, 40000, 4, 128, dtype=dtype)
    table, lens = torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    scores = ops.index_scores(q[:, 0], kv[:, :, 0], table, lens, backend="triton")
    cfg = DeltaConfig(page_size=1, budget_pages=2048, recent_pages=0, sink_pages=0)
    ids, counts = ops.select_pages(scores, lens, cfg, backend="triton")
    ops.select_pages(torch.zeros(2, 300_000), lens, cfg, backend="triton")
    many = dataclasses.replace(cfg, budget_pages=9000)  # by digits
    ops.select_pages(scores, lens, many, backend="triton")
    ops.decode_attention(
        q, kv, kv, table, lens, scale=0.1, page_size=1, page_ids=ids, page_counts=counts,
        backend="triton",
    )  # fmt: skip


def int8_with_scales(dtype):
    """A Δ-layer and a sparse one whose caches have a scale for each token and head."""
    q, kv = torch.zeros(2, 12, 128, dtype=dtype), torch.zeros(40, 16, 2, 128, dtype=torch.int8)
    scales = torch.zeros(40, 16, 2, dtype=torch.bfloat16)
    table, lens = torch.zeros(2, 20, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    options = {
        "scale": 0.1, "page_size": 16, "k_scales": scales, "v_scales": scales, "backend": "triton"
    }  # fmt: skip
    ops.decode_attention(q, kv, kv, table, lens, **options, return_page_scores=True)
    ids = torch.zeros(2, 8, dtype=torch.int32)
    ops.decode_attention(q, kv, kv, table, lens, **options, page_ids=ids, page_counts=lens)


def caches_of_transformers():
    """A new token in eight bits; pages from the host and a token to it, in both types."""
    rows, width, page = 2, 8, 16
    for key in (
        torch.zeros(rows, 8, 1, 128, dtype=torch.bfloat16),
        packing_kernel.pack_token(*torch.zeros(2, rows, 8, 1, 128), 1040, 1024)[0],
    ):
        _, heads, _, dim = key.shape
        host = torch.zeros(100, 2, rows, heads, dim, dtype=key.dtype)
        pool = torch.zeros(20, page, 2, heads, dim, dtype=key.dtype)
        numbers = torch.zeros(rows, dtype=torch.int64)
        request = SimpleNamespace(
            missing=torch.zeros(rows, width, dtype=torch.bool), row_numbers=numbers,
            tokens=torch.zeros(rows, width, page, dtype=torch.int64),
            cells=torch.zeros(rows, width, dtype=torch.int64), newest=numbers, place=3,
        )  # fmt: skip
        offload_kernel.gather_pages(host, pool, request)
        offload_kernel.append_token(host, 50, pool, request, key, key)


def main(dtype):
    attention.attend = Compiled(attention.attend)
    finish.finish = Compiled(finish.finish)
    selection.select = Compiled(selection.select)
    index.score = Compiled(index.score)
    packing_kernel._pack = Compiled(packing_kernel._pack)
    for name in ("_gather", "_append"):
        setattr(offload_kernel, name, Compiled(getattr(offload_kernel, name)))
    for name in ("count", "tally", "place"):
        setattr(wide, name, Compiled(getattr(wide, name)))
    dispatch.triton_backend().unsupported = lambda *tensors: None
    device = torch.device("cuda")
    operand = plans._operand
    plans._operand = lambda kind: operand(kind._replace(device=device))
    if dtype == torch.float8_e4m3fn:
        plan_float8()
    caches = () if dtype == torch.float8_e4m3fn else (None, torch.float8_e4m3fn)
    for cache, sinks in itertools.product(caches, (False, True)):
        q = torch.zeros(2, 12, 128, dtype=dtype)
        kv = torch.zeros(40, 16, 2, 128, dtype=cache or dtype)
        table, lens = torch.zeros(2, 20, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
        counts = torch.ones(2, dtype=torch.int32)
        options = {"scale": 0.1, "page_size": 16, "backend": "triton"}
        if sinks:
            options |= {"sinks": torch.zeros(12), "softcap": 3.0}
        ops.decode_attention(q, kv, kv, table, lens, **options)
        ops.decode_attention(q, kv, kv, table, lens, **options, return_page_scores=True)
        for width in (8, 1024):
            ids = torch.zeros(2, width, dtype=torch.int32)
            sparse = {**options, "page_ids": ids, "page_counts": counts}
            ops.decode_attention(q, kv, kv, table, lens, **sparse)
        drafts = q[:, None].expand(-1, 4, -1, -1)
        ops.decode_attention(drafts, kv, kv, table, lens, **options, return_page_scores=True)
        if cache is None and not sinks:
            scored = {"return_page_scores": True, "score_last": True}
            ops.decode_attention(drafts, kv, kv, table, lens, **options, **scored)
        ids = torch.zeros(2, 4, 8, dtype=torch.int32)
        sparse = {**options, "page_ids": ids, "page_counts": counts[:, None].repeat(1, 4)}
        ops.decode_attention(drafts, kv, kv, table, lens, **sparse)
    for pages in (100, 9000) if dtype == torch.bfloat16 else ():
        for share in (0.0, 0.1):
            cfg = DeltaConfig(budget_share=share)
            ops.select_pages(torch.zeros(2, pages), lens, cfg, backend="triton")
    if dtype == torch.bfloat16:
        ops.select_pages(torch.zeros(2, 4, 100), lens, DeltaConfig(), backend="triton")
        index_of_tokens(dtype)
        int8_with_scales(dtype)
        caches_of_transformers()
    kernels = (
        attention.attend, finish.finish, selection.select, index.score, wide.count, wide.tally,
        wide.place, packing_kernel._pack, offload_kernel._gather, offload_kernel._append,
    )  # fmt: skip
    print(sum(len(kernel.seen) for kernel in kernels))


if __name__ == "__main__":
    main(getattr(torch, sys.argv[1]))
