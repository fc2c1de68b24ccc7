"""Compile and launch kernels on a device that is none: a process of its own, without interpreter.

Triton compiles for Hopper, and what it would hand to the driver is written down. Prints JSON: the
kernels compiled ahead, those compiled afterwards, and the launches of three equal steps with
queries at an aligned address, and at an odd one.
"""

import json
import sys

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from deltadecode import DeltaConfig
from deltadecode.ops import DecodeInputs, Scratch, plan_decode
from deltadecode.ops import triton as kernels
from deltadecode.ops.triton import decode, plans

CONFIG = DeltaConfig(8, 96, 16, 1, (), (0,))
HEADS, KV_HEADS, DIM, BLOCK, BLOCKS = 9, 3, 64, 16, 512
launched, compiled = [], []


class Utils:
    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}

    def load_binary(self, name, kernel, shared, device):
        return 1, f"code of {name}", 64, 0, 1024  # registers, spills and most threads


class Launcher:
    def __init__(self, source, metadata):
        self.name, self.types = source.fn.__name__, tuple(source.signature.values())

    def __call__(self, x, y, z, stream, function, metadata, watched, enter, leave, *args):
        assert len(args) == len(self.types)
        given = []
        for kind, value in zip(self.types, args, strict=True):
            if kind[0] == "*":
                value = value if isinstance(value, int) else value.data_ptr()
                # The selection writes into new memory every time.
                value = "*" if self.name == "select" else value
            elif kind != "constexpr":
                assert isinstance(value, float if kind == "fp32" else int), (kind, value)
            else:
                value = str(value)
            given.append(value)
        ordinary = enter is not None
        launched.append([self.name, ordinary, [[x, y, z], stream, function, given]])


class Device:
    utils, launcher_cls = Utils(), Launcher

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 77

    def map_python_to_cpp_type(self, kind):
        return kind


def step(rows, offset=0):
    """Inputs of a Δ-layer and a sparse one, and what they share."""
    qkv = torch.zeros(rows * 960 + offset, dtype=torch.bfloat16)[offset:].view(rows, 15, DIM)
    k, v = torch.zeros(4, 2, BLOCK, KV_HEADS, DIM, dtype=torch.bfloat16).unbind(1)
    table = torch.zeros(rows, BLOCKS, dtype=torch.int32)
    lens = torch.zeros(rows, dtype=torch.int32)
    ids = torch.zeros(rows, CONFIG.table_width(BLOCKS * BLOCK // 8), dtype=torch.int32)
    shared = qkv[:, :HEADS], k, v, table, lens, 0.125, 8
    delta = DecodeInputs(*shared, return_page_scores=True)
    return (delta, CONFIG), (DecodeInputs(*shared, ids, lens), None)


def run(layers, out, scratch):
    for inputs, cfg in layers:
        plan_decode(inputs, cfg).run(
            inputs.q, inputs.k_cache, inputs.v_cache, inputs.block_table, inputs.seq_lens, None,
            out, scratch, inputs.page_ids, inputs.page_counts,
        )  # fmt: skip


def main(most):
    driver.set_active(Device())
    knobs.runtime.jit_post_compile_hook = lambda **event: compiled.append(event["fn"].name)
    plans._operand = lambda kind: triton.language.bfloat16
    kernels.unsupported = lambda *tensors: None
    torch.cuda.is_current_stream_capturing = lambda: False
    for inputs, cfg in step(1):
        decode.compile_ahead(plans.attention_kind(inputs), cfg, most)
    # Of 1 to ``most`` rows in so many layers: few such rows go in pieces, more of them do not.
    width = 4800
    many = [rows * layers for rows in range(1, most + 1) for layers in (5, 40)]
    kernels.compile_selections(CONFIG, many, width)
    ahead = list(compiled)
    compiled.clear()
    for rows in many:
        lens = torch.zeros(rows, dtype=torch.int32)
        kernels.select_pages(torch.zeros(rows, width), lens, CONFIG)
    for rows in range(1, most + 1):
        run(step(rows), torch.empty(rows, HEADS, DIM, dtype=torch.bfloat16), Scratch())
    later = list(compiled)
    launched.clear()
    # Not of its own: the ordinary launch of a plan that has launched nothing yet.
    plans.attention_plan.cache_clear()
    plans.selection_plan.cache_clear()
    for layers in (step(most), step(most, offset=1)):
        out, scratch = torch.empty(most, HEADS, DIM, dtype=torch.bfloat16), Scratch()
        for _ in range(3):
            run(layers, out, scratch)
    print(json.dumps({"ahead": ahead, "later": later, "launched": launched}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
