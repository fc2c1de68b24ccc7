"""The command line: results on stdout, one-line errors on stderr, exit codes 0, 1, 2 and 130."""

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import DeepseekV3Config as MlaConfig

from deltadecode import DeltaConfig
from deltadecode.cli import demo_workers, main
from deltadecode.cli.decoding import Decoded
from deltadecode.cli.generate import encode
from deltadecode.cli.info import ranges
from deltadecode.cli.report import first_difference
from deltadecode.lab.tasks import make_problem, model_path
from deltadecode.lab.tasks.tokenizer import build_tokenizer

LAYERS = 6
POSITIONS = 128
SMALL = ["--page-size", "2", "--budget-pages", "3", "--recent-pages", "1"]
CHAT = (
    "{% for m in messages %}{{ m['role'] == 'system' and 'Facts ' or '' }}"
    "{{ m['content'] }}\n{% endfor %}"
)


def make_model(folder, positions):
    """Write a tiny random Llama with the embedded task's tokenizer."""
    tokenizer = build_tokenizer(positions)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=positions,
        eos_token_id=None,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tiny", POSITIONS)


@pytest.fixture
def run(capfd):
    """Run the command in this process: exit code, stdout and stderr."""

    def call(*arguments):
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return ended.value.code, out, err

    return call


@pytest.fixture
def refused(run):
    """Run the command, and check that it refuses with exit code 2 and one line."""

    def call(*arguments):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("deltadecode: error: ")
        assert err.count("\n") == 1 and err.endswith("\n")
        return err

    return call


def tokens_of(text):
    return text.split()


# Help, version, usage


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["--help"],
        ["demo", "-h"],
    ],
)
def test_help_goes_to_stdout(run, command):
    code, out, err = run(*command)
    assert (code, err) == (0, "")
    assert "Usage: deltadecode" in out


@pytest.mark.parametrize("command", ["demo", "generate", "info"])
def test_every_command_has_help_and_json(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "--json" in out


def test_version(run):
    import deltadecode

    assert run("--version") == (0, deltadecode.__version__ + "\n", "")


def test_help_imports_no_torch():
    code = (
        "import sys\nfrom deltadecode.cli import main\n"
        "try:\n    main(['generate', '--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nonsense"], "nonsense"),
        (["info", "--nonsense"], "--nonsense"),
        (["generate"], "model"),
        (["generate", "m", "p", "--max-new-tokens", "0"], "0"),
        (["generate", "m", "p", "--max-new-tokens", "many"], "many"),
        (["generate", "m", "p", "--dtype", "float8"], "float8"),
        (["demo", "--seed", "-1"], "-1"),
    ],
)
def test_wrong_usage_is_one_line_that_names_it(refused, arguments, named):
    assert named in refused(*arguments)


# info


def test_info_shows_versions_and_the_plan(run, model):
    code, out, err = run("info", model)
    assert (code, err) == (0, "")
    assert torch.__version__ in out
    assert "default plan" in out
    assert "the pages that layer 4 selects" in out


def test_info_json(run, model):
    found = json.loads(run("info", model, "--json")[1])
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"][0] == "cpu"
    triton = {"triton"} if importlib.util.find_spec("triton") else set()
    assert {"reference", "cpu"} | triton == set(found["backends"])
    by_role = {
        (entry["role"], entry["source"]): entry["layers"] for entry in found["model"]["roles"]
    }
    assert by_role == {
        ("dense", None): [0, 1],
        ("delta", None): [2, 4],
        ("sparse", 2): [3],
        ("sparse", 4): [5],
    }
    assert "model" not in json.loads(run("info", "--json")[1])


def test_ranges():
    assert ranges([0, 1, 3, 4, 5, 9]) == "0, 1, 3-5, 9"


# generate: what it writes


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
    cfg = DeltaConfig(page_size=4, budget_pages=9, dense_layers=(0,), delta_layers=(1,))
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


# generate: what it refuses


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
        (["--budget-pages", "8"], "budget_pages must be greater than .* 8 <= 8 + 0"),
        (["--budget-pages", "9", "--sink-pages", "1"], "9 <= 8 + 1"),
        (["--page-size", "0"], "page_size must be at least 1, got 0"),
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


# demo


@pytest.fixture
def small_demo(monkeypatch, tmp_path, tiny_shape):
    """The demo on small random models; what the first one writes is no answer."""
    folder = make_model(tmp_path / "solver", positions=2048)
    monkeypatch.setattr("deltadecode.cli.demo.model_path", lambda: folder)
    larger = {"context": 2000, "shape": tiny_shape.to_dict(), "pairs": 3}
    monkeypatch.setattr("deltadecode.cli.demo.LARGER", larger)
    return folder


