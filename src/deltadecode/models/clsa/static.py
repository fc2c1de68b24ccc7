"""Decoding in fixed shapes: a cache of a size known before, and a step that a CUDA graph holds.

Rows lie in the cache without their padding, each with its own number of tokens. So a step reads
through the operations alone, and nothing in it depends on lengths but what they compute on the
device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from deltadecode.errors import ArgumentError, UnsupportedCacheError
from deltadecode.models.clsa.cache import ClsaCache, cache_shape
from deltadecode.models.clsa.configuration import ClsaConfig, check_config
from deltadecode.models.clsa.decode import Paged, pick
from deltadecode.models.clsa.layers import rotary
from deltadecode.ops.graphs import Graph


class ClsaStaticCache(Cache):
    """A cache of up to ``max_length`` tokens for each of ``rows`` rows.

    The windows are rings of W tokens, whose order plays no part: positions are in the keys.

    Parameters
    ----------
    config
        Of the model.
    rows, max_length
        Sequences, and most tokens of one.
    dtype, device
        Of the model.

    Raises
    ------
    ArgumentError
        For another class of configuration, or a size below 1.
    """

    def __init__(
        self,
        config: ClsaConfig,
        rows: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        check_config(config)
        for name, value in (("rows", rows), ("max_length", max_length)):
            if type(value) is not int or value < 1:
                raise ArgumentError(f"{name} must be an int of 1 or more, got {value!r}")
        super().__init__(layers=[])
        self.made_for = cache_shape(config)
        self.config, self.rows, self.max_length = config, rows, max_length
        heads, first = (config.num_key_value_heads, config.head_dim), config.self_layers
        self.ring = max_length
        if config.mode != "transformer":
            self.ring = min(config.sliding_window, max_length)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.windows = [zeros(2, rows, self.ring, *heads) for _ in range(first)]
        self.shared = self.index = None
        if config.mode != "transformer":
            self.shared = zeros(2, rows, max_length, *heads)
        if config.mode == "clsa":
            self.index = zeros(rows, max_length, config.index_head_dim)
        self.table = torch.arange(rows, dtype=torch.int32, device=device)[:, None]
        self.row = torch.arange(rows, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int32, device=device)
        # Where a step writes: in the rings, and in what has a place for every token.
        self.slot = self.place = self.row
        self.seen = 0
        self.graph: StepGraph | None = None

    def __len__(self) -> int:
        """Layers of the model; a cache without one is false to Transformers."""
        layers: int = self.config.num_hidden_layers
        return layers

    def __getstate__(self) -> dict[str, Any]:
        """All but the CUDA graph, which belongs to the memory of this cache alone."""
        return self.__dict__ | {"graph": None}

    def serve(self, model: Any) -> None:
        """Keep the CUDA graph for the model that it is of: another one's steps are not in it."""
        if self.graph is not None and self.graph.model is not model:
            self.graph = None

    @property
    def is_croppable(self) -> bool:
        """False, as :meth:`crop` says."""
        return False

    @property
    def is_compileable(self) -> bool:
        """False: a step has a CUDA graph of its own, and Transformers need not compile one."""
        return False

    @property
    def is_initialized(self) -> bool:
        """True: all memory is there from the start."""
        return True

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that have been read, padding included."""
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Most tokens of a row."""
        return self.max_length

    def reset(self) -> None:
        """Forget all tokens."""
        self.seen = 0
        self.lengths.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put rows into the order of ``beam_idx`` [B], in place."""
        for x in (*self.windows, self.shared):
            if x is not None:
                x.copy_(x[:, beam_idx])
        for x in (self.index, self.lengths):
            if x is not None:
                x.copy_(x[beam_idx])

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: a ring has lost what it held before."""
        raise UnsupportedCacheError("a ClsaStaticCache cannot take tokens back; use a ClsaCache")

    def activate_past_recording(self) -> None:
        """Refuse, as :meth:`crop`: drafts of assisted decoding are taken back."""
        self.crop(0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refuse: the number of rows is fixed. :meth:`reorder_cache` puts them into an order."""
        raise UnsupportedCacheError(
            f"a ClsaStaticCache keeps its {self.rows} rows; use a ClsaCache"
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refuse: the number of rows is fixed."""
        self.batch_select_indices(self.row)

    def load(self, prompt: ClsaCache, valid: Tensor | None) -> None:
        """Take over the tokens of a prompt but those that are padding, ``valid`` [B, T]."""
        layers: list[Any] = list(prompt.layers)
        tokens, rows = prompt.get_seq_length(), layers[0].keys.shape[0]
        self.check_room(tokens)
        if rows != self.rows:
            raise UnsupportedCacheError(
                f"a ClsaStaticCache of {self.rows} rows got a batch of {rows}"
            )
        if valid is None:
            valid = torch.ones(rows, tokens, dtype=torch.bool, device=self.row.device)
        else:
            self._check_windows(layers[0].keys.shape[2], valid)
        self.seen = tokens
        self.lengths.copy_(valid.sum(1))
        for layer, window in enumerate(self.windows):
            kept = layers[layer]
            self._place(window, kept.keys.transpose(1, 2), kept.values.transpose(1, 2), valid)
        if self.shared is not None:
            kept, heads = layers[prompt.shared_layer], self.shared.shape[3:]
            k, v = (x[:, 0].unflatten(-1, heads) for x in (kept.keys, kept.values))
            self._place(self.shared, k, v, valid)
        if self.index is not None:
            row, token, slot = self._slots(valid, tokens, self.max_length)
            keys = layers[prompt.shared_layer + 1].keys[row, 0, token]
            self.index[row, slot] = keys.to(self.index.dtype)

    def _check_windows(self, held: int, valid: Tensor) -> None:
        """Refuse padding among the last tokens of a prompt, which alone its windows hold."""
        near = valid[:, valid.shape[1] - held :].sum(1)
        if (near < valid.sum(1).clamp(max=held)).any():
            raise UnsupportedCacheError(
                "a ClsaStaticCache takes rows with padding before their tokens, got an "
                "attention_mask with 0 behind them; pad on the left, or use a ClsaCache"
            )

    def _place(self, to: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> None:
        """Write the last tokens of each row, as many as there is room for."""
        row, token, slot = self._slots(valid, k.shape[1], to.shape[2])
        # Under autocast the model's tensors have another type than its cache.
        to[0, row, slot], to[1, row, slot] = (x[row, token].to(to.dtype) for x in (k, v))

    def _slots(self, valid: Tensor, held: int, room: int) -> tuple[Tensor, Tensor, Tensor]:
        """Row, place among the last ``held`` tokens, and slot of what goes into ``room`` slots."""
        position = valid.cumsum(1) - 1
        late = valid & (position >= (self.lengths[:, None] - room))
        first = valid.shape[1] - held
        row, token = late[:, first:].nonzero(as_tuple=True)
        return row, token, position[:, first:][row, token] % room

    def check_room(self, tokens: int) -> None:
        """Refuse more tokens than there is room for."""
        if tokens > self.max_length:
            raise UnsupportedCacheError(
                f"a ClsaStaticCache of {self.max_length} tokens has no room for {tokens}"
            )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one token [B, Hkv, 1, D] of a layer; returns its window [B, Hkv, W, D]."""
        window = self.windows[layer_idx]
        window[0, self.row, self.slot] = key_states[:, :, 0].to(window.dtype)
        window[1, self.row, self.slot] = value_states[:, :, 0].to(window.dtype)
        return window[0].transpose(1, 2), window[1].transpose(1, 2)

    def update_shared(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the shared keys and values [B, 1, Hkv, D] of a token; returns all."""
        assert self.shared is not None
        self.shared[0, self.row, self.place] = k[:, 0].to(self.shared.dtype)
        self.shared[1, self.row, self.place] = v[:, 0].to(self.shared.dtype)
        return self.shared[0], self.shared[1]

    def update_index(self, keys: Tensor) -> Tensor:
        """Write the index key [B, 1, d] of a token; returns all."""
        assert self.index is not None
        self.index[self.row, self.place] = keys[:, 0].to(self.index.dtype)
        return self.index


def decode_step(model: Any, cache: ClsaStaticCache, x: Tensor) -> Tensor:
    """Output [B, 1, hidden] of a ClsaModel for one token a row, [B, 1, hidden] embedded."""
    config, first = model.config, model.config.self_layers
    turn = rotary(config, cache.lengths[:, None], x.dtype)
    cache.place = cache.lengths.long()
    cache.slot = cache.place % cache.ring
    lengths = cache.lengths + 1
    near = Paged(cache.table, lengths.clamp(max=cache.ring))
    for layer in model.layers[:first]:
        x = layer(x, turn, near, cache)
    if first < config.num_hidden_layers:
        memory = model.memory_norm(x)
        k, v = cache.update_shared(*model.shared_kv(memory))
        attend = Paged(cache.table, lengths)
        if config.mode == "clsa" and cache.max_length > config.index_topk:
            query, keys = model.indexer(memory, slice(None))
            keys = cache.update_index(keys)
            attend = pick(query[:, 0], keys, cache.table, lengths, config.index_topk)
        for layer in model.layers[first:]:
            x = layer(x, k.transpose(1, 2), v.transpose(1, 2), attend)
    cache.lengths.add_(1)
    out: Tensor = model.norm(x)
    return out


class StepGraph:
    """A CUDA graph of a whole step, from token ids [B, 1] to logits [B, 1, vocabulary]."""

    def __init__(self, model: Any, cache: ClsaStaticCache, ids: Tensor) -> None:
        self.model, self.ids = model, ids.clone()
        held = cache.lengths.clone()
        self._graph = Graph(
            lambda: _logits(model, cache, self.ids), lambda: cache.lengths.copy_(held)
        )

    def run(self, ids: Tensor) -> Tensor:
        """Logits, which the next run overwrites."""
        self.ids.copy_(ids)
        return self._graph.replay()


def _logits(model: Any, cache: ClsaStaticCache, ids: Tensor) -> Tensor:
    x = decode_step(model.model, cache, model.model.embed_tokens(ids))
    logits: Tensor = model.lm_head(x)
    return logits


def step_logits(model: Any, cache: ClsaStaticCache, ids: Tensor | None) -> Tensor:
    """Logits [B, 1, vocabulary] of a ClsaForCausalLM for the next token ids [B, 1] of each row.

    On a GPU they come from a CUDA graph, captured at the first step.
    """
    if ids is None or ids.shape != (cache.rows, 1):
        raise UnsupportedCacheError(
            f"a ClsaStaticCache of {cache.rows} rows takes one token a row behind the prompt, "
            f"got {'embeddings' if ids is None else list(ids.shape)}"
        )
    cache.check_room(cache.seen + 1)
    if ids.is_cuda:
        if cache.graph is None:
            cache.graph = StepGraph(model, cache, ids)
        logits = cache.graph.run(ids).clone()
    else:
        logits = _logits(model, cache, ids)
    cache.seen += 1
    return logits
