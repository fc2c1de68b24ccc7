"""Variables of the environment that a run gives to both of its sides."""

from collections.abc import Sequence

from benchmarks import multicast

OPTION_HELP = (
    "NAME=VALUE in the environment of both sides, such as VLLM_USE_V2_MODEL_RUNNER=1; repeatable."
)
# Given otherwise, sides would not run what they are said to run.
_TAKEN = {
    *multicast.ENVIRONMENT, "CUDA_VISIBLE_DEVICES", "PYTHONPATH", "TRITON_INTERPRET",
    "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL", "VLLM_PLUGINS",
}  # fmt: skip


def parse_variables(texts: Sequence[str]) -> dict[str, str]:
    """Read texts such as ``NAME=1``; a ValueError for others, and for what a benchmark sets."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--env must be NAME=VALUE, got {text!r}")
        if name in _TAKEN:
            raise ValueError(f"--env must leave {name} to the benchmark and its caller")
        if found.setdefault(name, value) != value:
            raise ValueError(f"--env gives {name} twice, as {found[name]!r} and as {value!r}")
    return found
