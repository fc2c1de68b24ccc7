"""A small run of every kernel and of every branch in them, for compute-sanitizer."""

import torch
from gpu_cases import make_gpu_case

from deltadecode import ops
from deltadecode.config import DeltaConfig
from deltadecode.engines.transformers.offload_host import CudaTransfer
from deltadecode.engines.transformers.offload_kernel import append_token, gather_pages
from deltadecode.engines.transformers.offload_pages import PageDirectory
from deltadecode.engines.transformers.rows import RowGroup


def pages_and_a_token_of_an_offloaded_cache(device):
    """One row of two, whose runs are longer than a block of the kernels."""
    cfg = DeltaConfig(page_size=16, budget_pages=6, recent_pages=1)
    host = CudaTransfer().allocate((301, 2, 2, 20, 72), torch.bfloat16)
    host.fill_(1)
    group, directory = RowGroup([1], 2, 1, 300, device), PageDirectory()
    directory.begin(cfg, 2, 301, device)
    ids = torch.tensor([[0, 3, 4, 9, 17, 18]], dtype=torch.int32, device=device)
    request = directory.request(cfg, group, ids, torch.full_like(ids[:, 0], 6))
    pool = torch.zeros(2 * (directory.capacity + 1), 16, 2, 20, 72, device=device).bfloat16()
    gather_pages(host, pool, request)
    states = torch.full((2, 2, 72, 1, 20), 2.0, device=device).bfloat16().transpose(2, 4)
    append_token(host, 300, pool, request, *states)
    # Five whole pages, 11 tokens of the last one, and the new one.
    assert pool.float().sum() == 2 * 20 * 72 * (5 * 16 + 11 + 2)
    assert (host[300, :, 1] == 2).all()


def main():
    cfg = DeltaConfig(budget_pages=12)
    for options in (
        {},
        {"sinks": True, "softcap": 5.0, "dtype": torch.float16},
        {"cache_dtype": torch.float8_e4m3fn, "dim": 80, "block_size": 32},
        {"dtype": torch.float32, "dim": 64, "kv_heads": 1, "group": 3},
    ):
        # Without splits too: many rows; an empty one.
        for lengths in ([600, 37, 16, 1], [0, 5] * 150):
            case = make_gpu_case(lengths, **options, spare=0)
            out, scores = case.run(return_page_scores=True)
            ids, counts = ops.select_pages(scores, case.arguments[4], cfg, backend="triton")
            sparse = case.run(page_ids=ids, page_counts=counts)
            ids = torch.nn.functional.pad(ids, (0, 1024 - ids.shape[1]), value=-1)
            parts = case.run(page_ids=ids, page_counts=counts)
            q, *others = case.arguments
            case.arguments = (q[:, None].repeat(1, 4, 1, 1), *others)
            drafts, scores = case.run(return_page_scores=True)
            out = torch.cat([out.flatten(), drafts.flatten()])
            ids, counts = ops.select_pages(scores, case.arguments[4], cfg, backend="triton")
            parts = torch.cat(
                [parts.flatten(), case.run(page_ids=ids, page_counts=counts).flatten()]
            )
            assert all(t.isfinite().all() for t in (out, scores, sparse, parts, case.run()))
    case = make_gpu_case([600, 37, 16, 1], cache_dtype=torch.int8, spare=0)
    scales = torch.rand(case.arguments[1].shape[:3], device="cuda").bfloat16()
    scaled = {"k_scales": scales, "v_scales": scales}
    _, scores = case.run(return_page_scores=True, **scaled)
    ids, counts = ops.select_pages(scores, case.arguments[4], cfg, backend="triton")
    assert case.run(page_ids=ids, page_counts=counts, **scaled).isfinite().all()
    # Rows in pieces, and rows that one thread block reads in turns.
    scores = torch.rand(3, 9000, device="cuda")
    lens = torch.tensor([144000, 79000, 16400], dtype=torch.int32, device="cuda")
    for budget, share in ((12, 0.0), (4200, 0.0), (12, 0.01), (12, 0.3)):
        cfg = DeltaConfig(budget_pages=budget, budget_share=share)
        ops.select_pages(scores, lens, cfg, backend="triton")
    keys, table = torch.rand(9, 700, 24, device="cuda"), torch.arange(9, device="cuda").view(3, 3)
    lens = torch.tensor([2100, 0, 701], dtype=torch.int32, device="cuda")
    cfg = DeltaConfig(page_size=1, budget_pages=500, recent_pages=2)
    wide = torch.tensor([70000, 499, 0], dtype=torch.int32, device="cuda")
    ops.select_pages(torch.rand(3, 70000, device="cuda"), wide, cfg, backend="triton")
    ops.index_scores(keys[:3, 0], keys, table.int(), lens, backend="triton")
    pages_and_a_token_of_an_offloaded_cache(torch.device("cuda"))
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
