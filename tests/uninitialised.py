"""Fill what PyTorch allocates and does not write: a test that reads it fails, and does so always.

Fresh memory often holds zeros, so that a kernel which reads too far is right by luck.
"""

import functools
import math

import torch
from torch.utils._device import _device_constructors

# Not 0, 1 or -1, and no place in any tensor of a test.
INTEGER = 0x5A5A5A5A
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn)
INTEGERS = {torch.int16: 0x5A5A, torch.int32: INTEGER, torch.int64: INTEGER}


def fill(tensor):
    """Write NaN, or a large odd number, where it can be seen."""
    if tensor.device.type == "meta" or tensor.layout != torch.strided or tensor.is_quantized:
        return tensor
    value = math.nan if tensor.dtype in FLOATS else INTEGERS.get(tensor.dtype)
    if value is not None:
        with torch.no_grad():
            tensor.fill_(value)
    return tensor


def _filled(allocate):
    @functools.wraps(allocate)
    def poisoned(*args, **kwargs):
        return fill(allocate(*args, **kwargs))

    return poisoned


def poison():
    """Fill in all functions of PyTorch that allocate without writing; once for a process."""
    _device_constructors()  # remembers the functions that 'with torch.device' looks for
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        setattr(owner, name, _filled(getattr(owner, name)))
