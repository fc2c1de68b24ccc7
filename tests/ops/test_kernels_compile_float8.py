"""The kernels compile for a GPU, also where there is none: queries of float8."""

from kernel_compiler import compiled_kernels
from ops_oracle import needs_triton


@needs_triton
def test_every_kernel_of_a_plan_compiles_for_hopper(tmp_path):
    assert compiled_kernels("float8_e4m3fn", tmp_path) >= 6
