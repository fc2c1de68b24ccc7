"""The mask function that Transformers knows as ``"delta"``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import sdpa_mask


def delta_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    *,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The boolean mask [B, 1, Q, T] of ``sdpa``, or None where :func:`full_attention` needs none.

    ``sdpa`` has no mask for a whole prompt without padding. This function has none for the last
    tokens of one, either: the chunks of a long prompt, on a GPU and in half precision. There the
    mask is gigabytes, and hides the flash kernel from PyTorch. Arguments are those of Transformers'
    mask functions: ``attention_mask`` [B, tokens], ``local_size`` the tokens of a window.
    """
    last = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    if (
        last
        and q_length > 1
        and kv_offset == 0
        and allow_is_causal_skip
        and _on_gpu(device)
        and dtype in (torch.float16, torch.bfloat16)
        and (local_size is None or kv_length < local_size)
        and not torch.compiler.is_compiling()
        and (attention_mask is None or bool(attention_mask[:, :kv_length].all()))
    ):
        return None
    mask: Tensor | None = sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=attention_mask,
        local_size=local_size, allow_is_causal_skip=allow_is_causal_skip, dtype=dtype,
        device=device, **kwargs,
    )  # fmt: skip
    return mask


def _on_gpu(device: torch.device | str) -> bool:
    return torch.device(device).type == "cuda"
