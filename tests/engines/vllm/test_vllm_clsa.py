"""CLSA in vLLM gives what Transformers gives, in all of its modes, from one process of engines."""

import pytest
import torch
from needle_prompts import needles

MODES = ("clsa", "yoco", "transformer")
# Longer than a window, than k tokens, and than the blocks that a prefix is found by.
PROMPTS = [
    [(place * place + 5 * place + start) % 64 for place in range(length)]
    for start, length in ((1, 1), (2, 5), (3, 19), (4, 40), (5, 150), (6, 33), (7, 90))
]
MAX_TOKENS = 30
# Prompts come in parts, beside rows that decode.
CHUNKED = {"max_num_batched_tokens": 48, "block_size": 32, "enable_prefix_caching": True}
ALL = {"hf_overrides": {"early_exit": False}}
RUNS = {
    **{f"{mode} here": {"mode": mode, "rounds": 2} for mode in MODES},
    "all tokens": {"mode": "clsa", "engine": ALL, "params": {"prompt_logprobs": 0}},
    "no prompt": {"mode": "clsa", "params": {"prompt_logprobs": 0}},
    "pipeline": {"mode": "clsa", "configure": True, "engine": {"pipeline_parallel_size": 2}},
    "ranks": {"mode": "yoco", "configure": True, "engine": {"tensor_parallel_size": 4}},
    "index": {
        "mode": "clsa", "configure": True, "engine": {"hf_overrides": {"index_head_dim": 24}},
    },
    "positions": {
        "mode": "clsa", "configure": True,
        "engine": {"hf_overrides": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}},
    },
    "early exit": {
        "mode": "clsa", "configure": True, "engine": {"hf_overrides": {"early_exit": "no"}},
    },
    "no index": {"mode": "yoco", "engine": {"hf_overrides": {"mode": "clsa"}}},
    "an index": {"mode": "clsa", "engine": {"hf_overrides": {"mode": "yoco"}}},
    "float8": {"mode": "clsa", "configure": True, "engine": {"kv_cache_dtype": "fp8"}},
    "delta": {
        "mode": "clsa", "configure": True,
        "engine": {"attention_backend": "CUSTOM", "additional_config": {"deltadecode": {}}},
    },
    "stock if told": {
        "mode": "clsa",
        "engine": {
            "attention_backend": "CUSTOM",
            "additional_config": {"deltadecode": {"on_unsupported": "stock"}},
        },
    },
    "drafts": {
        "mode": "clsa", "configure": True,
        "engine": {
            "speculative_config": {
                "method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2,
            },
        },
    },
}  # fmt: skip


def shipped():
    """The model that is shipped, asked for needles among more tokens than it reads, and fewer."""
    from deltadecode_clsa import model_path
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path())
    asked, codes = zip(*(needles(facts, 1, facts)[0] for facts in (3, 12, 36)), strict=True)
    prompts = [tokenizer(text)["input_ids"] for text in asked]
    return {"path": str(model_path()), "prompts": prompts}, tokenizer, codes


@pytest.fixture(scope="module")
def ran(run_job):
    runs = {**RUNS, "shipped": shipped()[0]}
    job = {"prompts": PROMPTS, "max_tokens": MAX_TOKENS, "engine": CHUNKED, "runs": runs}
    return run_job("clsa_worker.py", job)


@pytest.mark.parametrize("mode", MODES)
def test_prompts_in_parts_and_ragged_batches_give_the_tokens_of_transformers(ran, mode):
    assert ran[f"{mode} here"]["tokens"][0] == ran[mode]["tokens"]


@pytest.mark.parametrize("mode", MODES)
def test_cached_prefixes_give_the_tokens_of_transformers(ran, mode):
    found = ran[f"{mode} here"]
    assert max(found["cached"][1]) >= 128
    assert found["tokens"][1] == ran[mode]["tokens"]


def test_the_shipped_model_writes_what_it_writes_in_transformers(ran):
    run, tokenizer, codes = shipped()
    assert len(run["prompts"][0]) < 256 < len(run["prompts"][2])
    found = ran["shipped"]
    # Transformers ends with the end of a text, which vLLM is told to ignore.
    for tokens, expected, code in zip(found["tokens"][0], found["expected"], codes, strict=True):
        assert tokens[: len(expected)] == expected
        assert tokenizer.decode(expected, skip_special_tokens=True).strip() == code


