"""Layers of a KV cache that append in place: in the model's type, or in eight bits."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from deltadecode.engines.transformers.packing import Packing
from deltadecode.engines.transformers.rows import RowGroup
from deltadecode.errors import UnsupportedCacheError

# Tokens kept free behind the last one, so that a last page that is only partly filled lies inside
# the buffer and can be read without a copy: pages of up to 64 tokens, in practice all.
_SLACK = 64

# Up to here a layer concatenates: copying so few tokens costs less than the four more calls that
# appending in place takes. Measured on a CPU with 2 KV heads of 64: even at about 100 tokens.
_SHORT = 128


class DeltaLayer(DynamicLayer):
    """Keys and values of one full-attention layer, appended in place.

    Beyond 128 tokens, ``keys`` and ``values`` are views [B, Hkv, n, D] of the first n tokens of two
    larger buffers; a shorter cache is concatenated as the stock layer does it. At a decode step a
    full buffer grows by max(128, n / 128) tokens: one step in 128 can bear a copy, and next to no
    memory is spare. A prompt gets a buffer of its own size, so that prefill, where memory peaks,
    needs no more than concatenation.
    """

    # Set by the first states; None before, but nothing below reads them then.
    keys: Tensor
    values: Tensor
    _key_buffer: Tensor
    _value_buffer: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype, device, batch, heads and head size from the first states.

        Parameters
        ----------
        key_states, value_states : Tensor
            [B, Hkv, tokens, D]; the tokens are not stored yet.
        """
        self.dtype, self.device = key_states.dtype, key_states.device
        self._adopt(key_states[:, :, :0], value_states[:, :, :0])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append tokens and return everything stored.

        Parameters
        ----------
        key_states, value_states : Tensor
            [B, Hkv, new tokens, D].

        Returns
        -------
        tuple of Tensor
            Keys and values [B, Hkv, n, D], views of the buffers.
        """
        if key_states.dtype != value_states.dtype:
            key_states, value_states = one_dtype(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        # Plain numbers rather than tensor calls: this runs for each layer at each step, and with a
        # short context the model waits for Python.
        start = self.keys.shape[2]
        rows, _, added, _ = key_states.shape
        end = start + added
        if (
            self._room < end <= _SHORT
            # Autograd may hold the old tensors, a new dtype needs promotion, and a wrong number of
            # rows must fail: an in-place copy would do none of the three.
            or rows != self._rows
            or key_states.dtype != self.dtype
            or (key_states.requires_grad and torch.is_grad_enabled())
        ):
            self._adopt(
                torch.cat([self.keys, key_states], dim=2),
                torch.cat([self.values, value_states], dim=2),
            )
            self.dtype = self.keys.dtype
            return self.keys, self.values
        if end > self._room or self._frozen():
            self._grow(start, end)
        self.keys = _append(self._key_buffer, self._key_strides, key_states, start, end)
        self.values = _append(self._value_buffer, self._value_strides, value_states, start, end)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take row ``beam_idx[b]`` as row b, in place.

        Parameters
        ----------
        beam_idx : Tensor
            [B] integer row numbers.
        """
        if self.get_seq_length() == 0:
            return
        if beam_idx.numel() != self.keys.shape[0] or self._frozen():
            self.batch_select_indices(beam_idx)
            return
        rows = beam_idx.to(self.keys.device)
        self.keys.copy_(self.keys.index_select(0, rows))
        self.values.copy_(self.values.index_select(0, rows))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        if self.get_seq_length() > 0:
            self._adopt(
                self.keys.repeat_interleave(repeats, dim=0),
                self.values.repeat_interleave(repeats, dim=0),
            )

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows only.

        Parameters
        ----------
        indices : Tensor
            Row numbers, or a boolean [B].
        """
        if self.get_seq_length() > 0:
            rows = indices.to(self.keys.device)
            self._adopt(self.keys[rows], self.values[rows])

    def reset(self) -> None:
        """Forget all tokens and free the buffers."""
        super().reset()
        if hasattr(self, "_key_buffer"):
            del self._key_buffer, self._value_buffer

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if "_key_buffer" in state:  # copied in another mode, perhaps
            self._of_inference = self._key_buffer.is_inference()

    def _adopt(self, keys: Tensor, values: Tensor) -> None:
        self.keys = self._key_buffer = keys
        self.values = self._value_buffer = values
        self._rows = keys.shape[0]
        # No room behind them: the next update makes other tensors of them.
        self._room = 0
        self._of_inference = keys.is_inference()

    def _frozen(self) -> bool:
        # Tensors made in inference mode cannot be written to outside of it.
        return self._of_inference and not torch.is_inference_mode_enabled()

    def _grow(self, start: int, end: int) -> None:
        spare = max(128, end // 128) if end - start == 1 else 0
        self._room = -(-(end + spare) // 64) * 64
        # One after the other and the old one freed, so that at most one buffer exists twice.
        self._key_buffer = _moved(self.keys, self._room + _SLACK)
        self.keys = self._key_buffer.narrow(2, 0, start)
        self._value_buffer = _moved(self.values, self._room + _SLACK)
        self.values = self._value_buffer.narrow(2, 0, start)
        self._key_strides = self._key_buffer.stride()
        self._value_strides = self._value_buffer.stride()
        self._of_inference = self._key_buffer.is_inference()


class Reading:
    """What the layers of a cache share that attention reads where they are stored.

    ``paging`` says that the pass in progress is a decode step, which reads pages.
    """

    def __init__(self) -> None:
        self.paging = False


class StoredLayer(DeltaLayer):
    """Keys and values that are stored otherwise than models have them.

    At a decode step ``update`` gives nothing, and attention reads what it needs by :meth:`pages`.
    At any other pass ``update`` gives everything, made anew. With a packing, ``keys`` and
    ``values`` are [B, 1, n, bytes] int8.
    """

    # Of errors.
    kind = "an eight-bit"

    def __init__(self, reading: Reading, packing: Packing | None) -> None:
        super().__init__()
        self._reading, self.packing = reading, packing
        self._absent = False

    @property
    def apart(self) -> bool:
        """Whether decode steps get nothing from ``update``."""
        return self.packing is not None

    @property
    def in_place(self) -> bool:
        """Whether attention reads all tokens where they are, without a copy."""
        return self.packing is not None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype, device, batch, heads and head size from the first states."""
        if self.packing is not None and key_states.dtype != torch.int8:
            key_states, value_states = map(self.packing.pack, (key_states, value_states))
        super().lazy_initialization(key_states, value_states)

    # What a step stores, and where, is Python state, which a compiled graph would freeze.
    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append tokens and return everything stored.

        At a decode step nothing is made: what is returned has the shape of all states, holds NaN,
        and is never read.

        Parameters
        ----------
        key_states, value_states : Tensor
            [B, Hkv, new tokens, D].

        Returns
        -------
        tuple of Tensor
            Keys and values [B, Hkv, n, D] on the device.

        Raises
        ------
        UnsupportedCacheError
            For gradients.
        """
        if key_states.requires_grad and torch.is_grad_enabled():
            raise UnsupportedCacheError(
                f"{self.kind} cache holds no gradients; decode under torch.no_grad(), or use the "
                "default cache"
            )
        start, added = self.get_seq_length(), key_states.shape[2]
        self._heads = key_states.shape[1]
        stored = key_states, value_states
        if self.packing is not None:
            if key_states.dtype != value_states.dtype:
                key_states, value_states = one_dtype(key_states, value_states)
            stored = self.packing.pack_both(key_states, value_states)
        self._put(*stored)
        self._absent = self.apart and self._reading.paging and added == 1 and start > 0
        if self._absent:
            return _absent(key_states, start + 1), _absent(value_states, start + 1)
        if not self.apart:
            return self.keys, self.values
        if not start:
            return key_states, value_states
        keys, values = self.whole()
        if self.packing is not None:
            # New tokens attend to each other as they are.
            keys[:, :, start:], values[:, :, start:] = key_states, value_states
        return keys, values

    def check_states(self, module: nn.Module, key: Tensor) -> None:
        """Refuse a module that attends to other keys than the cache gave it.

        Raises
        ------
        UnsupportedCacheError
            Naming the module's class.
        """
        if key.shape[1] != self._heads or (self._absent and any(key.stride())):
            raise UnsupportedCacheError(
                f"{type(module).__name__} changes its keys behind the cache, got "
                f"{list(key.shape)} of {self._heads} KV heads, and cannot decode from "
                f"{self.kind} cache; use the default cache"
            )

    def whole(self) -> tuple[Tensor, Tensor]:
        """All keys and values [B, Hkv, n, D] on the device, made for one pass."""
        keys, values = self._loaded()
        if self.packing is None:
            return keys, values
        return self.packing.unpack(keys), self.packing.unpack(values)

    def pages(self, place: int, group: RowGroup, page_size: int, whole: bool) -> dict[str, Any]:
        """Inputs of :func:`deltadecode.ops.decode_attention` for a row group, but the query.

        ``place`` is its number in the step; ``whole`` says that it reads all pages.
        """
        return self._inputs(*group.paged(self.keys, self.values, page_size))

    def _put(self, key_states: Tensor, value_states: Tensor) -> None:
        """Append what is stored of new tokens."""
        super().update(key_states, value_states)

    def _loaded(self) -> tuple[Tensor, Tensor]:
        """What is stored, on the device."""
        return self.keys, self.values

    def _inputs(
        self, keys: Tensor, values: Tensor, block_table: Tensor, seq_lens: Tensor
    ) -> dict[str, Any]:
        inputs = {"block_table": block_table, "seq_lens": seq_lens}
        if self.packing is None:
            return {"k_cache": keys, "v_cache": values, **inputs}
        (keys, k_scales), (values, v_scales) = map(self.packing.parts, (keys, values))
        scales = {"k_scales": k_scales, "v_scales": v_scales}
        return {"k_cache": keys, "v_cache": values, **scales, **inputs}


def _absent(like: Tensor, tokens: int) -> Tensor:
    """So many tokens that nobody may read, in no memory."""
    rows, heads, _, dim = like.shape
    return _nan(like.dtype, like.device).expand(rows, heads, tokens, dim)


# One for all layers and steps: on a GPU it would take a launch each.
@functools.lru_cache(maxsize=64)
def _nan(dtype: torch.dtype, device: torch.device) -> Tensor:
    # No tensor of inference mode: those have no place in a graph of autograd later.
    with torch.inference_mode(mode=False):
        return torch.full((), float("nan"), dtype=dtype, device=device)


def one_dtype(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values in one dtype: that of autocast, which attention would take, or the wider."""
    device = keys.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.promote_types(keys.dtype, values.dtype)
    return keys.to(dtype), values.to(dtype)


def _moved(stored: Tensor, capacity: int) -> Tensor:
    rows, heads, tokens, dim = stored.shape
    buffer = stored.new_empty((rows, heads, capacity, dim))
    buffer[:, :, :tokens].copy_(stored)
    return buffer


def _append(
    buffer: Tensor, strides: tuple[int, ...], states: Tensor, start: int, end: int
) -> Tensor:
    # as_strided takes half the time of slicing.
    rows, heads, added, dim = states.shape
    buffer.as_strided((rows, heads, added, dim), strides, start * dim).copy_(states)
    return buffer.as_strided((rows, heads, end, dim), strides)
