"""Training-free sparse attention for decoding, inside the engines that people already run.

DELTA (arXiv 2510.09883): a few layers attend to the whole KV cache and select the pages that
matter now; the layers after them read only those. ``import deltadecode`` makes the attention
implementation ``"delta"`` known to Transformers; nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from deltadecode.config import DeltaConfig, LayerPlan
from deltadecode.engines.on_import import on_import
from deltadecode.errors import (
    ArgumentError,
    DeltaConfigError,
    DeltaDecodeError,
    UnsupportedCacheError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from deltadecode import ops
    from deltadecode.engines.transformers import (
        DecodeStats,
        DeltaCache,
        DeltaOffloadedCache,
        DeltaStaticCache,
        disable,
        enable,
        stats,
    )

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "DecodeStats",
    "DeltaCache",
    "DeltaConfig",
    "DeltaConfigError",
    "DeltaDecodeError",
    "DeltaOffloadedCache",
    "DeltaStaticCache",
    "LayerPlan",
    "UnsupportedCacheError",
    "UnsupportedModelError",
    "__version__",
    "disable",
    "enable",
    "ops",
    "stats",
]

_TRANSFORMERS = "deltadecode.engines.transformers"
_LAZY = frozenset(
    {
        "DecodeStats",
        "DeltaCache",
        "DeltaOffloadedCache",
        "DeltaStaticCache",
        "disable",
        "enable",
        "stats",
    }
)


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("deltadecode.ops")
    if name in _LAZY:
        return getattr(importlib.import_module(_TRANSFORMERS), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | _LAZY | {"ops"})


def _register() -> None:
    importlib.import_module(_TRANSFORMERS)


def _register_config() -> None:
    from transformers import AutoConfig

    from deltadecode.models.clsa import ClsaConfig

    AutoConfig.register(ClsaConfig.model_type, ClsaConfig, exist_ok=True)


def _register_models() -> None:
    # Registers its classes at its end; it may be what is being imported.
    importlib.import_module("deltadecode.models.clsa.modeling")


# Transformers takes seconds to import, and no model exists before its base class does.
on_import("transformers.modeling_utils", _register)
# Architectures of our own are known wherever a model is loaded by its folder.
on_import("transformers.models.auto.configuration_auto", _register_config)
on_import("transformers.models.auto.modeling_auto", _register_models)
