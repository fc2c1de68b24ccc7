"""CLSA, "You Only Index Once" (arXiv 2606.06467): one KV cache and one index for half the layers.

docs/clsa.md has the equations, and what the paper leaves open. ``import deltadecode`` makes the
model type ``"clsa"`` known to ``AutoConfig``, ``AutoModel`` and ``AutoModelForCausalLM``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from deltadecode.models.clsa.configuration import ClsaConfig

if TYPE_CHECKING:
    from deltadecode.models.clsa.cache import ClsaCache
    from deltadecode.models.clsa.modeling import ClsaForCausalLM, ClsaModel
    from deltadecode.models.clsa.static import ClsaStaticCache

__all__ = ["ClsaCache", "ClsaConfig", "ClsaForCausalLM", "ClsaModel", "ClsaStaticCache"]

_LAZY = {
    "ClsaCache": "cache",
    "ClsaForCausalLM": "modeling",
    "ClsaModel": "modeling",
    "ClsaStaticCache": "static",
}


def __getattr__(name: str) -> Any:
    # The configuration alone needs no model class, whose import takes seconds.
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
