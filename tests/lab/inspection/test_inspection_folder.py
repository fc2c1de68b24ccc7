"""The folder of a report: all files are new, or all are old."""

import signal
from pathlib import Path

import pytest

from deltadecode.lab.inspection.folder import FILES, _replace


@pytest.fixture
def folders(tmp_path):
    new, old = tmp_path / "new", tmp_path / "old"
    for folder, files in ((new, FILES), (old, FILES[:-1])):
        folder.mkdir()
        for name in files:
            (folder / name).write_text(folder.name)
    return new, old


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_all_files_are_replaced(folders):
    new, old = folders
    _replace(new, old)
    assert contents(old) == dict.fromkeys(FILES, "new")
    assert contents(new) == {}


@pytest.mark.parametrize("moves", range(2 * len(FILES) - 1))
def test_when_a_file_cannot_be_moved_all_old_ones_stay(folders, monkeypatch, moves):
    new, old = folders
    replace, left = Path.replace, [moves]

    def fail_once(self, target):
        left[0] -= 1
        if left[0] == -1:
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail_once)
    with pytest.raises(OSError, match="No space left"):
        _replace(new, old)
    assert contents(old) == dict.fromkeys(FILES[:-1], "old")


def test_an_interrupt_waits_until_all_files_are_replaced(folders, monkeypatch):
    new, old = folders
    replace = Path.replace

    def interrupted(self, target):
        signal.raise_signal(signal.SIGINT)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _replace(new, old)
    assert contents(old) == dict.fromkeys(FILES, "new")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
