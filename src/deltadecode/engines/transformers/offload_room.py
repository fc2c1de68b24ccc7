"""What the sparse layers of an offloaded cache share, and the host memory that they take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from deltadecode.config import DeltaConfig
from deltadecode.engines.transformers.offload_host import Transfer, free_host_bytes
from deltadecode.errors import UnsupportedCacheError


class Offload:
    """What the sparse layers of a cache share.

    Attributes
    ----------
    cfg : DeltaConfig
        The plan that says which layers are sparse, and how many pages they read.
    transfer : Transfer
        Copies between host and device.
    reserve : int
        Tokens of the prompt, with what the cache holds, while ``generate`` runs; 0 otherwise. Of a
        prompt in chunks a layer takes memory once, as of one that comes at once.
    """

    def __init__(self, cfg: DeltaConfig, transfer: Transfer) -> None:
        self.cfg, self.transfer = cfg, transfer
        # Slots on the host of each sparse layer. Not the layers themselves: memory in a cycle would
        # be freed late.
        self.rooms: list[int] = []
        self.reserve = 0

    def __getstate__(self) -> dict[str, Any]:
        """All but the reserve, which is that of a call."""
        return {**vars(self), "reserve": 0}

    @staticmethod
    def room_for(tokens: int) -> int:
        """Slots to take for so many tokens: host memory is large and pinning is slow."""
        return tokens + max(1024, tokens // 8)

    def room_now(self, tokens: int) -> int:
        """Slots to take now for so many tokens, and for the rest of a prompt that comes."""
        return self.room_for(max(tokens, self.reserve))

    def outgrown(self, tokens: int) -> bool:
        """Whether a layer has to take memory before it holds so many tokens on the host."""
        return min(self.rooms, default=tokens) < tokens and not self.cfg.reads_all(tokens)

    def check_room(self, tokens: int, of_token: int, first: int | None = None) -> None:
        """Refuse more tokens than host memory has room for, before a layer takes any of it.

        Parameters
        ----------
        tokens : int
            Slots of each sparse layer.
        of_token : int
            Bytes of one slot in one layer.
        first : int, optional
            Slots that come at once, before the rest one by one; by default all of them.

        Raises
        ------
        UnsupportedCacheError
            Naming the bytes that are needed and those that are free.
        """
        needed = self._peak(tokens if first is None else first, tokens) * of_token
        _check(needed, f"{tokens:,} tokens")

    def check_rows(self, layers: Iterable[Any], rows: int) -> None:
        """Refuse other rows where the host has no room for them.

        Layers change one after the other, and each has its old memory until the new is filled. As
        many rows as before stay where they are, and their tokens are copied.

        Parameters
        ----------
        layers : iterable of OffloadedLayer
            Those that are on the host.
        rows : int
            Of each of them.

        Raises
        ------
        UnsupportedCacheError
            Naming the bytes that are needed and those that are free.
        """
        taken = most = 0
        for layer in layers:
            if rows == layer.rows:
                most = max(most, layer.get_seq_length() * rows * layer.token_bytes)
                continue
            wanted = layer.host_bytes // layer.rows * rows
            most = max(most, taken + wanted)
            taken += wanted - layer.host_bytes
        _check(most, f"{rows:,} rows")

    def _peak(self, first: int, tokens: int) -> int:
        """Slots that the layers take at most beside those they have, until they hold ``tokens``.

        They grow one after the other, and each of them has its old memory until the new is filled.
        """
        rooms, taken, most = list(self.rooms), 0, 0
        first = max(first, self.reserve)
        while rooms and min(rooms) < tokens:
            wanted = self.room_for(first)
            for number, room in enumerate(rooms):
                if room < first:
                    most = max(most, taken + wanted)
                    taken += wanted - room
                    rooms[number] = wanted
            first = max(first, min(rooms)) + 1
        return most


def _check(needed: int, what: str) -> None:
    free = free_host_bytes()
    if free is not None and needed > free:
        raise UnsupportedCacheError(
            f"the sparse layers need {needed:,} more bytes of host memory for {what}, "
            f"got {free:,} free"
        )
