"""A KV cache whose sparse layers lie in host memory, with pools of hot pages on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltadecode.architecture import attention_layers, num_layers, text_config
from deltadecode.config import DeltaConfig
from deltadecode.engines.transformers.cache import DeltaCache, check_unshared
from deltadecode.engines.transformers.layers import DeltaLayer, StoredLayer
from deltadecode.engines.transformers.offload_host import CudaTransfer, Transfer
from deltadecode.engines.transformers.offload_layer import OffloadedLayer
from deltadecode.engines.transformers.offload_pages import PageDirectory
from deltadecode.engines.transformers.offload_room import Offload
from deltadecode.engines.transformers.packing import Packing
from deltadecode.engines.transformers.rows import RowGroup
from deltadecode.errors import ArgumentTypeError, UnsupportedCacheError


@dataclass(frozen=True)
class Fetch:
    """What the sparse layers of a Δ-layer read of one row group in a step, and what was fetched.

    Attributes
    ----------
    read : int
        Pages that they read, over all layers and rows.
    missing : Tensor
        int64 scalar on the device: pages that each of them fetched.
    layers : int
        Their number.
    bytes_of_page : int
        Bytes of one page in all of them.
    """

    read: int
    missing: Tensor
    layers: int
    bytes_of_page: int


class DeltaOffloadedCache(DeltaCache):
    """The cache that keeps sparse layers on the host, and dense and Δ-layers on the device.

    Selection, results and counts are those of :class:`DeltaCache`. Once a cache has more pages than
    the budget, a decode step fetches those pages of each sparse layer that were not in its pool, as
    soon as their Δ-layer has selected them. ``generate(..., cache_implementation="offloaded")``
    makes one by itself.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        The model's.
    cfg : DeltaConfig, optional
        The plan of the model that decodes from it; by default :meth:`DeltaConfig.for_model`.
    transfer : Transfer, optional
        By default one for CUDA devices.
    kv_dtype : str, optional
        As for :class:`DeltaCache`; on the host, too.

    Raises
    ------
    UnsupportedModelError
        When the model has no full-attention layer that could be planned.
    UnsupportedCacheError
        When a sparse layer keeps more than keys and values, or shares them with others.
    ArgumentError
        For another ``kv_dtype``, or a plan of another type.
    """

    fetches = True

    def __init__(
        self,
        config: Any,
        cfg: DeltaConfig | None = None,
        *,
        transfer: Transfer | None = None,
        kv_dtype: str | None = None,
    ) -> None:
        super().__init__(config, kv_dtype=kv_dtype)
        text = text_config(config)
        if cfg is not None and not isinstance(cfg, DeltaConfig):
            raise ArgumentTypeError(f"cfg must be a DeltaConfig, got {type(cfg).__name__}")
        cfg = DeltaConfig.for_model(config) if cfg is None else cfg
        plan = cfg.layer_plan(num_layers(text), attention_layers(config))
        check_unshared(config, "offloaded")
        self.shared = Offload(cfg, CudaTransfer() if transfer is None else transfer)
        self._directories: dict[int, PageDirectory] = {}
        self._sparse: dict[int, list[int]] = {}
        for layer, source in enumerate(plan.sources):
            if source is None:
                continue
            stock = self.layers[layer]
            if type(stock) not in (DeltaLayer, StoredLayer):
                raise UnsupportedCacheError(
                    f"sparse layer {layer} cannot be offloaded: it keeps a {type(stock).__name__}, "
                    "more than keys and values; use the default cache"
                )
            directory = self._directories.setdefault(source, PageDirectory())
            packing = None if kv_dtype is None else Packing(kv_dtype)
            self.layers[layer] = OffloadedLayer(self._reading, packing, self.shared, directory)
            self._sparse.setdefault(source, []).append(layer)

    @property
    def apart(self) -> bool:
        """Whether attention may have to read layers where they are stored."""
        return True

    def select(self, source: int, group: RowGroup, length: int) -> None:
        """Begin the selections of a Δ-layer in a step of ``length`` slots."""
        directory = self._directories.get(source)
        if directory is not None:
            directory.begin(self.shared.cfg, group.batch, length, group.device)

    def request(
        self, source: int, place: int, group: RowGroup, ids: Tensor, counts: Tensor
    ) -> Fetch | None:
        """Fetch what a Δ-layer has selected of a row group, for all of its sparse layers.

        Parameters
        ----------
        source : int
            The Δ-layer.
        place : int
            Number of the group in the step.
        group : RowGroup
            Its R rows.
        ids, counts : Tensor
            [R, width] and [R] int32, as :func:`deltadecode.ops.select_pages` gives them.

        Returns
        -------
        Fetch or None
            None for a Δ-layer without sparse layers.
        """
        directory = self._directories.get(source)
        if directory is None:
            return None
        cfg, transfer = self.shared.cfg, self.shared.transfer
        request = directory.request(cfg, group, ids, counts)
        cells = group.batch * (directory.capacity + 1)
        layers: list[Any] = [self.layers[number] for number in self._sparse[source]]
        together: dict[torch.device, list[Any]] = {}
        for layer in layers:
            together.setdefault(layer.device, []).append(layer)
        for device, those in together.items():
            moved = request.to(device)
            for layer in those:
                layer.expect(place, moved, cells, cfg.page_size)
            with transfer.fetching(device):
                for layer in those:
                    layer.fetch(place)
        pages = -(-group.length // cfg.page_size)
        read = len(group.members) * min(pages, cfg.pages_for(pages)) * len(layers)
        of_page = cfg.page_size * sum(layer.token_bytes for layer in layers)
        return Fetch(read, request.missing.sum(), len(layers), of_page)

    @property
    def host_bytes(self) -> int:
        """Bytes of keys and values on the host, with the room behind them."""
        return sum(layer.host_bytes for layer in self._on_host())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times.

        Raises
        ------
        UnsupportedCacheError
            When the host has no room for as many rows; no layer has changed then.
        """
        layers = self._on_host()
        if layers:
            self.shared.check_rows(layers, layers[0].rows * repeats)
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows only: row numbers, or a boolean [B].

        Raises
        ------
        UnsupportedCacheError
            As :meth:`batch_repeat_interleave`.
        """
        self._check_choice(indices)
        super().batch_select_indices(indices)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Take row ``beam_idx[b]`` as row b.

        Raises
        ------
        UnsupportedCacheError
            As :meth:`batch_repeat_interleave`.
        """
        self._check_choice(beam_idx)
        super().reorder_cache(beam_idx)

    def _check_choice(self, indices: Tensor) -> None:
        layers = self._on_host()
        if layers:
            self.shared.check_rows(layers, len(torch.arange(layers[0].rows)[indices.cpu()]))

    def _on_host(self) -> list[OffloadedLayer]:
        return [each for each in self.layers if isinstance(each, OffloadedLayer) and each.offloaded]
