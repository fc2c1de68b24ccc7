"""The operations of a decode step: one contract each, several backends.

Backends: ``reference`` is the definition; ``torch`` is fast PyTorch, tuned on CPUs; ``triton``
has the GPU kernels. The first two run on any device. ``backend="auto"`` takes ``triton`` on CUDA
where it supports the tensors, else ``torch``. All follow the rules R1..R10 of docs/semantics.md,
those of arXiv 2510.09883.
"""

# Nothing but names from below: the submodule ``torch`` hides PyTorch in this namespace.
from deltadecode.ops.dispatch import compile_selections, kernels_refuse, plan_decode
from deltadecode.ops.inputs import DecodeInputs
from deltadecode.ops.memory import Pointer, Scratch, is_captured
from deltadecode.ops.operations import decode_attention, index_scores, select_pages

__all__ = [
    "DecodeInputs",
    "Pointer",
    "Scratch",
    "compile_selections",
    "decode_attention",
    "index_scores",
    "is_captured",
    "kernels_refuse",
    "plan_decode",
    "select_pages",
]