def test_demo_json_is_one_object(run, small_demo):
    code, out, err = run("demo", "--seed", "7", "--steps", "6", "--json")
    assert code == 0
    assert out.count("\n") == 1
    found = json.loads(out)
    problem = make_problem(7, steps=6)
    assert "seed 7" in err
    assert found["seed"] == 7
    assert found["expected"] == problem.answer
    assert (found["answer"], found["correct"], found["same_answer"]) == (None, False, False)
    tokenizer = build_tokenizer(2048)
    written = len(tokenizer(problem.solution).input_ids) + 32
    prompt = len(tokenizer(problem.prompt).input_ids)
    assert found["prompt_tokens"] == prompt
    assert found["tokens_generated"] == found["tokens_generated_full"] == written
    assert found["full_tokens"] == LAYERS * sum(range(prompt + 1, prompt + written))
    assert found["attended_fraction"] == found["attended_tokens"] / found["full_tokens"]
    for name in ("seconds_full", "seconds_delta", "step_ms_full", "step_ms_delta"):
        assert found[name] > 0


def test_demo_solves_a_short_problem_with_the_shipped_model(run, monkeypatch, small_demo):
    monkeypatch.setattr("deltadecode.cli.demo.model_path", model_path)
    code, out, _ = run("demo", "--seed", "1", "--steps", "15", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["correct"] and found["correct_full"] and found["same_answer"]
    assert found["answer"] == found["expected"] == make_problem(1, steps=15).answer
    assert found["attended_fraction"] < 1


def test_demo_shows_both_sides(run, small_demo):
    code, out, err = run("demo", "--steps", "3")
    assert code == 0
    for shown in (
        "full attention",
        "DELTA",
        "right?",
        "attended",
        "seconds",
        "2,000 tokens",
    ):
        assert shown in out
    assert "…" not in out
    assert "seed" in err


def test_demo_of_no_steps_or_too_many_is_refused(refused):
    assert "0" in refused("demo", "--steps", "0")
    assert "100000" in refused("demo", "--steps", "100000")


def test_demo_that_fails_ends_with_1_and_one_line(run, small_demo):
    (small_demo / "model.safetensors").unlink()
    code, out, err = run("demo", "--seed", "1", "--steps", "3")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("deltadecode: error: RuntimeError: decoding with ")
    assert "Traceback" not in err


def test_demo_whose_step_cannot_be_timed_says_so(run, small_demo, monkeypatch, tiny_shape):
    shallow = {**tiny_shape.to_dict(), "num_hidden_layers": 4, "layer_types": None}
    larger = {"context": 20, "shape": shallow, "pairs": 2}
    monkeypatch.setattr("deltadecode.cli.demo.LARGER", larger)
    code, out, err = run("demo", "--steps", "3", "--json")
    assert (code, out) == (1, "")
    last = err.splitlines()[-1]
    assert last.startswith("deltadecode: error: RuntimeError: timing a step failed: DeltaConfigErr")


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ("ready", "decoding with DELTA failed: ValueError: too small"),
        ("done", "timing a step failed: ValueError: too small"),
    ],
)
def test_a_failure_is_told_though_the_other_side_is_not_so_far(monkeypatch, last, message):
    side = """if 1:
        import json, sys, time
        last, delta = sys.argv[1], json.loads(sys.argv[2])["delta"]
        say = lambda **message: print(json.dumps(message), flush=True)
        for part in ("ready", "done"):
            if part == last and not delta:
                time.sleep(60)
            if part == last == "ready":
                break
            say(**{part: 1})
            if part != last:
                sys.stdin.readline()
        say(error="ValueError: too small")
    """
    popen = subprocess.Popen

    def start(command, **options):
        return popen([sys.executable, "-c", side, last, command[-1]], **options)

    monkeypatch.setattr(demo_workers.subprocess, "Popen", start)
    with pytest.raises(RuntimeError, match=message):
        demo_workers.run({}, {"pairs": 1}, Console(stderr=True))


# As a process


def command(*arguments):
    code = "from deltadecode.cli import main; main()"
    return [sys.executable, "-c", code, *map(str, arguments)]


def test_process_writes_nothing_but_the_result(model):
    done = subprocess.run(
        command("generate", model, "Facts bada", "--max-new-tokens", "3", "--json"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["tokens_generated"] == 3
    assert done.stderr == ""


def test_process_refuses_with_exit_code_2():
    done = subprocess.run(
        command("generate", "no/such/model", "hi"), capture_output=True, text=True, check=False
    )
    expected = "deltadecode: error: model path 'no/such/model' does not exist\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


def test_interrupt_ends_with_130_and_one_line(model, tmp_path):
    os.mkfifo(tmp_path / "prompt")
    process = subprocess.Popen(
        command("generate", model, "--prompt-file", tmp_path / "prompt"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A background job, as CI may be, starts with interrupts ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    # Returns once the command has opened the other end: from then on it waits for its prompt.
    writer = os.open(tmp_path / "prompt", os.O_WRONLY)
    try:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        os.close(writer)
    assert (process.returncode, out) == (130, b"")
    assert err == b"deltadecode: error: interrupted\n"
