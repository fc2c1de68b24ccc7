"""Two ranks of vLLM's that select together: ``python rank_worker.py cuda|cpu``; asserts.

Each holds half of the heads of a Δ- and a sparse layer. What it keeps and writes, in a step and in
a CUDA graph that is replayed for other lengths, has to be what one rank with all heads does.
"""

import socket
import sys
from dataclasses import replace
from pathlib import Path

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state

from deltadecode import DeltaConfig
from deltadecode.engines.serving.kernels import LayerKernels
from deltadecode.engines.serving.settings import ServingSettings
from deltadecode.engines.serving.step import Cache, ForwardPass, attend
from deltadecode.engines.vllm.ranks import over_all_ranks

CONFIG = DeltaConfig(
    page_size=16, budget_pages=8, recent_pages=2, sink_pages=1, dense_layers=(), delta_layers=(0,)
)
ALONE = ServingSettings(CONFIG, CONFIG.layer_plan(2))
TOGETHER = replace(ALONE, sync_heads=True)
HEADS, KV_HEADS, DIM, BLOCK, BLOCKS = 8, 4, 64, 32, 40
ROWS = 5
SCALE = 3.0 * DIM**-0.5  # sharp enough that heads want pages of their own
LENGTHS = [700, 1280, 130, 1, 900], [1279, 300, 0, 640, 129]


def views(cache):
    return cache.unbind(1)


class Rank:
    """This rank's part of both layers, and all of them for what is expected."""

    def __init__(self, rank, device):
        torch.manual_seed(0)
        torch.set_default_device(device)
        self.q = torch.randn(2, ROWS, HEADS, DIM)
        self.caches = torch.randn(2, ROWS * BLOCKS, 2, BLOCK, KV_HEADS, DIM)
        self.table = torch.randperm(ROWS * BLOCKS).view(ROWS, BLOCKS).int()
        self.lens = torch.tensor(LENGTHS[0], dtype=torch.int32)
        self.heads = slice(rank * HEADS // 2, (rank + 1) * HEADS // 2)
        kv_heads = slice(rank * KV_HEADS // 2, (rank + 1) * KV_HEADS // 2)
        self.own_q = self.q[:, :, self.heads].contiguous()
        self.own_caches = self.caches[..., kv_heads, :].contiguous()
        self.out = torch.empty_like(self.own_q)

    def kernels(self, settings):
        return [
            LayerKernels(
                settings, layer, settings.plan.role(layer), views, scale=SCALE,
                over_all_ranks=over_all_ranks(),
            )
            for layer in range(2)
        ]  # fmt: skip

    def step(self, kernels):
        """Both layers of this rank; page ids and counts."""
        forward = ForwardPass()
        for layer, each in enumerate(kernels):
            assert each.attend(
                self.own_q[layer], self.own_caches[layer], self.table, self.lens, forward, None,
                None, self.out[layer],
            )  # fmt: skip
        return forward.selections[0]

    def expected(self):
        forward = ForwardPass()
        out = [
            attend(
                ALONE, layer, ALONE.plan.role(layer), self.q[layer],
                Cache(*views(self.caches[layer]), self.table, self.lens), forward, scale=SCALE,
            )[:, self.heads]
            for layer in range(2)
        ]  # fmt: skip
        return torch.stack(out), forward.selections[0]

    def check(self, selection):
        out, (ids, counts) = self.expected()
        assert torch.equal(selection[1], counts), (selection[1], counts)
        assert torch.equal(selection[0], ids), (selection[0], ids)
        torch.testing.assert_close(self.out, out, rtol=1e-3, atol=1e-3)


def check_graph(rank, kernels):
    graph = torch.cuda.CUDAGraph()
    device = torch.device("cuda", torch.cuda.current_device())
    with (
        parallel_state.graph_capture(device) as context,
        torch.cuda.graph(graph, stream=context.stream),
    ):
        selection = rank.step(kernels)
    for lengths in reversed(LENGTHS):
        rank.lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        rank.q.normal_()
        rank.own_q.copy_(rank.q[:, :, rank.heads])
        rank.out.fill_(7.0)
        graph.replay()
        torch.cuda.synchronize()
        rank.check(selection)


def run_rank(number, port, device):
    address, backend = f"tcp://127.0.0.1:{port}", "gloo"
    parallel_state.set_custom_all_reduce(False)
    if device == "cuda":
        torch.cuda.set_device(number)
        backend = "nccl"
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(2, number, address, number, backend)
        parallel_state.initialize_model_parallel(2, backend=backend)
        rank = Rank(number, device)
        kernels = rank.kernels(TOGETHER)
        for layer, each in enumerate(kernels):
            q, cache = rank.own_q[layer], rank.own_caches[layer]
            each.compile_ahead(q, cache, BLOCK * BLOCKS, q.dtype)
        rank.check(rank.step(kernels))
        if device == "cuda":
            check_graph(rank, kernels)
        alone = rank.step(rank.kernels(ALONE))
        ids = rank.expected()[1][0]
        assert not torch.equal(alone[0], ids), "alone it keeps the same: this shows nothing"
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forks need not import vLLM again; of a process with CUDA there can be none.
    method = "spawn" if sys.argv[1] == "cuda" else "fork"
    if method == "fork":
        sys.path.insert(0, str(Path(__file__).parents[1]))
        import fast_interpreter

        fast_interpreter.install()
    torch.multiprocessing.start_processes(
        run_rank, (port, sys.argv[1]), nprocs=2, start_method=method
    )
