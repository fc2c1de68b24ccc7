"""Data files, their mistakes, and where the generation of a text starts."""

import json

import pytest
from calibration_cases import tiny_model
from transformers import AutoTokenizer

from deltadecode.errors import CalibrationError
from deltadecode.lab.calibration.texts import make_prompts, read_texts, task_texts
from deltadecode.lab.tasks import model_path
from deltadecode.lab.tasks.registry import make_task


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


def test_texts_start_at_places_spread_over_their_references(tokenizer):
    model = tiny_model(max_position_embeddings=600, vocab_size=len(tokenizer))
    texts = task_texts(make_task("chain:steps=12:distractors=2"), tokenizer, 4)
    prompts = make_prompts(model, tokenizer, texts, 20)
    lengths = []
    for text, prompt in zip(texts, prompts, strict=True):
        plain = tokenizer(text.prompt).input_ids
        whole = [*plain, *tokenizer(text.reference).input_ids]
        assert prompt.ids == whole[: len(prompt.ids)]
        lengths.append(len(prompt.ids) - len(plain))
    room = len(whole) + 1 - len(plain) - 20  # the end token is part of a reference
    assert lengths == [0, room // 3, 2 * room // 3, room]
    assert [each.number for each in prompts] == [0, 1, 2, 3]


def test_a_text_that_does_not_fit_is_refused(tokenizer):
    model = tiny_model(max_position_embeddings=64)
    texts = task_texts(make_task("chain:steps=12:distractors=2"), tokenizer, 2)
    with pytest.raises(CalibrationError, match=r"text 1 needs .* tokens .* has 64 positions"):
        make_prompts(model, tokenizer, texts, 20)
