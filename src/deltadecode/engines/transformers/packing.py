"""Keys and values in eight bits, each token of a KV head with a scale of its own.

What a token has of all heads is one run of bytes: the numbers of every head, then the heads'
scales, up to a multiple of 16. So caches move tokens without knowing what they hold, and kernels
read them where they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltadecode.config import KV_DTYPES
from deltadecode.errors import ArgumentError
from deltadecode.ops import kernels_refuse

# The type of the numbers, and the largest that a token's largest becomes.
_NUMBERS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
# Two bytes with the range of float32. Numbers are rounded by the scale as it is stored, so that its
# own rounding costs no accuracy.
_SCALE = torch.bfloat16
_ALIGNED = 16
# Numbers that are made float32 at a time.
_AT_ONCE = 1 << 24


def check_kv_dtype(kv_dtype: str | None) -> None:
    """Refuse an unknown type.

    Raises
    ------
    ArgumentError
        Naming it.
    """
    if kv_dtype is not None and kv_dtype not in KV_DTYPES:
        names = ", ".join(map(repr, KV_DTYPES))
        raise ArgumentError(f"kv_dtype must be {names} or None, got {kv_dtype!r}")


def packed_bytes(heads: int, dim: int) -> int:
    """Bytes of a token's keys, and as many of its values."""
    return -(-(_scales_at(heads, dim) + heads * _SCALE.itemsize) // _ALIGNED) * _ALIGNED


def _scales_at(heads: int, dim: int) -> int:
    return -(-heads * dim // _SCALE.itemsize) * _SCALE.itemsize


class Packing:
    """How the keys and values of one layer are stored.

    Parameters
    ----------
    kv_dtype : str
        ``"int8"`` or ``"fp8"`` (e4m3).
    """

    def __init__(self, kv_dtype: str) -> None:
        self._number, self._most = _NUMBERS[kv_dtype]
        # Of the states, once there are any.
        self._heads, self._dim, self._dtype = 0, 0, torch.float32

    def pack(self, states: Tensor) -> Tensor:
        """States [B, Hkv, T, D] as [B, 1, T, bytes] int8."""
        rows, self._heads, tokens, self._dim = states.shape
        self._dtype = states.dtype
        packed = torch.zeros(
            (rows, 1, tokens, packed_bytes(self._heads, self._dim)),
            dtype=torch.int8, device=states.device,
        )  # fmt: skip
        numbers, scales = self.parts(packed.transpose(1, 2))
        least = torch.finfo(_SCALE).tiny
        for piece in self._pieces(rows, tokens):
            part = states[:, :, piece].transpose(1, 2).float()
            scale = (part.abs().amax(dim=-1) / self._most).clamp(min=least).to(_SCALE)
            part = part / scale[..., None].float()
            numbers[:, piece] = part.round() if self._number == torch.int8 else part
            scales[:, piece] = scale
        return packed

    def pack_both(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`pack` of keys and of values, by one kernel for the new token of a step."""
        _, heads, tokens, dim = key_states.shape
        alike = key_states.shape == value_states.shape
        one = tokens == 1 and alike and key_states.is_cuda and self._number == torch.int8
        if not one or kernels_refuse(key_states[:, :, 0]) is not None:
            return self.pack(key_states), self.pack(value_states)
        from deltadecode.engines.transformers.packing_kernel import pack_token

        self._heads, self._dim, self._dtype = heads, dim, key_states.dtype
        at = _scales_at(heads, dim)
        packed = pack_token(key_states, value_states, packed_bytes(heads, dim), at)
        return packed[0], packed[1]

    def unpack(self, packed: Tensor) -> Tensor:
        """What :meth:`pack` made, as states [B, Hkv, T, D] of the type that they had."""
        rows, _, tokens, _ = packed.shape
        numbers, scales = self.parts(packed.transpose(1, 2))
        states = torch.empty(
            (rows, self._heads, tokens, self._dim), dtype=self._dtype, device=packed.device
        )
        for piece in self._pieces(rows, tokens):
            part = numbers[:, piece].float() * scales[:, piece, :, None].float()
            states[:, :, piece] = part.transpose(1, 2)
        return states

    def parts(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers [N, T, Hkv, D] and scales [N, T, Hkv] of blocks [N, T, 1, bytes], as views."""
        of_token = blocks[:, :, 0]
        count, first = self._heads * self._dim, _scales_at(self._heads, self._dim)
        numbers = of_token[..., :count].view(self._number).unflatten(2, (self._heads, self._dim))
        scales = of_token[..., first : first + self._heads * _SCALE.itemsize].view(_SCALE)
        return numbers, scales

    def _pieces(self, rows: int, tokens: int) -> list[slice]:
        size = max(1, _AT_ONCE // max(1, rows * self._heads * self._dim))
        return [slice(first, first + size) for first in range(0, tokens, size)]
