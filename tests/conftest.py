"""Every test starts from the same seed, on one thread, and never asks a model hub for anything.

Memory that nobody has written holds NaN in all of them: see ``uninitialised``.
"""

import functools
import importlib.util
import os
import random
import signal
import warnings

# Read when the libraries are imported, so before any of them is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Kernels then run on CPU tensors; read when they are defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import fast_interpreter
import uninitialised
from transformers import Qwen2Config

torch.set_num_threads(1)
# A shell that starts the tests in the background has them ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
uninitialised.poison()
fast_interpreter.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put first what compiles for minutes: a worker that begins with it late ends alone."""
    items.sort(key=lambda item: "compile" not in item.path.name)


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_shape() -> Qwen2Config:
    """A model that takes milliseconds, deep enough for the plan of the CPU benchmark."""
    return Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=20,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )


@pytest.fixture
def outcome(capfd):
    """Call a command in this process: exit code, stdout and stderr."""

    def call(command, *arguments):
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            command([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return ended.value.code, out, err

    return call


@pytest.fixture
def run(outcome):
    """Run ``deltadecode`` with arguments; a test file may put its own command in this place."""
    from deltadecode.cli import main

    return functools.partial(outcome, main)


@pytest.fixture
def refused(run):
    """Run the command, and check that it refuses with exit code 2 and one line."""

    def call(*arguments):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("deltadecode: error: ")
        assert err.count("\n") == 1 and err.endswith("\n")
        return err

    return call


@pytest.fixture(scope="session")
def smollm2(request):
    """Folder of SmolLM2, unpacked once for this clone; skips where its package is not installed."""
    from deltadecode.lab.checkpoints import CACHE_VARIABLE
    from deltadecode.lab.smollm2 import PACKAGES, SMOLLM2

    for module in PACKAGES:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv(CACHE_VARIABLE, str(request.config.cache.mkdir("deltadecode")))
        return SMOLLM2.folder()


@pytest.fixture
def named_smollm2(smollm2, monkeypatch):
    """The name ``smollm2`` stands for that folder in this process."""
    from deltadecode.lab.checkpoints import CACHE_VARIABLE

    monkeypatch.setenv(CACHE_VARIABLE, str(smollm2.parent))
    return smollm2
