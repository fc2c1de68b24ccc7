"""CLSA, YOCO and the Transformer beside them as a vLLM model (docs/clsa.md)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from deltadecode.engines.vllm.clsa.caches import CacheMetadata, TokenCache
from deltadecode.engines.vllm.clsa.checks import exits_early
from deltadecode.engines.vllm.clsa.layers import (
    Attend,
    CrossAttention,
    Indexer,
    Layer,
    SelfAttention,
    SharedKV,
    normed_sum,
)
from deltadecode.engines.vllm.clsa.rows import CHUNK, Queries, Reads, queries, select
from deltadecode.errors import ModelConfigError

# Weights of a checkpoint that are parts of one here: its last name, the other's, and the part.
_SELF = {"q_proj": ("qkv_proj", "q"), "k_proj": ("qkv_proj", "k"), "v_proj": ("qkv_proj", "v")}
_PARTS: dict[str, dict[str, tuple[str, Any]]] = {
    "mlp": {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)},
    "shared_kv": {"k_proj": ("kv_proj", 0), "v_proj": ("kv_proj", 1)},
    "indexer": {"q_proj": ("qk_proj", 0), "k_proj": ("qk_proj", 1)},
}


class ClsaModel(nn.Module):
    """Self-decoder, shared keys and values, index, cross-decoder."""

    def __init__(self, vllm_config: Any, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config, self.first = config, config.self_layers
        self.longest = vllm_config.model_config.max_model_len
        self.most_rows = vllm_config.scheduler_config.max_num_seqs
        self.early_exit = exits_early(config)
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList()
        for number in range(config.num_hidden_layers):
            name = f"{prefix}.layers.{number}"
            attention: nn.Module = (
                SelfAttention(config, vllm_config.cache_config, f"{name}.self_attn")
                if number < self.first
                else CrossAttention(config, f"{name}.self_attn")
            )
            self.layers.append(Layer(config, attention, name))
        if config.mode != "transformer":
            self.memory_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.shared_kv = SharedKV(config, f"{prefix}.shared_kv")
            # vLLM sorts layers by the number in their names.
            first = f"{prefix}.layers.{self.first}"
            self.shared_cache = TokenCache(self.shared_kv.size, f"{first}.shared_kv")
        if config.mode == "clsa":
            self.indexer = Indexer(config, f"{prefix}.indexer")
            self.index_cache = TokenCache(config.index_head_dim, f"{first}.index")
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, input_ids: Tensor, positions: Tensor, embeds: Tensor | None) -> Tensor:
        """Hidden states [T, hidden]; those of tokens that leave early mean nothing."""
        x = self.embed_tokens(input_ids) if embeds is None else embeds
        rest: Tensor | None = None
        for layer in self.layers[: self.first]:
            x, rest = layer(x, rest, positions)
        if self.config.mode == "transformer":
            return normed_sum(self.norm, x, rest)[0]
        memory, x = normed_sum(self.memory_norm, x, rest)
        return self._cross(x, memory)

    def _cross(self, x: Tensor, memory: Tensor) -> Tensor:
        """The cross-decoder over x [T, hidden], or over the rows' last tokens."""
        self.shared_cache.write(self.shared_kv(memory))
        query: Tensor | None = None
        if self.config.mode == "clsa":
            query, keys = self.indexer(memory)
            self.index_cache.write(keys)
        metadata = self.shared_cache.metadata()
        if metadata is None:
            return self._profile(x)
        asked = queries(metadata, x.shape[0], self.early_exit)
        reads = self._reads(asked, metadata, query)
        return asked.put(self._decode(asked.take(x), reads.attend), x.shape[0])

    def _decode(self, x: Tensor, attend: Attend) -> Tensor:
        """The layers of the cross-decoder, and the last norm."""
        rest: Tensor | None = None
        for layer in self.layers[self.first :]:
            x, rest = layer(x, rest, attend)
        return normed_sum(self.norm, x, rest)[0]

    def _reads(self, asked: Queries, metadata: CacheMetadata, query: Tensor | None) -> Reads:
        """What the queries read, found once for all layers."""
        k, v = self.shared_kv.views(self.shared_cache.blocks)
        reads = Reads(k, v, asked.table(self.shared_cache, metadata), asked.lengths)
        index = self.index_cache.metadata() if query is not None else None
        if query is not None and index is not None:
            reads.ids, reads.counts = select(
                asked.take(query),
                self.index_cache.blocks,
                asked.table(self.index_cache, index),
                asked.lengths,
                self.config.index_topk,
            )
        return reads

    def _profile(self, x: Tensor) -> Tensor:
        """As much memory as a batch may take, for vLLM's first run, which has no batch."""
        asked = x[: self.most_rows] if self.early_exit else x
        if self.config.mode == "clsa":
            # Scores, and what sorts them.
            rows = min(asked.shape[0], CHUNK)
            torch.empty(2, rows, self.longest, dtype=torch.float32, device=x.device)
        return torch.cat((self._decode(asked, torch.zeros_like), x[asked.shape[0] :]))


