"""``deltadecode generate`` on a model with attention of its own."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from deltadecode.cli import loading
from deltadecode.lab.tasks.tokenizer import build_tokenizer
from deltadecode.models.clsa import ClsaConfig, ClsaForCausalLM


def save_model(folder, mode):
    tokenizer = build_tokenizer(64)
    torch.manual_seed(0)
    config = ClsaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, sliding_window=4, index_topk=5,
        index_head_dim=8, max_position_embeddings=64, eos_token_id=None, pad_token_id=0, mode=mode,
    )  # fmt: skip
    ClsaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clsa(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "clsa", "clsa")


@pytest.mark.parametrize("mode", ["yoco", "transformer"])
def test_the_other_modes_run_without_a_plan_and_have_none(run, refused, tmp_path, mode):
    folder = save_model(tmp_path / mode, mode)
    code, out, _ = run("generate", folder, "Facts bada", "--max-new-tokens", 3, "--json")
    assert (code, json.loads(out)["attention"]) == (0, "own")
    assert f"ClsaConfig of mode '{mode}' attends " in refused("info", folder)


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


def test_generate_writes_up_to_the_model_s_last_position(run, clsa):
    arguments = ["generate", clsa, "Facts bada", "--max-new-tokens", 500, "--json"]
    code, out, err = run(*arguments)
    assert (code, json.loads(out)["tokens_generated"]) == (0, 64 - 2 + 1)
    assert "at most 63 tokens" in err


@pytest.mark.parametrize("command", ["info", "serve", "calibrate", "inspect", "eval"])
def test_commands_about_plans_refuse_it_before_its_weights(
    refused, clsa, monkeypatch, tmp_path, command
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("weights were loaded"))
    err = refused(command, clsa)
    assert "ClsaConfig selects the tokens that it reads by itself; its own generate, " in err
    assert "'deltadecode generate' and vLLM run it as it is, without DELTA" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [["generate", "clsa", "x"], ["serve", "clsa", "--dry-run"]])
def test_without_its_distribution_the_shipped_model_is_refused_in_one_line(
    refused, monkeypatch, nothing_loads, command
):
    monkeypatch.setitem(sys.modules, "deltadecode_clsa", None)
    err = refused(*command)
    assert "pip install 'deltadecode[clsa]' brings it" in err and "./packages/clsa" in err


def test_its_name_imports_no_library():
    find = "from deltadecode.cli.loading import named_folder; print(named_folder('clsa'))"
    show = "import sys; print(sys.modules.keys() & {'torch', 'transformers'})"
    ran = [sys.executable, "-c", f"{find}; {show}"]
    out = subprocess.run(ran, capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[1] == "set()"


def test_options_of_delta_are_refused(refused, clsa):
    for option in (["--full"], ["--compare"], ["--budget-pages", "9"], ["--lossless"]):
        err = refused("generate", clsa, "Facts", *option)
        assert "a model with attention of its own takes no DELTA options" in err
