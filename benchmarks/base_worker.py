"""One side of a comparison of commits: ``python -m benchmarks.base_worker``.

Of ``deltadecode`` it uses only public names, which every commit has.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import deltadecode
from benchmarks.kernels.cases import CFG, Shape, moved_bytes
from benchmarks.kernels.inputs import make_inputs, our_calls
from benchmarks.kernels.timing import Call, GraphTimer, Runner
from benchmarks.processes import ROOT, serve_process
from deltadecode import ops

_STEPS = 5  # of each model in a round
_CALLS = 30  # of each operation in a round, launched one by one
Timed = dict[str, Callable[[], float]]


def steps(config: dict[str, Any], dtype: str, context: int) -> Timed:
    """Milliseconds of a decode step on the CPU: stock attention, K ≥ N and DELTA."""
    from transformers import DynamicCache, Qwen2Config

    # Ours, whatever commit is timed: both sides get the same weights and caches.
    sys.path.append(str(ROOT / "src" / "deltadecode" / "lab"))
    own: Any = import_module("steptime")
    shape, cast = Qwen2Config.from_dict(config), getattr(torch, dtype)
    weights = own.random_model(shape, cast)

    def timed(plan: deltadecode.DeltaConfig | None) -> Callable[[], float]:
        model = own.random_model(shape, cast, like=weights)
        cache = DynamicCache(config=model.config)
        if plan is not None:
            deltadecode.enable(model, plan)
            cache = deltadecode.DeltaCache(model.config)
        own.fill_cache(cache, shape, context, cast)
        own.decode_step(model, cache)
        return lambda: 1e3 * sum(own.timed_step(model, cache) for _ in range(_STEPS)) / _STEPS

    covers = replace(own.PLAN, budget_pages=context // own.PLAN.page_size + 64)
    return {"stock": timed(None), "K ≥ N": timed(covers), "DELTA": timed(own.PLAN)}


def calls(heads: int, kv_heads: int, batch: int, context: int) -> Timed:
    """Microseconds of an operation, on a GPU if there is one: one by one, and in a CUDA graph."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size if on_gpu else 1
    shape = Shape(heads, kv_heads, batch, context)
    inputs = make_inputs(shape, device, l2_bytes)
    todo = our_calls(inputs, "auto")
    del todo["delta"]  # the next two
    _, scores = todo["scores"][0]()
    todo["select"] = [partial(ops.select_pages, scores, inputs.seq_lens, CFG, backend="auto")]

    def one_by_one(sets: list[Call]) -> float:
        wait()
        start = time.perf_counter()
        for number in range(_CALLS):
            sets[number % len(sets)]()
        wait()
        return 1e6 * (time.perf_counter() - start) / _CALLS

    def in_a_graph(runner: Runner) -> float:
        return timer.measure({0: runner})[0].us

    timer, timed = GraphTimer(), Timed()
    for op, sets in todo.items():
        sets[0]()
        timed[f"{op}, one by one"] = partial(one_by_one, sets)
        runner = timer.prepare(sets, moved_bytes(op, shape)) if on_gpu else None
        if runner is not None and runner.graph:
            timed[f"{op}, in a graph"] = partial(in_a_graph, runner)
    return timed


class Side:
    """Times the source that it is started with; ``kind`` is ``"steps"`` or ``"calls"``."""

    def __init__(self, spec: dict[str, Any]) -> None:
        imported = Path(str(deltadecode.__file__)).resolve()
        if not imported.is_relative_to(Path(spec["source"]).resolve()):
            raise RuntimeError(f"{spec['source']} was to be timed, but {imported} was imported")
        self._make: Callable[..., Timed] = steps if spec["kind"] == "steps" else calls
        self._timed: Timed = {}
        torch.set_num_threads(spec["threads"])

    def facts(self) -> dict[str, Any]:
        """Nothing: both sides run on the same machine with the same packages."""
        return {}

    @torch.inference_mode()
    def do(self, command: dict[str, Any]) -> dict[str, Any]:
        """Prepare a case, or time what was prepared."""
        if command.pop("do") == "time":
            return {what: measure() for what, measure in self._timed.items()}
        self._timed = {}  # what the last case holds goes before the next one's comes
        del command["label"]
        self._timed = self._make(**command)
        return {}


if __name__ == "__main__":
    serve_process(Side)
