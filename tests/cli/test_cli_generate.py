"""``deltadecode generate``: what it writes, and what it refuses."""

import io
import json
import sys

import pytest
from cli_models import LAYERS, POSITIONS
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers import DeepseekV3Config as MlaConfig

from deltadecode import DeltaCache, DeltaConfig
from deltadecode.cli.decoding import Decoded
from deltadecode.cli.prompts import encode
from deltadecode.cli.report import first_difference
from deltadecode.lab.tasks.tokenizer import build_tokenizer

SMALL = ["--page-size", "2", "--budget-pages", "3", "--recent-pages", "1"]
CHAT = (
    "{% for m in messages %}{{ m['role'] == 'system' and 'Facts ' or '' }}"
    "{{ m['content'] }}\n{% endfor %}"
)


def tokens_of(text):
    return text.split()


# What it writes


def test_generate_streams_only_the_text_to_stdout(run, model):
    code, out, err = run("generate", model, "Facts bada leads", "--max-new-tokens", "12")
    assert code == 0
    assert len(tokens_of(out)) <= 12
    assert "DELTA: 12 tokens in" in err
    assert "100.0%" in err  # 15 tokens are within any budget


def test_generate_gives_the_text_of_the_model_itself(run, model):
    tokenizer = build_tokenizer(POSITIONS)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    ids = tokenizer("Facts bada leads", return_tensors="pt").input_ids
    new = loaded.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    expected = tokenizer.decode(new, skip_special_tokens=True)
    for extra in ([], ["--full"]):
        arguments = ["generate", model, "Facts bada leads", "--max-new-tokens", "12", *extra]
        assert run(*arguments)[1].rstrip("\n") == expected.rstrip("\n")
        assert json.loads(run(*arguments, "--json")[1])["text"] == expected


def test_generate_json_counts_what_was_read(run, model):
    arguments = ["generate", model, "Facts bada leads", "--max-new-tokens", "30", *SMALL, "--json"]
    code, out, err = run(*arguments, "--delta-layers", "2,3", "--sink-pages", "1")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["config"] == {
        "page_size": 2,
        "budget_pages": 3,
        "budget_share": 0.0,
        "recent_pages": 1,
        "sink_pages": 1,
        "dense_layers": [0, 1],
        "delta_layers": [2, 3],
    }
    assert (found["prompt_tokens"], found["tokens_generated"]) == (3, 30)
    assert found["full_tokens"] == LAYERS * sum(range(4, 33))
    # Layers 4 and 5 read three pages of two tokens, the last of them partial at odd lengths.
    sparse = sum(min(n, 6 - n % 2) for n in range(4, 33))
    assert found["attended_tokens"] == 4 * sum(range(4, 33)) + 2 * sparse
    assert found["attended_fraction"] == found["attended_tokens"] / found["full_tokens"]


def test_compare_says_that_the_texts_are_the_same_within_the_budget(run, model):
    arguments = ["generate", model, "Facts bada leads", "--max-new-tokens", "8", "--compare"]
    found = json.loads(run(*arguments, "--json")[1])
    assert found["compare"]["same"] is True
    assert found["compare"]["first_difference"] is None
    assert found["compare"]["text"] == found["text"]
    _, out, err = run(*arguments)
    assert len(tokens_of(out)) <= 8
    assert "both wrote the same text" in err
    assert "full attention: 8 tokens" in err


def test_compare_says_where_the_texts_part(run, model):
    # Full attention in one layer only and one recent token: some text of 100 tokens must differ.
    arguments = ["generate", model, "Facts bada leads to zale", "--max-new-tokens", "100"]
    plan = ["--page-size", "1", "--budget-pages", "2", "--recent-pages", "1"]
    plan += ["--sink-pages", "0"]
    plan += ["--dense-layers", "", "--delta-layers", "0", "--compare"]
    found = json.loads(run(*arguments, *plan, "--json")[1])
    at = found["compare"]["first_difference"]
    assert found["compare"]["same"] is False
    assert at["delta"] != at["full"]
    ours, theirs = tokens_of(found["text"]), tokens_of(found["compare"]["text"])
    assert 0 < at["token"] < 100
    assert ours[0] == theirs[0]
    _, _, err = run(*arguments, *plan)
    assert f"first differ at token {at['token']}" in err


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ("ab", "ab", None),
        ("abc", "abd", {"token": 2, "delta": "c", "full": "d"}),
        ("ab", "abcd", {"token": 2, "delta": "", "full": "cd"}),
        ("b", "", {"token": 0, "delta": "b", "full": ""}),
    ],
)
def test_first_difference(ours, theirs, expected):
    def written(text):
        return Decoded(text, [ord(letter) for letter in text], 1.0, 0.5, 1, 1)

    assert first_difference(written(ours), written(theirs)) == expected


