"""Prompts of models whose last layers reuse the keys and values of earlier ones (Gemma 4)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from deltadecode.architecture import text_config


@contextmanager
def whole_prompt(model: Any) -> Iterator[None]:
    """While it lasts, every layer of ``model.generate`` sees every token of a prompt.

    Transformers runs layers without keys of their own only for the tokens whose logits are asked
    for by number, and ``generate`` asks for the last one. A tensor of places asks for the same
    logits, and no layer leaves a token out.
    """

    def ask_by_place(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if kwargs.get("logits_to_keep") == 1:
            kwargs = {**kwargs, "logits_to_keep": torch.tensor([-1], device=module.device)}
        return args, kwargs

    if not getattr(text_config(model), "num_kv_shared_layers", 0):
        yield
        return
    handle = model.register_forward_pre_hook(ask_by_place, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