class ClsaForCausalLM(nn.Module):
    """CLSA with a language-model head."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        self.model = ClsaModel(vllm_config, f"{prefix}.model" if prefix else "model")
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size)
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        # Who has a model's weights may replace some of them later.
        self.unfilled = vllm_config.load_config.load_format != "dummy"

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embeddings [T, hidden]."""
        out: Tensor = self.model.embed_tokens(input_ids)
        return out

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [T, hidden] of the tokens of a batch."""
        out: Tensor = self.model(input_ids, positions, inputs_embeds)
        return out

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits [Q, vocabulary] of the hidden states that vLLM picks."""
        logits: Tensor | None = self.logits_processor(self.lm_head, hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint of the Transformers model; returns what was loaded.

        ModelConfigError for weights that the model has not, and at first for missing ones.
        """
        parameters = dict(self.named_parameters())
        loaded: set[str] = set()
        missing = {name: _parts_of(name, self.model.first) for name in parameters}
        for saved, weight in weights:
            if self.config.tie_word_embeddings and saved.startswith("lm_head."):
                continue
            name, part = _place(saved, self.model.first)
            if part not in missing.get(name, ()):
                raise ModelConfigError(f"a checkpoint has {saved}, {self._told()} has not")
            missing[name].remove(part)
            parameter = parameters[name]
            loader = getattr(parameter, "weight_loader", default_weight_loader)
            if part is None:
                loader(parameter, weight)
            else:
                loader(parameter, weight, part)
            loaded.add(name)
        # vLLM itself asks for no weights of linear layers.
        left = [name for name, parts in missing.items() if parts]
        if left and self.unfilled:
            raise ModelConfigError(f"a checkpoint has not all of {left[0]}, {self._told()} has it")
        self.unfilled = False
        return loaded

    def _told(self) -> str:
        """What the configuration says, in an error about weights."""
        return f"and a model of mode {self.config.mode!r} with {len(self.model.layers)} layers"


def _parts_of(name: str, first: int) -> set[Any]:
    """Parts of which a checkpoint makes a parameter here; None for all of it."""
    *before, owner, last, _ = ("", "", *name.split("."))
    parts = _PARTS.get(owner, {})
    if owner == "self_attn" and int(before[-1]) < first:
        parts = _SELF
    return {part for whole, part in parts.values() if whole == last} or {None}


def _place(name: str, first: int) -> tuple[str, Any]:
    """The parameter that a checkpoint's weight belongs to, and which part of it it is."""
    *before, owner, last, kind = ("", *name.split("."))
    parts = _PARTS.get(owner, {})
    if owner == "self_attn" and int(before[-1]) < first:
        parts = _SELF
    if last not in parts:
        return name, None
    whole, part = parts[last]
    return ".".join([*before[1:], owner, whole, kind]), part