def test_sampling_follows_the_seed(run, model):
    arguments = ["generate", model, "Facts", "--max-new-tokens", "20", "--temperature", "2"]
    texts = [run(*arguments, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("dash", [[], ["-"]])
def test_prompt_from_stdin(run, model, monkeypatch, dash):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Facts bada\n"))
    found = json.loads(run("generate", model, *dash, "--max-new-tokens", "1", "--json")[1])
    assert found["prompt_tokens"] == 3


def test_prompt_from_a_file(run, model, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("Facts bada\nQuestion")
    arguments = ["generate", model, "--prompt-file", file, "--max-new-tokens", "1", "--json"]
    assert json.loads(run(*arguments)[1])["prompt_tokens"] == 4


def test_chat_template_is_used_unless_told_otherwise(run, model, tmp_path):
    folder = tmp_path / "chat"
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(folder)
    tokenizer = build_tokenizer(POSITIONS)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)

    def length(*extra):
        arguments = ["generate", folder, "bada leads", "--max-new-tokens", "1", "--json", *extra]
        return json.loads(run(*arguments)[1])["prompt_tokens"]

    assert length("--no-chat-template") == 2
    assert length() == 3  # and a line end
    assert length("--system", "bada") == 6  # Facts, the system message and two line ends
    ids = encode(tokenizer, "naze leads", "zale", use_template=True)
    assert tokenizer.decode(ids[0]) == "Facts zale\nnaze leads\n"


def test_plan_file(run, model, tmp_path):
    cfg = DeltaConfig(
        page_size=4, budget_pages=9, sink_pages=0, dense_layers=(0,), delta_layers=(1,)
    )
    cfg.save(tmp_path / "plan.json")
    arguments = ["generate", model, "Facts", "--max-new-tokens", "1", "--json"]
    found = json.loads(run(*arguments, "--plan", tmp_path / "plan.json", "--sink-pages", "0")[1])
    assert DeltaConfig.from_dict(found["config"]) == cfg


def test_text_is_cut_at_the_models_positions_with_a_note(run, model):
    arguments = ["generate", model, "Facts bada", "--max-new-tokens", "500", "--json"]
    code, out, err = run(*arguments)
    assert code == 0
    assert json.loads(out)["tokens_generated"] == POSITIONS - 2 + 1
    assert f"at most {POSITIONS - 1} tokens" in err


# What it refuses


def test_model_that_does_not_exist(refused, tmp_path):
    assert str(tmp_path / "no") in refused("generate", tmp_path / "no", "hi")
    assert str(tmp_path / "no") in refused("info", tmp_path / "no")
    assert "no/such" in refused("generate", "no/such", "hi")


def test_missing_folder_in_a_folder_is_no_name_on_the_hub(refused, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    error = refused("generate", "models/none", "hi")
    assert error == "deltadecode: error: model path 'models/none' does not exist\n"


def test_folder_that_is_no_model(refused, tmp_path):
    assert "config.json" in refused("generate", tmp_path, "hi")
    (tmp_path / "file").write_text("")
    assert "not a folder" in refused("generate", tmp_path / "file", "hi")
    (tmp_path / "config.json").write_text("{broken")
    assert "configuration" in refused("generate", tmp_path, "hi")


def test_model_without_weights_or_tokenizer(refused, model, tmp_path):
    AutoConfig.from_pretrained(model).save_pretrained(tmp_path)
    assert "tokenizer" in refused("generate", tmp_path, "Facts")
    build_tokenizer(POSITIONS).save_pretrained(tmp_path)
    assert "weights" in refused("generate", tmp_path, "Facts")


def test_unsupported_model_names_its_class(refused, tmp_path):
    MlaConfig(num_hidden_layers=4).save_pretrained(tmp_path)
    assert "DeepseekV3Config" in refused("generate", tmp_path, "hi")
    assert "DeepseekV3Config" in refused("info", tmp_path)


def test_prompt_longer_than_the_positions(refused, model):
    error = refused("generate", model, "bada " * (POSITIONS + 1))
    assert f"{POSITIONS} positions" in error
    assert f"{POSITIONS + 1} tokens" in error


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_empty_prompt(refused, model, prompt):
    assert "empty" in refused("generate", model, prompt)


def test_prompts_that_cannot_be_read(refused, model, tmp_path):
    file = tmp_path / "prompt"
    assert str(file) in refused("generate", model, "--prompt-file", file)
    file.write_bytes(b"\xff\xfe\xff")
    assert "UTF-8" in refused("generate", model, "--prompt-file", file)
    assert "not both" in refused("generate", model, "hi", "--prompt-file", file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget-pages", "8"], "budget_pages must be greater than .* 8 <= 16 + 1"),
        (["--budget-pages", "9", "--sink-pages", "2"], "9 <= 16 + 2"),
        (["--page-size", "0"], "page_size must be at least 1, got 0"),
        (["--budget-share", "nan"], r"budget_share must be a number in \[0, 1\), got nan"),
        (["--delta-layers", "2,14,22"], "for a model of 6 layers, got 14"),
        (["--delta-layers", "4,2"], "ascend .* got 2 after 4"),
        (["--delta-layers", "1"], "after the dense"),
        (["--dense-layers", "0", "--delta-layers", "2"], "sparse layer 1"),
        (["--dense-layers", "0;1"], "--dense-layers .* '0;1'"),
        (["--top-p", "0"], "--top-p .* 0.0"),
        (["--device", "tpu"], "--device .* 'tpu'"),
        (["--system", "hi"], "chat template"),
        (["--full", "--budget-pages", "9"], "--full .* --budget-pages"),
        (["--full", "--compare"], "--full .* --compare"),
        (["--plan", "no-such-plan.json"], "no-such-plan.json"),
        (["--kv-dtype", "int4"], "--kv-dtype must be int8 or fp8, got 'int4'"),
        (["--kv-dtype", "int8", "--full"], "--full .* --kv-dtype"),
        (["--kv-dtype", "int8", "--lossless"], "--kv-dtype .* --lossless"),
    ],
)
def test_options_that_break_a_rule(refused, model, options, message):
    import re

    error = refused("generate", model, "Facts", *options)
    assert re.search(message.replace("+", r"\+"), error)


def test_plan_for_another_depth(refused, model, tmp_path):
    DeltaConfig(delta_layers=(2, 14, 22)).save(tmp_path / "plan.json")
    assert "6 layers" in refused("generate", model, "Facts", "--plan", tmp_path / "plan.json")


def test_failure_is_one_line_and_exit_code_1(run, model, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(LlamaForCausalLM, "generate", fail)
    code, _, err = run("generate", model, "Facts", "--max-new-tokens", "9", "--json")
    assert (code, err) == (1, "deltadecode: error: RuntimeError: first line\n")


def test_lossless_writes_what_full_attention_writes(run, model):
    arguments = ["generate", model, "Facts bada leads", "--max-new-tokens", "30", *SMALL, "--json"]
    code, out, err = run(*arguments, "--lossless", "--draft-tokens", "3", "--compare")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["compare"]["same"]
    drafts = found["lossless"]
    assert 0 < drafts["accepted"] <= drafts["verified"] <= drafts["drafted"]


def test_keys_and_values_in_eight_bits(run, model, monkeypatch):
    kinds, make = [], DeltaCache.__init__

    def seen(self, config, *, kv_dtype=None):
        kinds.append(kv_dtype)
        make(self, config, kv_dtype=kv_dtype)

    monkeypatch.setattr(DeltaCache, "__init__", seen)
    arguments = ["generate", model, "Facts bada leads", "--max-new-tokens", "9", *SMALL, "--json"]
    for option in ([], ["--kv-dtype", "int8"]):
        code, _, err = run(*arguments, *option)
        assert (code, err) == (0, "")
    assert kinds == [None, "int8"]


def test_draft_tokens_needs_lossless(run, model):
    code, out, err = run("generate", model, "Facts", "--draft-tokens", "3")
    assert (code, out) == (2, "")
    assert "--draft-tokens needs --lossless" in err
