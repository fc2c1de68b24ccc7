"""Training CLSA: all phases of all modes, a few steps of each, with breaks and without."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

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
    monkeypatch.setattr(data, "python_text", lambda validation: texts)

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
    assert len(cases) == len(set(cases)) == 6
    folder = tmp_path / "whole" / "model"
    tokenizer, model = (
        kind.from_pretrained(folder) for kind in (AutoTokenizer, AutoModelForCausalLM)
    )
    ids = tokenizer("Facts", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "Facts"
    assert model.generate(ids, max_new_tokens=3).shape[1] <= ids.shape[1] + 3


def test_pieces_of_a_task_are_those_of_the_tokenizer(train):
    import random

    from clsa import data

    tokenizer, rng = data.build_tokenizer(128), random.Random(0)
    rows = data.Rows(tokenizer.backend_tokenizer)
    for kind in ("chain", "needle"):
        text = "".join(data.document(rng, kind, 500))
        assert rows.encode(text) == tokenizer.encode(text)
        ids, targets = rows.row(rng, 300, kind)
        assert targets[targets >= 0].tolist() == ids[1:][targets[:-1] >= 0].tolist() or (
            targets[-1] >= 0  # of the last place, the target is no token of the row
        )
