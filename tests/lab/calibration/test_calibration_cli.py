"""``deltadecode calibrate``: from a folder to a plan in use, and every mistake in one line."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deltadecode import DeltaConfig
from deltadecode.architecture import config_hash
from deltadecode.errors import CalibrationError
from deltadecode.lab.tasks.tokenizer import build_tokenizer
from deltadecode.plan_files import load_meta

LAYERS = 6
PAGES = ["--page-size", "2", "--budget-pages", "6", "--recent-pages", "2"]
QUICK = ["--rows", "6", "--minutes", "0.2", *PAGES]
FREE = ["--rows", "6", "--minutes", "0.2", "--page-size", "2", "--recent-pages", "2"]


def make_model(folder, layers=LAYERS, hidden=32):
    tokenizer = build_tokenizer(256)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=32,
        num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=256, eos_token_id=None, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    line = "piki leads to meve and adds 3 : 2 + 2 = 4 so tofu holds 4"
    path.write_text("".join(json.dumps({"prompt": f"{line} {n}\n{line}"}) + "\n" for n in range(4)))
    return path


def test_a_plan_is_made_and_used(run, model, data, tmp_path):
    plan, figure = tmp_path / "plan.json", tmp_path / "shift.png"
    code, out, err = run(
        "calibrate", model, "--data", data, "--delta-layers", "2", "--dense-layers", "1", *QUICK,
        "-o", plan, "--figure", figure, "--json",
    )  # fmt: skip
    assert code == 0, err
    said = json.loads(out)
    cfg, meta = DeltaConfig.load(plan), load_meta(plan)
    assert cfg.dense_layers == (0,) and len(cfg.delta_layers) == 2
    assert list(cfg.delta_layers) == said["plans"]["calibrated"]["delta_layers"]
    assert meta["data"] == "prompts.jsonl"
    assert (meta["texts"]["fit"], meta["texts"]["held_out"]) == (3, 1)
    assert meta["plans"] == said["plans"]
    assert meta["expected"]["kl"] == said["plans"]["calibrated"]["kl"]["held_out"]
    assert not (tmp_path / "plan.json.state").exists()
    assert figure.read_bytes().startswith(b"\x89PNG")
    code, _, err = run("generate", model, "piki", "--plan", plan, "--max-new-tokens", "2")
    assert code == 0 and "warning" not in err


def test_a_task_and_a_table(run, model):
    code, out, err = run(
        "calibrate", model, "--task", "chain:steps=4:distractors=2", "--samples", "2",
        "--attended-fraction", "0.6", "--device", "cpu", *FREE,
    )  # fmt: skip
    assert code == 0, err
    assert "calibrated" in out and "even spread" in out and "held out" in out


def test_a_long_text_and_python_s_own_are_cut_at_the_context(run, model, tmp_path):
    text = tmp_path / "long.txt"
    text.write_text("piki leads to meve and adds 3 : 2 + 2 = 4\n" * 60)
    for source in (["--data", text], []):
        code, out, err = run("calibrate", model, *source, "--samples", "2", "--context", "60",
                             "--attended-fraction", "0.7", *FREE, "--json")  # fmt: skip
        assert code == 0, err
        said = json.loads(out)
        assert said["texts"]["tokens"] == [67, 67]
        assert said["plans"]["calibrated"]["attended_fraction"] <= 0.7


def test_the_embedded_model_is_calibrated_on_its_own_task(run, monkeypatch):
    seen = []

    def stop(*arguments, **options):
        seen.extend(arguments)
        raise CalibrationError("seen")

    monkeypatch.setattr("deltadecode.lab.calibration.run.calibrate", stop)
    code, _, err = run("calibrate", "embedded", "--samples", "2")
    assert code == 2 and "seen" in err
    _, pieces, request, lengths = seen
    assert request.fraction == pytest.approx(0.25, abs=0.02) and request.base.page_size == 4
    assert len(pieces) == 2 and pieces[0].context < 3000 < pieces[1].context
    assert len(lengths) == 1024


def test_a_state_stays_when_a_run_is_killed_and_where_it_was_asked_for(
    run, model, data, tmp_path, monkeypatch
):
    plan, state = tmp_path / "plan.json", tmp_path / "measured"
    common = ["calibrate", model, "--data", data, "--delta-layers", "2", *QUICK, "-o", plan]
    code, _, err = run(*common, "--resume", state)
    assert code == 0 and state.is_file(), err
    known = state.read_text()
    assert run(*common, "--resume", state)[0] == 0 and state.read_text() == known

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("deltadecode.lab.calibration.report.report", killed)
    assert run(*common)[0] == 130
    assert (tmp_path / "plan.json.state").is_file()


def test_a_plan_of_another_model_is_warned_of_or_refused(run, model, data, tmp_path):
    plan = tmp_path / "plan.json"
    other = make_model(tmp_path / "other", hidden=16)
    code, _, err = run("calibrate", other, "--data", data, "--delta-layers", "2", "--dense-layers",
                       "0", *QUICK, "-o", plan)  # fmt: skip
    assert code == 0, err
    code, _, err = run("generate", model, "piki", "--plan", plan, "--max-new-tokens", "2")
    made_for = load_meta(plan)["config_hash"]
    warnings = [line for line in err.splitlines() if "warning" in line]
    assert code == 0 and len(warnings) == 1
    assert str(other) in warnings[0] and made_for in warnings[0]
    small = make_model(tmp_path / "small", layers=1)
    code, _, err = run("generate", small, "piki", "--plan", plan, "--max-new-tokens", "2")
    assert code == 2 and len(err.splitlines()) == 1
    assert "calibrated for" in err and "must be in 0..0" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "chain", "--data", "x", "--delta-layers", "2"], "give either"),
        (["--data", "none.jsonl", "--delta-layers", "2"], "cannot read the data 'none.jsonl'"),
        (["--data", "none.txt", "--delta-layers", "2"], "cannot read the text 'none.txt'"),
        (["--task", "text:stdlib-docs"], "--task text is what --data FILE and no --task do"),
        (["--task", "chain", "--delta-layers", "6"], "leave no sparse layer in a model of 6"),
        (["--task", "chain", "--delta-layers", "0"], "'--delta-layers'"),
        (["--task", "riddles", "--delta-layers", "2"], "unknown task 'riddles'"),
        (["--task", "chain", "--delta-layers", "2", "--kl", "0.5"], "give neither"),
        (["--task", "chain", "--attended-fraction", "2"], "must be between 0 and 1, got 2"),
        (["--attended-fraction", "0.5", "--dense-layers", "1"], "goes with --delta-layers"),
        (["--attended-fraction", "0.5", "--budget-pages", "30"], "goes with --delta-layers alone"),
        (["--kl", "0"], "the KL must be above 0, got 0"),
        (["--context", "250"], "need 378 positions, and the model has 256"),
        (["--context", "90", "--attended-fraction", "0.1"], "no plan reads as little as"),
        (["--task", "chain", "--delta-layers", "2", "-o", "no/where.json"], "does not exist"),
        (["--task", "chain", "--delta-layers", "2", "--dtype", "int8"], "--dtype must be"),
        (["--task", "chain", "--delta-layers", "2"], "has 256 positions"),
    ],
)
def test_mistakes_are_one_line(run, model, arguments, message):
    code, out, err = run("calibrate", model, *arguments)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1, err
    assert message in err


def test_a_text_that_is_too_short_is_refused(run, model, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("piki leads to meve")
    code, _, err = run("calibrate", model, "--data", text, "--context", "90", *FREE)
    assert code == 2 and "context + tokens + 1 are 97" in err and len(err.splitlines()) == 1


def test_a_figure_that_cannot_be_drawn_is_refused_before_anything_runs(run, model, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = run("calibrate", model, "--task", "chain", "--delta-layers", "2", "--figure",
                       "shift.png")  # fmt: skip
    assert code == 2 and "--figure needs matplotlib" in err and len(err.splitlines()) == 1


def test_a_broken_line_is_named(run, model, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": \n')
    code, _, err = run("calibrate", model, "--data", path, "--delta-layers", "2")
    assert code == 2 and "line 2 of the data" in err


def test_the_hash_is_of_the_shape_alone(model):
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    first = config_hash(LlamaConfig(**shape))
    assert first == config_hash(LlamaConfig(**shape, use_cache=False, rms_norm_eps=0.1))
    assert first != config_hash(LlamaConfig(**{**shape, "num_hidden_layers": 5}))
    assert first != config_hash(LlamaConfig(**{**shape, "vocab_size": 65}))
