"""Transformers on a GPU: CUDA graphs of decode steps give what plain steps give."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, CompileConfig, LlamaConfig, Qwen2Config

import deltadecode as dd
from deltadecode.engines.transformers import attention, full

pytestmark = [
    pytest.mark.gpu,
    # That faster matrix products exist, and the like: of the compiler, and nothing of ours.
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    # Large, so that attention is far from uniform and a wrong selection shows.
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
FAMILIES = {"llama": LlamaConfig, "qwen2": Qwen2Config}
LENGTHS = (230, 101, 37)
STEPS = 120
CFG = dd.DeltaConfig(
    page_size=16, budget_pages=6, recent_pages=2, dense_layers=(0,), delta_layers=(1, 3)
)


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# From the 12th page on, half of them are more than K.
SHARE = replace(CFG, budget_share=0.5)


def make(family, dtype, cfg=CFG):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](**SHAPE), attn_implementation="sdpa")
    model = model.to("cuda", dtype).eval()
    dd.enable(model, cfg)
    return model


def left_padded(lengths=LENGTHS):
    longest = max(lengths)
    mask = torch.stack([torch.arange(longest) >= longest - n for n in lengths]).long()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, SHAPE["vocab_size"], mask.shape, generator=generator)
    return (tokens * mask).cuda(), mask.cuda()


def generate(model, tokens, mask, steps=STEPS, **options):
    dd.stats(model).reset()
    out = model.generate(
        tokens, attention_mask=mask, max_new_tokens=steps, do_sample=False,
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip
    return out, torch.stack(out.logits), (dd.stats(model).steps, dd.stats(model).per_layer)


def graphs_run():
    return torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


@pytest.mark.parametrize(("family", "cfg"), [("llama", CFG), ("qwen2", CFG), ("llama", SHARE)])
def test_cuda_graphs_equal_the_default_cache(family, cfg):
    model = make(family, torch.float32, cfg)
    tokens, mask = left_padded()
    expected, logits, counts = generate(model, tokens, mask)
    assert 0.3 < dd.stats(model).attended_fraction < 0.95
    skips = graphs_run()
    for _ in range(2):  # the second call replays what the first has recorded
        got, got_logits, got_counts = generate(model, tokens, mask, cache_implementation="static")
        assert isinstance(got.past_key_values, dd.DeltaStaticCache)
        assert torch.equal(got.sequences, expected.sequences)
        torch.testing.assert_close(got_logits, logits, rtol=1e-3, atol=1e-3)
        assert got_counts == counts
    assert graphs_run() == skips


@pytest.mark.parametrize("family", FAMILIES)
def test_without_compilation(family):
    model = make(family, torch.float32)
    tokens, mask = left_padded()
    expected, logits, counts = generate(model, tokens, mask)
    got, got_logits, got_counts = generate(
        model, tokens, mask, cache_implementation="static", disable_compile=True
    )
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(got_logits, logits, rtol=1e-3, atol=1e-3)
    assert got_counts == counts


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decode_step_is_one_graph(family):
    model = make(family, torch.float32)
    tokens, mask = left_padded()
    expected, _, _ = generate(model, tokens, mask)
    config = CompileConfig(fullgraph=True)
    options = {"cache_implementation": "static", "compile_config": config}
    got, _, _ = generate(model, tokens, mask, **options)
    assert torch.equal(got.sequences, expected.sequences)
    # A prompt of another length that fits in the same cache, and a plan of another budget.
    generate(model, tokens[:, 30:], mask[:, 30:], **options)
    dd.enable(model, dd.DeltaConfig(16, 4, 2, 0, (0,), (1, 3)))
    expected, _, counts = generate(model, tokens, mask)
    got, _, got_counts = generate(model, tokens, mask, **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert got_counts == counts


def test_bfloat16_stays_close():
    model = make("llama", torch.bfloat16)
    tokens, mask = left_padded()
    _, logits, _ = generate(model, tokens, mask, steps=2)
    _, got, _ = generate(model, tokens, mask, steps=2, cache_implementation="static")
    assert float((got - logits).norm() / logits.norm()) < 0.05


def test_a_model_that_no_kernel_can_compute_is_refused():
    model = make("llama", torch.float64)
    tokens, mask = left_padded()
    with pytest.raises(dd.UnsupportedCacheError, match="float64"):
        generate(model, tokens, mask, steps=4, cache_implementation="static")


@pytest.mark.parametrize("lengths", [LENGTHS, (64, 64)])
def test_nothing_is_printed(lengths, capfd):
    model = make("llama", torch.float32)
    tokens, mask = left_padded(lengths)
    capfd.readouterr()
    generate(model, tokens, mask, steps=20, cache_implementation="static")
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""


@pytest.mark.parametrize("draft_tokens", [4, 16, None])
@pytest.mark.parametrize("family", FAMILIES)
def test_lossless_mode_writes_what_full_attention_writes(family, draft_tokens):
    model = make(family, torch.float32)
    tokens, mask = left_padded()
    dd.disable(model)
    options = {
        "attention_mask": mask, "max_new_tokens": STEPS, "do_sample": False,
        "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    expected = model.generate(tokens, **options)
    dd.enable(model, CFG, lossless=True, draft_tokens=draft_tokens)
    for _ in range(2):
        got = model.generate(tokens, **options)
        assert torch.equal(got.sequences, expected.sequences)
        logits = torch.stack(got.logits)
        torch.testing.assert_close(logits, torch.stack(expected.logits), rtol=1e-3, atol=1e-3)
    counts = dd.stats(model)
    assert 0 < counts.accepted <= counts.verified <= counts.drafted


def test_lossless_mode_samples_in_bfloat16():
    model = make("llama", torch.bfloat16)
    dd.enable(model, CFG, lossless=True)
    tokens, mask = left_padded()
    texts = []
    for _ in range(2):
        torch.manual_seed(5)
        text = model.generate(tokens, attention_mask=mask, max_new_tokens=STEPS, do_sample=True)
        texts.append(text)
    assert torch.equal(*texts)
    assert dd.stats(model).accepted > 0


def test_decode_steps_leave_the_stock_function_alone(monkeypatch):
    # It may plan a kernel anew for every number of tokens, which takes longer than a step.
    queries, full = [], attention.full_attention

    def noted(module, query, *arguments, **options):
        queries.append(query.shape[2])
        return full(module, query, *arguments, **options)

    monkeypatch.setattr(attention, "full_attention", noted)
    model = make("llama", torch.bfloat16)
    tokens, _ = left_padded((60,))  # within the budget at first
    generate(model, tokens, torch.ones_like(tokens))
    assert set(queries) == {60}


@pytest.mark.parametrize("shape", [(1, 32, 8, 1000, 5003, 128), (3, 4, 4, 17, 64, 80)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_last_queries_of_a_prompt_need_no_mask(shape, dtype):
    rows, heads, kv_heads, queries, tokens, dim = shape
    torch.manual_seed(0)
    query = torch.randn(rows, heads, queries, dim, device="cuda", dtype=dtype)
    key, value = torch.randn(2, rows, kv_heads, tokens, dim, device="cuda", dtype=dtype)
    module = torch.nn.Module()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = full.full_attention(module, query, key, value, None, dropout=0.0, scaling=None)
    # No keys for each head, and no mask of queries by tokens.
    spare = 2 * out.numel() * out.element_size() + 4 * rows * heads * queries
    assert torch.cuda.max_memory_allocated() - before <= 2 * spare + 2**21
    group = heads // kv_heads
    wide = [x.double().repeat_interleave(group, dim=1) for x in (key, value)]
    seen = torch.ones(queries, tokens, dtype=torch.bool, device="cuda").tril(tokens - queries)
    expected = torch.nn.functional.scaled_dot_product_attention(query.double(), *wide, seen)
    torch.testing.assert_close(
        out,
        expected.transpose(1, 2).to(dtype),
        atol=4e-3 if dtype == torch.float16 else 2e-2,
        rtol=0,
    )


def test_pieces_of_a_padded_chunk_are_the_chunk(monkeypatch):
    torch.manual_seed(0)
    query = torch.randn(2, 8, 300, 64, device="cuda", dtype=torch.bfloat16)
    key, value = torch.randn(2, 2, 2, 1000, 64, device="cuda", dtype=torch.bfloat16)
    place = torch.arange(1000, device="cuda")
    seen = (place <= place[700:, None]) & (
        place >= torch.tensor([0, 40], device="cuda")[:, None, None]
    )
    module = torch.nn.Module()
    module.num_key_value_groups = 4

    def attend():
        given = {"dropout": 0.0, "scaling": None}
        return full.full_attention(module, query, key, value, seen[:, None], **given)

    whole = attend()
    monkeypatch.setattr(full, "_MASK_BYTES", 2**20)
    monkeypatch.setattr(full, "sdpa_attention_forward", None)
    torch.testing.assert_close(attend(), whole, atol=2e-2, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_chunks_of_a_prompt_are_the_prompt(dtype):
    model = make("llama", dtype)
    tokens, mask = left_padded((230, 230))
    for given in ({}, {"attention_mask": mask}):
        whole, parts = (
            model(tokens, **given).logits,
            chunked(model, tokens, given, 60),
        )
        # Logits of these weights are large, so single ones differ by much in half precision.
        noise = (parts - whole).abs().mean() / whole.std()
        assert noise < (0.02 if dtype == torch.bfloat16 else 1e-4)


def chunked(model, tokens, given, size):
    """Logits of all tokens, some at a time."""
    cache, logits = dd.DeltaCache(model.config), []
    mask = given.get("attention_mask")
    for first in range(0, tokens.shape[1], size):
        last = min(first + size, tokens.shape[1])
        own = {} if mask is None else {"attention_mask": mask[:, :last]}
        logits.append(model(tokens[:, first:last], past_key_values=cache, **own).logits)
    return torch.cat(logits, dim=1)
