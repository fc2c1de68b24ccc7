"""torch.ops.deltadecode: what compiled graphs hold."""

import pytest
import torch
from ops_oracle import BACKENDS, make_case

from deltadecode import ops
from deltadecode.config import DeltaConfig

CFG = DeltaConfig(page_size=4, budget_pages=3, recent_pages=1)
SHARE = DeltaConfig(4, 2, 1, 0, budget_share=0.6)


def step(case_arguments, options, backend, cfg=CFG):
    seq_lens = case_arguments[4]
    out, scores = ops.decode_attention(
        *case_arguments, **options, return_page_scores=True, backend=backend
    )
    ids, counts = ops.select_pages(scores, seq_lens, cfg, backend=backend)
    sparse = ops.decode_attention(
        *case_arguments, **options, page_ids=ids, page_counts=counts, backend=backend
    )
    return out, scores, ids, counts, sparse


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_a_step_compiles_into_one_graph(backend):
    case = make_case(0, [21, 3, 0, 13], pages_per_block=2, sinks=True)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for cfg in (CFG, SHARE):
        expected = step(case.arguments, case.options, backend, cfg)
        found = compiled(case.arguments, case.options, backend, cfg)
        assert all(torch.equal(got, want) for got, want in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scores", [True, False])
def test_decode_attention_is_a_proper_operator(dtype, scores):
    case = make_case(1, [9, 4], dtype=dtype)
    operator = torch.ops.deltadecode.decode_attention.default
    options = (0.5, 4, None, None, None, None, 1.0, 1.0, scores, False, None, None)
    torch.library.opcheck(operator, (*case.arguments, *options, "torch"))


def test_select_pages_is_a_proper_operator():
    scores, lens = torch.rand(2, 9), torch.tensor([33, 5], dtype=torch.int32)
    operator = torch.ops.deltadecode.select_pages.default
    for share in (0.0, 0.6):
        torch.library.opcheck(operator, (scores, lens, 4, 3, share, 1, 0, "torch"))
