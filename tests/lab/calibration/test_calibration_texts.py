"""Data files, their mistakes, and where the rows of a text begin."""

import json
import random

import pytest
import torch
from calibration_cases import tiny_model
from transformers import AutoTokenizer

from deltadecode.errors import CalibrationError, EvaluationError
from deltadecode.lab.calibration.texts import (
    FIRST_SEED,
    cut,
    make_pieces,
    read_texts,
    task_texts,
)
from deltadecode.lab.tasks import model_path
from deltadecode.lab.tasks.registry import make_task
from deltadecode.lab.tasks.sample import Sample, no_verdict
from deltadecode.lab.tasks.text import Text


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path())


def test_a_file_is_read_line_by_line(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [{"prompt": "a", "id": 3}, {"prompt": "b", "completion": "c"}, {"prompt": "d"}]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    found = read_texts(path)
    assert [(each.prompt, each.reference) for each in found] == [("a", ""), ("b", "c"), ("d", "")]
    assert len(read_texts(path, 2)) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; it must hold one JSON object a line"),
        (b"\n \n", "is empty"),
        (b'{"prompt": "a"}\nhello\n', "line 2 of the data .* is not JSON"),
        (b'{"prompt": "a"}\n["a"]\n', "line 2 of the data .* is no object"),
        (b'{"text": "a"}\n', "line 1 of the data .* has no prompt"),
        (b'{"prompt": ""}\n', "line 1 of the data .* has no prompt"),
        (b'{"prompt": "a", "completion": 3}\n', "line 1 .* a completion that is no text"),
        (b"\xff\xfe\x00", "is not text in UTF-8"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, content, message):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as refused:
        read_texts(path)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(CalibrationError, match=r"cannot read the data .*No such file"):
        read_texts(tmp_path / "none.jsonl")
    with pytest.raises(CalibrationError, match=r"cannot read the data .*directory"):
        read_texts(tmp_path)


def test_rows_begin_at_places_spread_over_the_references(tokenizer):
    model = tiny_model(max_position_embeddings=600, vocab_size=len(tokenizer))
    texts = task_texts(make_task("chain:steps=12:distractors=2"), tokenizer, 4)
    starts = []
    for text, piece in zip(texts, make_pieces(model, tokenizer, texts, 20), strict=True):
        plain = tokenizer(text.prompt).input_ids
        whole = [*plain, *tokenizer(text.reference).input_ids, tokenizer.eos_token_id]
        assert piece.ids == whole[: piece.context + 21] and piece.rows == 20
        starts.append(piece.context - len(plain))
    room = len(whole) - len(plain) - 21
    assert starts == [0, room // 3, 2 * room // 3, room]


def test_a_short_reference_has_fewer_rows_and_none_is_continued_by_the_model(tokenizer):
    model = tiny_model(max_position_embeddings=600, vocab_size=len(tokenizer))
    prompt = "piki leads to meve and adds 3 : 2 + 2 = 4"
    texts = [Sample(0, prompt, "so tofu holds 4", 0, no_verdict),
             Sample(1, prompt, "", 0, no_verdict)]  # fmt: skip
    short, own = make_pieces(model, tokenizer, texts, 20)
    assert short.rows == len(tokenizer(texts[0].reference).input_ids)  # its end is a target
    assert own.rows == 20
    ids = torch.tensor([own.ids])
    with torch.no_grad():
        best = model(ids).logits[0].argmax(dim=1).tolist()
    assert own.ids[own.context :] == best[own.context - 1 : -1]


def test_pieces_of_long_texts_take_turns_and_do_not_meet(tokenizer, tmp_path):
    texts = []
    for digit in (1, 3):
        file = tmp_path / str(digit)
        file.write_text(" ".join(random.Random(digit).choices("0123456789", k=2000)))
        texts.append(Text(file=str(file), context=50, tokens=9))
    pieces = cut(tokenizer, texts, 5)
    assert [piece.context for piece in pieces] == [50] * 5
    assert [piece.rows for piece in pieces] == [9] * 5
    every = texts[1].pieces(tokenizer, range(FIRST_SEED, FIRST_SEED + 3))
    assert [piece.ids for piece in pieces[1::2]] == every[:2]
    assert len({tuple(piece.ids) for piece in pieces}) == 5
    with pytest.raises(EvaluationError, match="tokens, and context"):
        cut(tokenizer, [Text(file=str(file), context=9000, tokens=9)], 2)


def test_a_text_that_does_not_fit_is_refused(tokenizer):
    model = tiny_model(max_position_embeddings=64)
    texts = task_texts(make_task("chain:steps=12:distractors=2"), tokenizer, 2)
    with pytest.raises(CalibrationError, match=r"text 1 has .* tokens .* has 64 positions"):
        make_pieces(model, tokenizer, texts, 20)
    with pytest.raises(CalibrationError, match=r"at least 2 tokens behind its prompt, got 1"):
        make_pieces(tiny_model(vocab_size=len(tokenizer)), tokenizer,
                    [Sample(0, "piki", "", 0, no_verdict)], 0)  # fmt: skip