def test_the_index_decides_tokens(ran):
    assert ran["clsa here"]["tokens"] != ran["yoco here"]["tokens"]


def test_a_token_takes_the_bytes_of_one_layer_and_of_the_index(ran):
    heads, dim, index, layers, number = 2, 32, 32, 4, 4
    found = {mode: ran[f"{mode} here"]["bytes"] for mode in MODES}
    shared = 2 * heads * dim * number
    assert found == {
        "clsa": shared + index * number, "yoco": shared, "transformer": layers * shared,
    }  # fmt: skip


def test_without_early_exit_a_prompt_has_logprobs(ran):
    found = ran["all tokens"]
    assert found["tokens"][0] == ran["clsa"]["tokens"]
    for prompt, got, expected in zip(
        PROMPTS, found["prompt_logprobs"], ran["clsa"]["logprobs"], strict=True
    ):
        assert len(got) == len(prompt) - 1
        for token, logprobs, step in zip(prompt[1:], got, expected, strict=False):
            assert logprobs[str(token)] == pytest.approx(step[token], abs=2e-4)


@pytest.mark.parametrize(
    "run, error",
    [
        ("no prompt", "prompt_logprobs needs the whole prompt in the cross-decoder"),
        ("pipeline", "--pipeline-parallel-size must be 1, got 2"),
        ("ranks", "--tensor-parallel-size must divide the 2 key-value heads"),
        (
            "index",
            "must divide the 128 numbers of a token's shared keys and values on a rank, got 24",
        ),
        ("positions", "have rope_theta and nothing else, got rope_parameters"),
        ("early exit", "early_exit must be true or false, got 'no'"),
        ("no index", "has not all of model.indexer.qk_proj.weight, and a model of mode 'clsa'"),
        ("an index", "has model.indexer.k_proj.weight, and a model of mode 'yoco' with 4 layers"),
        ("float8", "keeps its tokens in its own dtype, got --kv-cache-dtype fp8"),
        ("delta", "selects the tokens that it reads by itself"),
        ("drafts", "so --speculative-config cannot be given"),
    ],
)
def test_what_the_model_cannot_do_is_refused_in_one_line(ran, run, error):
    assert error in ran[run]["error"]


def test_on_unsupported_serves_the_model_as_it_is(ran):
    assert ran["stock if told"]["tokens"][0] == ran["clsa"]["tokens"]


def test_layers_with_a_window_have_no_schedule_made_ahead():
    from deltadecode.engines.vllm.clsa.windows import without_schedule

    class Builder:
        def __init__(self, size):
            self.size, self.aot_schedule = size, True  # as FlashAttention 3 has it

    class Backend:
        @staticmethod
        def get_builder_cls():
            return Builder

    backend = without_schedule(Backend)
    assert issubclass(backend, Backend)
    assert backend is without_schedule(Backend)  # vLLM groups layers by it
    builder = backend.get_builder_cls()(3)
    assert isinstance(builder, Builder)
    assert (builder.size, builder.aot_schedule) == (3, False)


def test_rows_without_a_new_token_change_nothing():
    """vLLM may fill a batch up with them; their last token is another row's."""
    from deltadecode.engines.vllm.clsa.caches import CacheMetadata
    from deltadecode.engines.vllm.clsa.rows import queries

    def ints(*numbers):
        return torch.tensor(numbers, dtype=torch.int32)

    table = torch.zeros(4, 1, dtype=torch.int32)
    metadata = CacheMetadata(table, ints(9, 3, 0, 0), ints(), ints(0, 2, 5, 5, 5), 5, 3, 9)
    asked = queries(metadata, 6, early_exit=True)
    x = torch.arange(6.0)[:, None]
    assert asked.take(x).flatten().tolist() == [1, 4, 4, 4]
    put = asked.put(torch.tensor([[10.0], [20.0], [30.0], [40.0]]), 6)
    assert put.flatten().tolist() == [0, 10, 0, 0, 20, 0]
    each = queries(metadata, 6, early_exit=False)
    assert each.lengths.tolist() == [8, 9, 1, 2, 3]
    assert each.rows.tolist() == [0, 0, 1, 1, 1]
