"""DELTA in Hugging Face Transformers: ``attn_implementation="delta"``.

Importing this package registers the attention and mask functions under that name, and lets a
model that is set to it, by ``from_pretrained`` or later, be prepared for decoding.
"""

from __future__ import annotations

import functools
from typing import Any

from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

from deltadecode.engines.transformers.attention import delta_attention
from deltadecode.engines.transformers.bind import await_first_use
from deltadecode.engines.transformers.cache import DeltaCache
from deltadecode.engines.transformers.generation import wrap_generation
from deltadecode.engines.transformers.masks import delta_mask
from deltadecode.engines.transformers.model import disable, enable, stats
from deltadecode.engines.transformers.offload import DeltaOffloadedCache
from deltadecode.engines.transformers.state import NAME
from deltadecode.engines.transformers.static_cache import DeltaStaticCache
from deltadecode.engines.transformers.stats import DecodeStats, LayerStats

__all__ = [
    "DecodeStats",
    "DeltaCache",
    "DeltaOffloadedCache",
    "DeltaStaticCache",
    "LayerStats",
    "disable",
    "enable",
    "stats",
]


def _register() -> None:
    AttentionInterface.register(NAME, delta_attention)
    AttentionMaskInterface.register(NAME, delta_mask)
    wrap_generation()
    stock = PreTrainedModel.get_correct_attn_implementation

    # Every model asks here, at its construction and whenever its implementation is set, whether
    # it may use an implementation: the one place that sees the model and the name together.
    @functools.wraps(stock)
    def get_correct_attn_implementation(
        self: PreTrainedModel, requested_attention: str | None, is_init_check: bool = False
    ) -> Any:
        implementation = stock(self, requested_attention, is_init_check)
        if requested_attention == NAME:
            await_first_use(self)
        return implementation

    PreTrainedModel.get_correct_attn_implementation = get_correct_attn_implementation  # type: ignore[method-assign]


_register()
