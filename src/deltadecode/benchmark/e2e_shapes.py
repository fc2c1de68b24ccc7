"""Models of the end-to-end benchmark: shapes with random weights, or a model on disk."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

_QWEN = {
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
SHAPES: dict[str, dict[str, Any]] = {
    # DeepSeek-R1-Distill-Qwen-1.5B; its profile is found by these numbers.
    "r1-1.5b": {
        **_QWEN,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "rope_theta": 10000.0,
    },
    "qwen3-8b": {
        **_QWEN,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 1000000.0,
    },
    # Runs anywhere, to see that everything works.
    "tiny": {
        **_QWEN,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
        "rope_theta": 10000.0,
    },
}
_ENTRY_POINT = "deltadecode.integrations.vllm.plugin:register"


def write_shape(name: str, folder: Path) -> Path:
    """Write the configuration of a shape.

    Parameters
    ----------
    name : str
        One of ``SHAPES``.
    folder : Path
        Where its folder goes.

    Returns
    -------
    Path
        A model folder with nothing but ``config.json``.

    Raises
    ------
    ValueError
        Naming the shapes there are.
    """
    if name not in SHAPES:
        raise ValueError(f"no shape {name!r}; there are {', '.join(SHAPES)}")
    model = folder / name
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps(SHAPES[name], indent=2), encoding="utf-8")
    return model


def plugin_path(folder: Path) -> Path | None:
    """Let vLLM find the plugin where the package is on the path but not installed.

    Parameters
    ----------
    folder : Path
        Where to write what an installation would have written.

    Returns
    -------
    Path or None
        To put on the Python path of every process of vLLM; None when the plugin is found already.
    """
    from deltadecode import __version__

    entries = importlib.metadata.entry_points(group="vllm.general_plugins")
    if any(entry.value == _ENTRY_POINT for entry in entries):
        return None
    info = folder / "site" / f"deltadecode-{__version__}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: deltadecode\nVersion: {__version__}\n", encoding="utf-8"
    )
    (info / "entry_points.txt").write_text(
        f"[vllm.general_plugins]\ndeltadecode = {_ENTRY_POINT}\n", encoding="utf-8"
    )
    return info.parent
