"""The benchmark of calibration on a tiny model: plans, texts that nobody saw, and the rows."""

import json
import random

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.calibration import run as calibration
from benchmarks.report import write
from deltadecode import DeltaConfig
from deltadecode.lab.calibration.texts import cut
from deltadecode.lab.tasks import model_path
from deltadecode.lab.tasks.text import Text

OWN = DeltaConfig(page_size=4, budget_pages=8, recent_pages=2, sink_pages=1,
                  dense_layers=(0, 1), delta_layers=(2, 5))  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=9,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.4, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "sums.txt"
    path.write_text("piki leads to meve and adds 3 : 2 + 2 = 4 so tofu holds 4\n" * 200)
    return path


@pytest.fixture(scope="module")
def found(folder, text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeltaConfig, "for_model", classmethod(lambda cls, model: OWN))
        task = calibration.Task(
            str(folder), None, [text], 100, 6, 2, 0.7, 0.05, 5, "cpu"
        )  # fmt: skip
        return calibration.run("again", task, lambda *arguments: None)


def test_rows_compare_every_plan_on_every_text(found):
    texts = ("stdlib-docs", "stdlib-code", "sums")
    peers = {"default", "default, equal reads", "every layer for itself"}
    assert {(row["case"], row["peer"]) for row in found["rows"]} == {
        (text, peer) for text in texts for peer in peers
    }
    for peer in peers:
        theirs = [row["theirs"] for row in found["rows"] if row["peer"] == peer]
        assert found["means"][peer]["kl"] == pytest.approx(sum(theirs) / 3, rel=1e-3)
    ours = [row["ours"] for row in found["rows"] if row["peer"] == "default"]
    assert found["means"]["calibrated"]["kl"] == pytest.approx(sum(ours) / 3, rel=1e-3)
    assert len(found["random"]) == 5
    assert found["means"]["calibrated"]["attended_fraction"] <= 0.7
    assert found["calibration"]["plans"]["calibrated"]["delta_layers"]
    assert found["seconds"] > 0 and found["peak_mib"] > 0


def test_a_plan_from_a_file_and_a_result_on_disk(found, folder, text, tmp_path):
    plan = tmp_path / "plan.json"
    OWN.save(plan)
    task = calibration.Task(str(folder), plan, [], 60, 4, 1, 0.0, 0.0, 0, "cpu")
    again = calibration.run("again", task, lambda *arguments: None)
    assert again["plan"] == OWN.to_dict() and "seconds" not in again
    write(found, tmp_path, "x", lambda line: None)
    (file,) = tmp_path.glob("calibration-*-x.json")
    assert json.loads(file.read_text())["means"] == found["means"]


def test_pieces_are_none_that_a_calibration_takes(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    file = tmp_path / "digits"
    file.write_text(" ".join(random.Random(0).choices("0123456789", k=2000)))
    text = Text(file=str(file), context=50, tokens=9)
    seen = {tuple(piece.ids) for piece in cut(tokenizer, [text], calibration._TEXTS)}
    unseen = {tuple(ids) for ids in calibration.unseen_pieces(tokenizer, text, 3)}
    assert len(seen) == calibration._TEXTS and len(unseen) == 3 and not seen & unseen
