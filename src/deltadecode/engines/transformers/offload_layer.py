"""Keys and values of a sparse layer in host memory, with a pool of hot pages on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deltadecode.engines.transformers.layers import Reading, StoredLayer
from deltadecode.engines.transformers.offload_pages import PageDirectory, PageRequest
from deltadecode.engines.transformers.offload_room import Offload
from deltadecode.engines.transformers.packing import Packing
from deltadecode.engines.transformers.rows import RowGroup
from deltadecode.errors import UnsupportedCacheError

# Slots behind the tokens of states that are loaded for a prompt, as DeltaLayer has them.
_SLACK = 64


class OffloadedLayer(StoredLayer):
    """Keys and values of one sparse layer.

    Within the budget they are on the device, as :class:`DeltaCache` has them. Beyond, all tokens
    are on the host, and the pages of the last selections in a pool on the device. ``keys`` and
    ``values`` are then views of host memory.
    """

    kind = "an offloaded"

    def __init__(
        self,
        reading: Reading,
        packing: Packing | None,
        shared: Offload,
        directory: PageDirectory,
    ) -> None:
        self._states: dict[str, Any] = {}
        self._host: Tensor | None = None
        self._requests: dict[int, PageRequest] = {}
        super().__init__(reading, packing)
        self._shared, self._directory = shared, directory
        self._number = len(shared.rooms)
        shared.rooms.append(0)
        self._forget_host()

    def _forget_host(self) -> None:
        self._drop_pool()
        self._host, self._tokens = None, 0
        self._shared.rooms[self._number] = 0

    def _drop_pool(self) -> None:
        self._directory.forget()
        if self._requests:  # a step broke off
            self._shared.transfer.settle()
        self._pool: Tensor | None = None
        self._halves: tuple[Tensor, ...] = ()  # keys and values in it, which each step reads
        # Row group -> what was requested in this step; and what says when all of it has come.
        self._requests = {}
        self._ticket: Any = None

    @property
    def keys(self) -> Any:
        """[B, Hkv, n, D], or as they are packed; None before the first token."""
        return self._states.get("keys") if self._host is None else self._view(0)

    @keys.setter
    def keys(self, states: Any) -> None:
        self._states["keys"] = states

    @property
    def values(self) -> Any:
        """[B, Hkv, n, D], or as they are packed; None before the first token."""
        return self._states.get("values") if self._host is None else self._view(1)

    @values.setter
    def values(self, states: Any) -> None:
        self._states["values"] = states

    def _view(self, half: int) -> Tensor:
        assert self._host is not None
        self._shared.transfer.settle()
        return self._host[: self._tokens, half].permute(1, 2, 0, 3)

    @property
    def offloaded(self) -> bool:
        """Whether the tokens are on the host."""
        return self._host is not None

    @property
    def rows(self) -> int:
        """Rows of the batch, once a token came."""
        return self._rows

    @property
    def apart(self) -> bool:
        """Whether decode steps get nothing from ``update``."""
        return self.offloaded or super().apart

    @property
    def in_place(self) -> bool:
        """Whether attention reads all tokens where they are, without a copy."""
        return super().in_place and not self.offloaded

    @property
    def host_bytes(self) -> int:
        """Bytes on the host, room for more tokens included."""
        return 0 if self._host is None else self._host.nbytes

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token of one row, once a token came."""
        return self._of_token

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype, device, batch, heads and head size from the first states."""
        super().lazy_initialization(key_states, value_states)
        _, heads, _, dim = key_states.shape
        self._of_token = 2 * heads * dim * key_states.element_size()

    @property
    def device_bytes(self) -> int | None:
        """Bytes of the pool on the device; None where all tokens are there."""
        if self._host is None:
            return None
        return 0 if self._pool is None else self._pool.nbytes

    def get_seq_length(self) -> int:
        """Tokens n of each row, padding included."""
        return super().get_seq_length() if self._host is None else self._tokens

    @torch.compiler.disable  # as there
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append tokens and return everything stored.

        As :class:`StoredLayer` does it; within the budget as :class:`DeltaLayer` does.

        Raises
        ------
        UnsupportedCacheError
            For a device without host memory of its own, gradients, other rows or another dtype
            than before, or when the host has no room.
        """
        if not self.get_seq_length():
            self._shared.transfer.check(key_states.device)
        given: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        if self._host is not None and not self._absent:
            self._drop_pool()
        return given

    def _put(self, key_states: Tensor, value_states: Tensor) -> None:
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        if self._host is None and self._shared.cfg.reads_all(end):
            super()._put(key_states, value_states)
            return
        if key_states.dtype != value_states.dtype or (start and key_states.dtype != self.dtype):
            raise UnsupportedCacheError(
                f"an offloaded cache holds one dtype, got keys of {key_states.dtype} and values of "
                f"{value_states.dtype}"
            )
        if start and key_states.shape[0] != self._rows:
            raise UnsupportedCacheError(
                f"the cache has {self._rows} rows, got {key_states.shape[0]}"
            )
        if self._host is None:
            self._move_out(key_states, value_states, end)
        self._append(key_states, value_states, end)

    def _loaded(self) -> tuple[Tensor, Tensor]:
        host = self._host
        if host is None:
            return super()._loaded()
        _, _, rows, heads, dim = host.shape
        room = -(-self._tokens // 64) * 64 + _SLACK
        states = [
            torch.empty((rows, heads, room, dim), dtype=host.dtype, device=self.device).narrow(
                2, 0, self._tokens
            )
            for _ in range(2)
        ]
        self._shared.transfer.load(host, self._tokens, *states)
        return states[0], states[1]

    def _move_out(self, key_states: Tensor, value_states: Tensor, end: int) -> None:
        """Make the host hold what is stored, with room for ``end`` tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self._states["keys"], self._states["values"]
        rows, heads, _, dim = key_states.shape
        self._rows = rows
        self._grow_host(end, (2, rows, heads, dim))
        assert self._host is not None
        if held[0].shape[2]:
            self._shared.transfer.store(self._host, 0, *held)
        self._tokens = held[0].shape[2]
        self._states.clear()
        if hasattr(self, "_key_buffer"):
            del self._key_buffer, self._value_buffer

    def _append(self, key_states: Tensor, value_states: Tensor, end: int) -> None:
        assert self._host is not None
        if end > self._host.shape[0]:
            self._grow_host(end, self._host.shape[1:])
        transfer = self._shared.transfer
        if key_states.shape[2] > 1:
            transfer.store(self._host, self._tokens, key_states, value_states)
        else:
            if self._requests and self._pool is None:  # it has moved out in this very step
                self._make_pool()
                with transfer.fetching(self.device):
                    for place in self._requests:
                        self.fetch(place)
            requests = list(self._requests.values())
            if requests:
                transfer.wait(self._ticket, self.device)
            transfer.append(
                self._host, self._tokens, self._pool, requests, key_states, value_states
            )
        self._tokens = end

    def _grow_host(self, tokens: int, of_slot: tuple[int, ...]) -> None:
        room = self._shared.room_now(tokens)
        self._shared.check_room(tokens, self._rows * self._of_token)
        older = self._host
        self._host = self._shared.transfer.allocate((room, *of_slot), self.dtype)
        self._shared.rooms[self._number] = room
        if older is not None:
            self._shared.transfer.settle()
            self._host[: self._tokens].copy_(older[: self._tokens])

    def expect(self, place: int, request: PageRequest, cells: int, page_size: int) -> None:
        """Note what a row group reads in this step, from a pool of so many cells."""
        if place == 0 and self._requests:  # a step broke off
            self._shared.transfer.settle()
            self._requests = {}
        self._requests[place] = request
        self._cells = cells, page_size
        if self._host is not None:  # else it moves out in this very step
            self._make_pool()

    def _make_pool(self) -> None:
        assert self._host is not None
        cells, page_size = self._cells
        if self._pool is None or self._pool.shape[0] != cells:
            shape = cells, page_size, 2, *self._host.shape[3:]
            # Steps outside of inference mode must be able to write to it, too.
            with torch.inference_mode(False):
                self._pool = torch.empty(shape, dtype=self.dtype, device=self.device)
            self._halves = self._pool[:, :, 0], self._pool[:, :, 1]

    def fetch(self, place: int) -> None:
        """Have the missing pages of a row group copied, within :meth:`Transfer.fetching`."""
        if self._host is None:
            return
        assert self._pool is not None
        self._ticket = self._shared.transfer.fetch(
            self._host, self._pool, self._requests[place], self._ticket
        )

    def pages(self, place: int, group: RowGroup, page_size: int, whole: bool) -> dict[str, Any]:
        """Inputs of :func:`deltadecode.ops.decode_attention` for a row group, but the query.

        With ``whole`` rows are one block each, as :meth:`RowGroup.paged` has them; else blocks are
        pages, and the table knows the selected ones.
        """
        if self._host is None:
            return super().pages(place, group, page_size, whole)
        request, pool = self._requests.pop(place), self._pool
        assert pool is not None
        if not whole:
            keys, values = self._halves
            return self._inputs(keys, values, request.table, group.seq_lens)
        _, page, _, heads, dim = pool.shape
        rows, width = len(request.newest), -(-group.length // page)
        blocks = group.batch if group.slots is None else 1
        states = pool.new_zeros((2, blocks, heads, width * page, dim))
        here = pool[request.table[:, :width].long()].permute(3, 0, 4, 1, 2, 5)
        to = slice(None) if group.rows is None or group.slots is not None else group.rows
        states[:, to] = here.reshape(2, rows, heads, width * page, dim)
        keys, values = states.transpose(2, 3)
        return self._inputs(keys, values, group.block_table, group.seq_lens)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; within the budget the layer is on the device again."""
        if self._host is None or tokens_to_remove >= 0:
            super().crop(tokens_to_remove)
            return
        self._drop_pool()
        self._tokens = max(0, self._tokens + tokens_to_remove)
        if self._shared.cfg.reads_all(self._tokens):
            keys, values = self._loaded()
            self._shared.transfer.settle()
            self._forget_host()
            self._adopt(keys, values)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take row ``beam_idx[b]`` as row b."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        if self._host is None:
            super().batch_repeat_interleave(repeats)
        else:
            self.batch_select_indices(torch.arange(self._rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows only: row numbers, or a boolean [B]."""
        if self._host is None:
            super().batch_select_indices(indices)
            return
        self._drop_pool()
        self._shared.transfer.settle()
        older, indices = self._host, indices.cpu()
        rows = torch.arange(self._rows)[indices]
        room, halves, _, heads, dim = older.shape
        self._rows = len(rows)
        if self._rows == older.shape[2]:
            self._host[: self._tokens] = older[: self._tokens, :, rows]
            return
        self._host = self._shared.transfer.allocate(
            (room, halves, self._rows, heads, dim), self.dtype
        )
        torch.index_select(older[: self._tokens], 2, rows, out=self._host[: self._tokens])

    def reset(self) -> None:
        """Forget all tokens and free host and device memory."""
        if self._host is not None:
            self._shared.transfer.settle()
        self._forget_host()
        super().reset()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the pool; the tokens alone, and not the room behind them."""
        state = dict(vars(self))
        state.update(_pool=None, _halves=(), _requests={}, _ticket=None)
        if self._host is not None:
            self._shared.transfer.settle()
            state["_host"] = self._host[: self._tokens].clone()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._host is not None:
            held = self._host
            self._host = self._shared.transfer.allocate(tuple(held.shape), held.dtype)
            self._shared.rooms[self._number] = held.shape[0]
            self._host.copy_(held)
