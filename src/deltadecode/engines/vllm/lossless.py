"""Lossless mode in vLLM: a proposer that drafts with the model's own weights and cache.

vLLM verifies as for every other proposer. What is drafted never decides what is written, only how
soon (docs/semantics.md, R12 to R14).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from deltadecode.engines.serving.drafting import DraftPages
from deltadecode.engines.vllm import versions
from deltadecode.engines.vllm.builder import most_rows
from deltadecode.engines.vllm.implementation import DeltaImpl
from deltadecode.engines.vllm.metadata import DraftPass
from deltadecode.engines.vllm.runner import UniformSteps, wrap_runner
from deltadecode.ops import Scratch

# From this size on, batches are captured at one and a half times a power of two as well.
_HALVES_FROM = 16


@dataclass
class _Rows:
    """What the drafts of a batch start from and give, at the same addresses for every batch.

    Attributes
    ----------
    inputs : Tensor
        [3, rows] int64: the token that each row's next draft follows, its position, and whether the
        row drafts (1) or not (0).
    drafted : Tensor
        [rows, drafts] int64.
    place : Tensor
        [1] int64, the column that is drafted next.
    seq_lens : Tensor
        [rows] int32.
    """

    inputs: Tensor
    drafted: Tensor
    place: Tensor
    seq_lens: Tensor


class Proposer:
    """Drafts by sparse attention in every layer; ``model`` of vLLM's speculative configuration.

    Parameters
    ----------
    vllm_config : VllmConfig
        Of the engine. Raises DeltaConfigError where DELTA's attention backend is not chosen.
    """

    def __init__(self, vllm_config: Any) -> None:
        versions.check_backend(vllm_config)
        wrap_runner()
        self._config = vllm_config
        self._drafts = int(vllm_config.speculative_config.num_speculative_tokens)
        self._graphs: dict[int, Callable[[], None]] = {}
        self._start: Callable[[], None] = self._begin
        self._runner: Any = None
        # Graphs of batches of so many tokens a row, once the runner has captured its own.
        self.steps: dict[int, UniformSteps] = {}
        self._sampled: tuple[Tensor, Tensor]
        self._newest: tuple[Tensor, Tensor] | None = None
        self._selected = False

    def load_model(self, model: Any) -> None:
        """Load nothing: the model drafts for itself."""

    def bind(self, runner: Any) -> None:
        """Take what the model runner has when its cache is there; before any graph is captured."""
        self._runner, device = runner, runner.device
        self._table = runner.input_batch.block_table[0]
        layers = self._config.compilation_config.static_forward_context
        ours = {
            name: layer.impl
            for name, layer in layers.items()
            if isinstance(getattr(layer, "impl", None), DeltaImpl)
        }
        self._layers = list(ours)
        settings = versions.settings_of(self._config)
        table = self._table.get_device_tensor(runner.max_num_reqs)
        # Rows that fill up a captured batch read nothing, so few sizes do.
        twos = [1 << power for power in range(len(table).bit_length())]
        sizes = {*twos, *(size * 3 // 2 for size in twos if size >= _HALVES_FROM)}
        self._sizes = [*sorted(size for size in sizes if size < len(table)), len(table)]
        tokens = table.shape[1] * self._table.block_size
        self._pages = pages = DraftPages(
            settings.within(tokens).config,
            len(ours),
            most_rows(self._config),
            self._drafts,
            tokens,
            device,
        )
        for place, impl in enumerate(ours.values()):
            impl.drafts_from(pages, place)
        rows = pages.rows
        self._rows = _Rows(
            torch.zeros(3, rows, dtype=torch.int64, device=device),
            torch.zeros(rows, self._drafts, dtype=torch.int64, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
            torch.zeros(rows, dtype=torch.int32, device=device),
        )

    def take(self, tokens: Tensor, discarded: Tensor) -> None:
        """Take what a step has sampled; as :func:`newest_tokens`."""
        self._sampled, self._newest = (tokens, discarded), None

    def newest(self) -> tuple[Tensor, Tensor]:
        """Newest token of each row of the step that has just run, and how many it got."""
        if self._newest is None:
            self._newest = newest_tokens(*self._sampled)
        return self._newest

    def propose(
        self, drafts: int, seq_lens: Tensor, ends: Tensor | None
    ) -> Tensor | list[list[int]]:
        """Drafts [rows, at least ``drafts``] int64 behind the :meth:`newest` tokens.

        ``seq_lens`` are those of the pass that sampled these, ``ends`` where each row's drafts end
        among all that it verified, None for no drafts. Waits for nothing on the device.
        """
        count = len(self._sampled[0])
        if not drafts:
            # A plain step selects nothing, and rows move: what was selected is of no more use.
            if self._selected:
                self._pages.forget()
            self._selected = False
            return [[] for _ in range(count)]
        self._selected = True
        newest, kept = self.newest()
        active = kept > 0
        positions = seq_lens[:count]
        if ends is not None:
            verified = ends.diff(prepend=ends.new_zeros(1))
            positions = positions - (verified + 1 - kept)
        self._rows.inputs.zero_()
        for row, values in zip(self._rows.inputs, (newest, positions, active), strict=True):
            row[:count] = values * active
        self._start()
        draft = self._graphs.get(self._size(count)) or partial(self._draft, count)
        for _ in range(drafts):
            draft()
        # With asynchronous scheduling vLLM takes as many as it scheduled, and copies whole rows
        # without waiting.
        columns = self._drafts if self._runner.use_async_scheduling else drafts
        return self._rows.drafted[:count, :columns]

    def capture(self, runner: Any) -> None:
        """Capture a draft of each size that a batch may have; after vLLM has captured its steps."""
        from vllm.config import CUDAGraphMode
        from vllm.distributed.parallel_state import graph_capture
        from vllm.platforms import current_platform

        if self._config.compilation_config.cudagraph_mode == CUDAGraphMode.NONE:
            return
        pool = current_platform.get_global_graph_pool()

        def captured(run: Callable[[], None]) -> Callable[[], None]:
            run()  # compiles
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
                run()
            return graph.replay

        # No row drafts meanwhile, so nothing is written into the cache.
        self._rows.inputs.zero_()
        # Each capture collects garbage, which takes longer than the capture.
        frozen = getattr(runner, "_freeze_gc", nullcontext)
        with torch.inference_mode(), frozen(), graph_capture(device=runner.device):
            self._start = captured(self._begin)
            # The largest first: the others then take its memory.
            for size in reversed(self._sizes):
                self._graphs[size] = captured(partial(self._draft, size))
        torch.cuda.synchronize()

    def _size(self, count: int) -> int:
        """Rows of the captured draft that runs a batch of ``count``."""
        return self._sizes[bisect_left(self._sizes, count)]

    def _begin(self) -> None:
        """List what the drafts of a batch read, before the first of them."""
        self._rows.place.zero_()
        self._pages.begin(self._rows.inputs[1])

    def _draft(self, count: int) -> None:
        """Draft one token of each row, with a token and a position for the next one."""
        rows, size = self._rows, self._table.block_size
        ids, positions, active = rows.inputs
        rows.seq_lens.copy_((positions + 1) * active)
        self._pages.count(rows.seq_lens)
        ids, positions, drafting = ids[:count], positions[:count], active[:count]
        table = self._table.get_device_tensor(count)
        block = table.gather(1, (positions // size)[:, None])[:, 0].long()
        # -1 for a row that does not draft: nothing is written.
        slots = (block * size + positions % size + 1) * drafting - 1
        draft = DraftPass(table, rows.seq_lens[:count], self._pages, Scratch())
        tokens = self._forward(ids, positions, slots, draft)
        rows.drafted[:count].scatter_(1, rows.place.expand(count, 1), tokens[:, None])
        ids.copy_(tokens)
        positions.add_(drafting)
        # Round and round, as while sizes are captured.
        rows.place.add_(1).remainder_(self._drafts)

    def _forward(self, ids: Tensor, positions: Tensor, slots: Tensor, draft: DraftPass) -> Tensor:
        """The likeliest token of each row behind tokens ``ids`` at ``positions``."""
        from vllm.forward_context import set_forward_context

        model = self._runner.model
        with set_forward_context(
            dict.fromkeys(self._layers, draft),
            self._config,
            num_tokens=len(ids),
            slot_mapping=dict.fromkeys(self._layers, slots),
        ):
            hidden = model(
                input_ids=ids.to(torch.int32), positions=positions, intermediate_tensors=None,
                inputs_embeds=None,
            )  # fmt: skip
        return model.compute_logits(hidden).argmax(dim=-1)  # type: ignore[no-any-return]


def newest_tokens(tokens: Tensor, discarded: Tensor) -> tuple[Tensor, Tensor]:
    """Newest token of each row, and how many it got, [rows] int32 both.

    ``tokens`` are what a step sampled, [rows, at most 1 + drafts] int32, -1 for none; ``discarded``
    [rows] is true of parts of prompts, which get none.
    """
    kept = (tokens >= 0).sum(1, dtype=torch.int32).masked_fill_(discarded, 0)
    return tokens.gather(1, (kept - 1).clamp_(min=0)[:, None].long())[:, 0], kept
