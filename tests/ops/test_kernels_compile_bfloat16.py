"""The kernels compile for a GPU, also where there is none: queries of bfloat16, and the selection.

Each dtype has a file of its own, so that two workers can share them.
"""

from kernel_compiler import compiled_kernels
from ops_oracle import needs_triton


@needs_triton
def test_every_kernel_compiles_for_hopper(tmp_path):
    assert compiled_kernels("bfloat16", tmp_path) >= 24
