"""CLSA on a GPU: its operations against float64, its step in a CUDA graph: ``pytest -m gpu``."""

import math

import pytest
import torch
from gpu_cases import error, poison_allocator

from deltadecode import ops
from deltadecode.config import DeltaConfig
from deltadecode.models.clsa import ClsaConfig, ClsaForCausalLM, ClsaStaticCache

pytestmark = pytest.mark.gpu
TOPK = DeltaConfig(page_size=1, budget_pages=2048, recent_pages=0, sink_pages=0)
# Rounding of the output, and of the weights before they meet the values.
TOLERANCE = {torch.bfloat16: 6e-3, torch.float32: 2e-6}


def _index(lengths, dtype):
    rows, longest = len(lengths), max(lengths)
    keys = torch.full((rows, longest, 128), math.nan, dtype=dtype, device="cuda")
    for row, n in enumerate(lengths):
        keys[row, :n] = torch.randn(n, 128, device="cuda")
    q = torch.randn(rows, 128, device="cuda").to(dtype)
    table = torch.arange(rows, dtype=torch.int32, device="cuda")[:, None]
    return q, keys, table, torch.tensor(lengths, dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "lengths", [[131072], [524288], [1, 2047, 2048, 2049, 40000], [9000] * 64], ids=str
)
def test_the_index_picks_the_exact_top_k(lengths, dtype):
    poison_allocator()
    q, keys, table, lens = _index(lengths, dtype)
    scores = ops.index_scores(q, keys, table, lens, backend="triton")
    ids, counts = ops.select_pages(scores, lens, TOPK, backend="triton")
    for row, n in enumerate(lengths):
        exact = keys[row, :n].double() @ q[row].double()
        assert error(scores[row, :n], exact) < 2e-6
        top = scores[row, :n].topk(min(n, 2048)).values.sort().values
        chosen = ids[row, : counts[row]].long()
        assert torch.equal(scores[row, chosen].sort().values, top)
        assert torch.equal(chosen, chosen.unique())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows, n", [(1, 131072), (3, 5000), (64, 4096)])
def test_attention_to_the_tokens_of_the_index(rows, n, dtype):
    poison_allocator()
    q = torch.randn(rows, 20, 128, device="cuda").mul(4).to(dtype)
    kv = torch.full((2, rows, n, 4, 128), math.nan, dtype=dtype, device="cuda")
    ids = torch.stack(
        [torch.randperm(n, device="cuda")[:2048].sort().values for _ in range(rows)]
    ).int()
    for row in range(rows):
        kv[:, row, ids[row].long()] = torch.randn(2, 2048, 4, 128, device="cuda").to(dtype)
    table = torch.arange(rows, dtype=torch.int32, device="cuda")[:, None]
    lens, counts = (torch.full((rows,), x, dtype=torch.int32, device="cuda") for x in (n, 2048))
    more = {"scale": 128**-0.5, "page_size": 1, "page_ids": ids, "page_counts": counts}
    out = ops.decode_attention(q, *kv, table, lens, **more, backend="triton")
    exact = ops.decode_attention(q.double(), *kv.double(), table, lens, **more, backend="reference")
    assert error(out, exact) < TOLERANCE[dtype]


def _model(mode, dtype):
    torch.manual_seed(0)
    config = ClsaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=4, mode=mode,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, sliding_window=64,
        index_topk=128, index_head_dim=64, max_position_embeddings=4096, initializer_range=0.1,
    )  # fmt: skip
    return ClsaForCausalLM(config).to("cuda", dtype).eval()


@pytest.mark.parametrize("mode", ["clsa", "yoco", "transformer"])
@torch.no_grad()
def test_graphed_steps_are_one_pass_over_the_whole_sequence(mode):
    model, exact = _model(mode, torch.float32), _model(mode, torch.float64)
    ids = torch.randint(256, (3, 700), device="cuda")
    whole = exact(ids).logits
    cache = ClsaStaticCache(model.config, 3, 800, torch.float32, ids.device)
    # The second prompt runs through the graph of the first.
    for prompt in (640, 30):
        cache.reset()
        logits = [model(ids[:, :prompt], past_key_values=cache).logits]
        for t in range(prompt, prompt + 60):
            logits.append(model(ids[:, t : t + 1], past_key_values=cache).logits)
        wanted = whole[:, prompt - 1 : prompt + 60]
        assert error(torch.cat(logits, 1), wanted) < 1e-3
        assert cache.graph is not None


@pytest.mark.parametrize("mode", ["clsa", "yoco", "transformer"])
def test_generate_in_a_graph_writes_what_generate_writes(mode):
    model, lengths = _model(mode, torch.float32), (300, 77, 150)
    ids = torch.randint(256, (3, 300), device="cuda")
    place = torch.arange(300, device="cuda")
    mask = torch.stack([place >= 300 - length for length in lengths]).long()
    given = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False}
    made = [
        model.generate(ids, cache_implementation=kind, **given).tolist()
        for kind in (None, "static")
    ]
    assert made[0] == made[1]


@pytest.mark.parametrize("mode", ["clsa", "yoco", "transformer"])
def test_training_in_bfloat16_gives_finite_gradients(mode):
    model = _model(mode, torch.float32).train()
    ids = torch.randint(256, (2, 1000), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        out = model(ids, labels=ids, index_loss=mode == "clsa")
    (out.loss if out.index_loss is None else out.loss + 0.1 * out.index_loss).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
