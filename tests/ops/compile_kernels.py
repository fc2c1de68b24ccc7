"""Compile every kernel for Hopper, which takes no GPU: a process of its own, without interpreter.

``python compile_kernels.py DTYPE`` takes queries of a dtype, and prints how many kernels there are.
With bfloat16, the selection, which has no queries, is compiled too. The interpreter runs kernels as
Python and lets pass what the compiler refuses.
"""

import itertools
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deltadecode import ops
from deltadecode.config import DeltaConfig
from deltadecode.ops import dispatch
from deltadecode.ops.triton import attention, plans, selection

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
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


def main(dtype):
    attention.attend = Compiled(attention.attend)
    attention.finish = Compiled(attention.finish)
    selection.select = Compiled(selection.select)
    dispatch.triton_backend().unsupported = lambda *tensors: None
    plans._operand = lambda kind: getattr(triton.language, str(kind.q_dtype).removeprefix("torch."))
    for cache, sinks in itertools.product((None, torch.float8_e4m3fn), (False, True)):
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
        ids = torch.zeros(2, 4, 8, dtype=torch.int32)
        sparse = {**options, "page_ids": ids, "page_counts": counts[:, None].repeat(1, 4)}
        ops.decode_attention(drafts, kv, kv, table, lens, **sparse)
    for pages in (100, 9000) if dtype == torch.bfloat16 else ():
        for share in (0.0, 0.1):
            cfg = DeltaConfig(budget_share=share)
            ops.select_pages(torch.zeros(2, pages), lens, cfg, backend="triton")
    if dtype == torch.bfloat16:
        ops.select_pages(torch.zeros(2, 4, 100), lens, DeltaConfig(), backend="triton")
    print(sum(len(k.seen) for k in (attention.attend, attention.finish, selection.select)))


if __name__ == "__main__":
    main(getattr(torch, sys.argv[1]))
