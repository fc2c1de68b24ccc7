"""Training CLSA: all phases of all modes, a few steps of each, with breaks and without."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltadecode.models.clsa import attention

TRAINING = Path(__file__).resolve().parents[2] / "training"
SMALL = {
    "device": "cpu", "dense-tokens": 768, "index-tokens": 512, "long-tokens": 512,
    "dense-length": 64, "length": 128, "batch-tokens": 256, "rows-at-once": 1, "hidden": 64,
    "intermediate": 64, "layers": 2, "topk": 16, "window": 8, "workers": 0, "samples": 1,
}  # fmt: skip


@pytest.fixture
def train(monkeypatch):
    """The command, on a few of Python's texts."""
    monkeypatch.syspath_prepend(str(TRAINING))
    from clsa import data, train

    texts = data.python_text(True)[:3]
    monkeypatch.setattr(data, "python_text", lambda validation, packages: texts)

    def call(*arguments):
        small = [f"--{name}={value}" for name, value in SMALL.items()]
        monkeypatch.setattr(sys, "argv", ["train.py", *small, *map(str, arguments)])
        train.main()

    return call


def test_a_training_with_breaks_is_the_training_without(train, tmp_path, capsys):
    train("--workdir", tmp_path / "whole", "--out", tmp_path)
    breaks = 0
    while breaks < 20:
        try:
            train("--workdir", tmp_path / "parts", "--stop-after", "1e-9")
            break
        except SystemExit:
            breaks += 1
    assert breaks == 8  # steps of all phases that are not the last of theirs
    for run in ("transformer-long", "yoco-long", "clsa-joint"):
        whole, parts = (
            torch.load(tmp_path / name / f"{run}.pt")["model"] for name in ("whole", "parts")
        )
        torch.testing.assert_close(whole, parts, rtol=0, atol=0)
    before = torch.load(tmp_path / "whole" / "yoco-dense.pt")["model"]
    index = torch.load(tmp_path / "whole" / "clsa-index.pt")["model"]
    assert all(torch.equal(index[name], value) for name, value in before.items())
    (written,) = tmp_path.glob("clsa-training-*.json")
    cases = [(row["case"], row["peer"]) for row in json.loads(written.read_text())["rows"]]
    assert len(cases) == len(set(cases)) == 8
    folder = tmp_path / "whole" / "model"
    tokenizer, model = (
        kind.from_pretrained(folder) for kind in (AutoTokenizer, AutoModelForCausalLM)
    )
    ids = tokenizer("Facts", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "Facts"
    assert model.generate(ids, max_new_tokens=3).shape[1] <= ids.shape[1] + 3


@pytest.mark.parametrize("run, shared", [("transformer", 0), ("yoco", 2), ("clsa", 2)])
def test_every_matrix_of_attention_and_mlp_is_trained_by_muon(phase, run, shared):
    made = phase(run, "dense", "--layers=4")
    names = {id(p): name for name, p in made.model.named_parameters()}
    muon, adam = (
        [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
        for optimizer in made.optimizers
    )
    assert len(muon) + len(adam) == len(names)
    assert all(name.endswith("_proj.weight") for name in muon)
    assert sum(".shared_kv." in name for name in muon) == shared
    # The indexer is trained alone at first, by Adam, and so it goes on.
    assert {name for name in adam if name.endswith("_proj.weight")} == {
        name for name in names.values() if ".indexer." in name and name.endswith("_proj.weight")
    }


def test_sources_of_packages_are_text_too(monkeypatch):
    monkeypatch.syspath_prepend(str(TRAINING))
    from clsa.data import python_text

    held_out, others = (
        (python_text(held, ("numpy",)), python_text(held)) for held in (True, False)
    )
    for more, plain in (held_out, others):
        assert len(more) > len(plain) and more[: len(plain)] == plain
    assert not {text for text in held_out[0] if text} & {
        text for text in others[0] if len(text) > 99
    }


def test_a_package_that_is_not_there_is_refused(train, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train("--workdir", tmp_path, "--packages", "tokenizers,no_such_package")
    assert stopped.value.code == 2
    assert "no package 'no_such_package' is installed" in capsys.readouterr().err


def test_pieces_of_a_task_are_those_of_the_tokenizer(train):
    from clsa import data

    tokenizer, rng = data.build_tokenizer(128), random.Random(0)
    rows = data.Rows(tokenizer.backend_tokenizer)
    for kind in ("chain", "needle"):
        text = "".join(data.document(rng, kind, 500))
        assert rows.encode(text) == tokenizer.encode(text)
        ids, targets, answers = rows.row(rng, 300, kind)
        assert torch.equal(answers, targets >= 0)
        assert targets[targets >= 0].tolist() == ids[1:][targets[:-1] >= 0].tolist() or (
            targets[-1] >= 0  # of the last place, the target is no token of the row
        )
    _, targets, answers = rows.row(rng, 300, "text")
    assert (targets >= 0).all() and not answers.any()


def test_two_thirds_of_the_documents_are_chains_and_a_sixth_text(train, monkeypatch):
    from clsa import data

    rows, kinds, document = (
        data.Rows(data.build_tokenizer(128).backend_tokenizer),
        [],
        data.document,
    )

    def noted(rng, kind, tokens):
        kinds.append(kind)
        return document(rng, kind, tokens)

    monkeypatch.setattr(data, "document", noted)
    made = [rows.row(random.Random(seed), 64, None) for seed in range(600)]
    # A row that begins with text counts its first tokens, one that begins with a task does not.
    assert sum(int(targets[0] >= 0) for _, targets, _ in made) / 600 == pytest.approx(
        1 / 6, abs=0.05
    )
    assert kinds.count("chain") / kinds.count("needle") == pytest.approx(4, rel=0.25)


@pytest.fixture
def phase(train, tmp_path, monkeypatch):
    """Makes a phase of a run, on weights of its own for the phase before."""
    from clsa import data
    from clsa import train as module

    rows = data.Rows(data.build_tokenizer(128).backend_tokenizer)

    def make(run, name, *arguments):
        small = [f"--{key}={value}" for key, value in SMALL.items()]
        command = ["train.py", *small, f"--workdir={tmp_path}", "--rows-at-once=2", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        args = module.parse()
        before = {"long": f"{run}-dense", "index": "yoco-dense", "joint": f"{run}-index"}.get(name)
        if before:
            torch.manual_seed(3)
            model = module.ClsaForCausalLM(module.make_config(args, before.split("-")[0]))
            torch.save({"model": model.state_dict()}, tmp_path / f"{before}.pt")
        return module.Phase(args, run, name, rows, float("inf"))

    make.module = module
    return make


def _gradients(made, batch):
    found = made.gradients(batch)
    return found, {n: p.grad for n, p in made.model.named_parameters() if p.grad is not None}


def test_a_token_of_an_answer_counts_as_often_as_it_is_told(phase, monkeypatch):
    from clsa import data

    monkeypatch.setattr(data, "MIX", (3, 1, 2))  # so that a batch has some of all
    made = phase("clsa", "joint", "--answer-weight=3", "--layers=4")
    ids, targets, answers = batch = next(made.batches)
    assert answers.any() and ((targets >= 0) & ~answers).any() and (targets < 0).any()
    found, grads = _gradients(made, batch)
    made.model.zero_grad()
    out = made.model(ids, use_cache=False, index_loss=True)
    loss = torch.nn.functional.cross_entropy(
        out.logits.flatten(0, 1), targets.flatten(), reduction="none"
    ).view_as(targets)
    weights = torch.where(answers, 3.0, 1.0) * (targets >= 0)
    ((loss * weights).sum() / weights.sum() + 0.1 * out.index_loss).backward()
    torch.testing.assert_close(grads, {n: p.grad for n, p in made.model.named_parameters()})
    right = (out.logits.argmax(-1) == targets)[answers]
    wanted = {
        "text": loss[(targets >= 0) & ~answers].mean(), "answers": loss[answers].mean(),
        "answer_accuracy": right.float().mean(), "index": out.index_loss,
    }  # fmt: skip
    torch.testing.assert_close(found, {name: x.detach() for name, x in wanted.items()})


# PyTorch hides this warning of its own compiler, but not from a filter that makes it an error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize(
    "run, name, kinds",
    [("transformer", "dense", 1), ("yoco", "long", 2), ("clsa", "index", 2), ("clsa", "joint", 2)],
)
def test_layers_of_a_kind_are_compiled_once_and_change_nothing(
    phase, monkeypatch, run, name, kinds
):
    from torch._dynamo.testing import CompileCounterWithBackend
    from torch._dynamo.utils import counters

    monkeypatch.setattr(attention, "BLOCK", 48)  # of 128 queries, so that there are several
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setitem(phase.module.COMPILE, "backend", counter)
    compiled, eager = (phase(run, name, "--layers=6", *more) for more in (["--compile"], []))
    counters.clear()
    names = list(eager.model.state_dict())
    for _ in range(2):
        batch = next(compiled.batches)
        torch.testing.assert_close(_gradients(compiled, batch), _gradients(eager, batch))
    assert counter.frame_count == kinds
    assert not counters["graph_break"]
    assert list(compiled.model.state_dict()) == names


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_phase_that_cannot_be_compiled_goes_on_without(phase, monkeypatch, capsys):
    def broken(graph, inputs):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setitem(phase.module.COMPILE, "backend", broken)
    compiled, eager = (phase("yoco", "long", *more) for more in (["--compile"], []))
    for made in (compiled, eager):
        made.train()
    torch.testing.assert_close(
        compiled.model.state_dict(), eager.model.state_dict(), rtol=0, atol=0
    )
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (told,) = [line for line in lines if line.get("compiled") is False]
    assert (
        told["run"] == "yoco" and told["phase"] == "long" and "no compiler at all" in told["reason"]
    )


def test_a_transformer_has_the_size_of_clsa(phase, monkeypatch):
    module = phase.module
    monkeypatch.setattr(sys, "argv", ["train.py", "--workdir=RUN", "--device=cpu"])
    for width in (832, 840):
        args = module.parse()
        args.intermediate = width
        configs = {mode: module.make_config(args, mode) for mode in ("clsa", "transformer")}
        assert configs["clsa"].intermediate_size == width

        def distance(change, configs=configs):
            dense = configs["transformer"].to_dict()
            dense["intermediate_size"] += change
            sizes = [
                sum(p.numel() for p in module.ClsaForCausalLM(config).parameters())
                for config in (configs["clsa"], module.ClsaConfig(**dense))
            ]
            assert 2 * sizes[0] <= 30e6  # bytes in bfloat16
            return abs(sizes[0] - sizes[1])

        assert configs["transformer"].intermediate_size % 8 == 0
        assert distance(0) < min(distance(-8), distance(8))
