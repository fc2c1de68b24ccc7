"""``deltadecode generate`` on a model that selects its tokens by itself."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from deltadecode.lab.tasks.tokenizer import build_tokenizer
from deltadecode.models.clsa import ClsaConfig, ClsaForCausalLM


@pytest.fixture(scope="module")
def clsa(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("models") / "clsa", build_tokenizer(64)
    torch.manual_seed(0)
    config = ClsaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, sliding_window=4, index_topk=5,
        index_head_dim=8, max_position_embeddings=64, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    ClsaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_generate_runs_the_model_without_a_plan(run, clsa):
    prompt, new = "Facts bada leads", 20
    code, out, err = run("generate", clsa, prompt, "--max-new-tokens", new, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["attention"], found["config"]) == ("own", None)
    loaded = AutoModelForCausalLM.from_pretrained(clsa)
    ids = build_tokenizer(64)(prompt, return_tensors="pt").input_ids
    tokens = loaded.generate(ids, max_new_tokens=new, do_sample=False)[0, ids.shape[1] :]
    assert found["text"] == build_tokenizer(64).decode(tokens, skip_special_tokens=True)
    code, _, err = run("generate", clsa, prompt, "--max-new-tokens", "3")
    assert (code, "the model's own attention: 3 tokens in" in err) == (0, True)


def test_options_of_delta_are_refused(refused, clsa):
    for option in (["--full"], ["--compare"], ["--budget-pages", "9"], ["--lossless"]):
        err = refused("generate", clsa, "Facts", *option)
        assert "selects tokens by itself takes no DELTA options" in err
