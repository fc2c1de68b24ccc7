"""CLSA as Transformers classes (docs/clsa.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.generation.utils import GenerationMixin
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import ModelOutput, can_return_tuple

from deltadecode.errors import ArgumentError, UnsupportedCacheError, UnsupportedModelError
from deltadecode.models.clsa.attention import (
    Attend,
    Full,
    Masked,
    Observed,
    Window,
    index_loss_of,
    largest,
    seen,
)
from deltadecode.models.clsa.cache import ClsaCache, check_cache
from deltadecode.models.clsa.configuration import ClsaConfig, check_config
from deltadecode.models.clsa.decode import pick, rows_of
from deltadecode.models.clsa.inputs import (
    check_input,
    check_length,
    check_places,
    refuse_beside_static,
    refuse_weights,
    valid_tokens,
)
from deltadecode.models.clsa.layers import (
    ClsaCrossLayer,
    ClsaIndexer,
    ClsaRMSNorm,
    ClsaSelfLayer,
    ClsaSharedKV,
    rotary,
)
from deltadecode.models.clsa.static import ClsaStaticCache, step_logits


@dataclass
class ClsaOutput(ModelOutput):
    """What a forward pass gives.

    Attributes
    ----------
    loss, logits
        Of :class:`ClsaForCausalLM`; the logits of the tokens kept, [B, kept, vocabulary].
    last_hidden_state
        Of :class:`ClsaModel`, [B, kept, hidden].
    past_key_values
        The cache.
    hidden_states
        Input of each layer, and the last one's output behind the last norm, if asked for. Those of
        the cross-decoder are of the tokens kept.
    index_loss
        KL divergence of the index's softmax from the mean dense attention, in nats a token, if
        asked for.
    index_coverage
        Share of that attention that lies on the tokens which the index picks.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    index_loss: Tensor | None = None
    index_coverage: Tensor | None = None


class ClsaPreTrainedModel(PreTrainedModel):
    """What both classes tell Transformers."""

    config_class = ClsaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    config: ClsaConfig
    _no_split_modules = ["ClsaSelfLayer", "ClsaCrossLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True


class ClsaModel(ClsaPreTrainedModel):
    """Self-decoder, shared keys and values, index, cross-decoder."""

    def __init__(self, config: ClsaConfig) -> None:
        check_config(config)
        config.check()
        super().__init__(config)
        first, layers = config.self_layers, config.num_hidden_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ClsaSelfLayer(config, layer) for layer in range(first))
        self.layers.extend(ClsaCrossLayer(config) for _ in range(layers - first))
        if first < layers:
            self.memory_norm = ClsaRMSNorm(config.hidden_size, config.rms_norm_eps)
            self.shared_kv = ClsaSharedKV(config)
        if config.mode == "clsa":
            self.indexer = ClsaIndexer(config)
        self.norm = ClsaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:  # type: ignore[override]
        """Replace the token embedding."""
        self.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        index_loss: bool = False,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> ClsaOutput:
        """Hidden states of the last ``logits_to_keep`` tokens, or of all.

        Only those go through the cross-decoder: all others leave after the self-decoder, once their
        shared keys and values are made. ``attention_mask`` is [B, tokens so far], 0 for padding.

        Raises
        ------
        ArgumentError
            For a context past the model's positions, another mask, or an index that is not there.
        UnsupportedCacheError
            For another class of cache.
        """
        config = self.config
        refuse_weights(config, kwargs)
        check_input(input_ids, inputs_embeds, position_ids)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        cache = self._cache(past_key_values, use_cache)
        past = 0 if cache is None else cache.get_seq_length()
        new, tokens = x.shape[1], past + x.shape[1]
        check_length(config, tokens)
        if position_ids is None:
            position_ids = torch.arange(past, tokens, device=x.device)[None]
        valid = valid_tokens(attention_mask, x.shape[0], tokens)
        states = [x] if output_hidden_states else None
        attend: Attend
        if config.mode == "transformer":
            attend = Full(new, tokens, valid, x.device)
        else:
            attend = Window(new, tokens, config.sliding_window, valid, x.device)
        turn = rotary(config, position_ids, x.dtype)
        for layer in self.layers[: config.self_layers]:
            x = _noted(layer(x, turn, attend, cache), states)
        found: dict[str, Tensor] = {}
        if config.mode != "transformer":
            x = self._cross(x, tokens, valid, cache, logits_to_keep, index_loss, states, found)
        elif index_loss:
            raise ArgumentError("a Transformer has no index to learn")
        else:
            x = x[:, -logits_to_keep:]
        x = self.norm(x)
        if states is not None:
            # As in other models, the last one is what the head reads.
            states[-1] = x
        return ClsaOutput(
            last_hidden_state=x,
            past_key_values=cache,
            hidden_states=None if states is None else tuple(states),
            **found,
        )

    def _cache(self, given: Any, use_cache: bool | None) -> ClsaCache | None:
        """The cache that a forward pass fills, if any."""
        # Without gradients nothing is recomputed, as when a model in training generates.
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if given is not None:
                raise UnsupportedCacheError(
                    "gradient checkpointing computes layers twice, so past_key_values cannot be "
                    f"given, got a {type(given).__name__}"
                )
            return None
        check_cache(given, self.config)
        if isinstance(given, ClsaStaticCache):
            raise UnsupportedCacheError("only ClsaForCausalLM decodes from a ClsaStaticCache")
        if given is not None:
            cache: ClsaCache = given
            return cache
        wanted = self.config.use_cache if use_cache is None else use_cache
        return ClsaCache(self.config) if wanted else None

    def _cross(
        self,
        x: Tensor,
        tokens: int,
        valid: Tensor | None,
        cache: ClsaCache | None,
        kept: int,
        index_loss: bool,
        states: list[Tensor] | None,
        found: dict[str, Tensor],
    ) -> Tensor:
        """The cross-decoder over the ``kept`` last tokens of x [B, Q, hidden]; 0: all of them."""
        memory, keep = self.memory_norm(x), slice(-kept, None)
        k, v = self.shared_kv(memory)
        if cache is not None:
            k, v = cache.update_shared(k, v)
        x = x[:, keep]
        attend: Attend = Full(x.shape[1], tokens, valid, x.device)
        query = keys = None
        if self.config.mode == "clsa":
            query, keys = self.indexer(memory, keep)
            keys = keys if cache is None else cache.update_index(keys)
            if tokens > self.config.index_topk:
                attend = self._selected(query, keys, valid)
        observed = None
        if index_loss:
            if query is None or keys is None:
                raise ArgumentError("a model of mode 'yoco' has no index to learn")
            crossing = self.config.num_hidden_layers - self.config.self_layers
            attend = observed = Observed(
                attend, seen(x.shape[1], tokens, valid, x.device), crossing, x.shape[0]
            )
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        for layer in self.layers[self.config.self_layers :]:
            x = _noted(layer(x, k, v, attend), states)
        if observed is not None and query is not None and keys is not None:
            real = None if valid is None else valid[:, tokens - x.shape[1] :]
            found |= index_loss_of(observed, query, keys, real, self.config.index_topk)
        return x

    def _selected(self, query: Tensor, keys: Tensor, valid: Tensor | None) -> Attend:
        """How the cross-decoder attends to the tokens that the index picks, once for all layers."""
        if query.shape[1] == 1 and not torch.is_grad_enabled():
            table, lengths = rows_of(keys, valid)
            return pick(query[:, 0], keys, table, lengths, self.config.index_topk)
        held = seen(query.shape[1], keys.shape[1], valid, keys.device)
        # In float32 at least, as the operation of a step has them: no ties of their rounding.
        exact = torch.promote_types(query.dtype, torch.float32)
        with torch.autocast(query.device.type, enabled=False):
            scores = (query.to(exact) @ keys.to(exact).transpose(1, 2)).detach()[:, None]
        return Masked(largest(scores, held.expand_as(scores), self.config.index_topk))


class ClsaForCausalLM(ClsaPreTrainedModel, GenerationMixin):
    """CLSA with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: ClsaConfig) -> None:
        super().__init__(config)
        self.model = ClsaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> ClsaOutput:
        """Logits of the tokens kept, and the loss of ``labels`` [B, Q], -100 where none counts."""
        refuse_weights(self.config, kwargs)
        if isinstance(past_key_values, ClsaStaticCache):
            refuse_beside_static(self.config, labels, kwargs)
            return self._static(
                input_ids, inputs_embeds, attention_mask, position_ids, past_key_values,
                logits_to_keep,
            )  # fmt: skip
        last = logits_to_keep if isinstance(logits_to_keep, int) else 0
        flags = ("index_loss", "output_hidden_states")
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            logits_to_keep=last,
            return_dict=True,
            **{name: kwargs.pop(name) for name in flags if name in kwargs},
        )
        x = out.last_hidden_state
        if not isinstance(logits_to_keep, int):
            x = x[:, logits_to_keep]
        logits = self.lm_head(x)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return ClsaOutput(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            index_loss=out.index_loss,
            index_coverage=out.index_coverage,
        )

    @torch.no_grad()
    def _static(
        self,
        ids: Tensor | None,
        embeds: Tensor | None,
        mask: Tensor | None,
        positions: Tensor | None,
        cache: ClsaStaticCache,
        kept: int | Tensor,
    ) -> ClsaOutput:
        """Logits of a prompt, the last or those kept, or of one more token a row."""
        check_cache(cache, self.config)
        if cache.seen == 0:
            rows, tokens = check_input(ids, embeds, positions).shape[:2]
            prompt, valid = ClsaCache(self.config), valid_tokens(mask, rows, tokens)
            # Steps count a row's own tokens, so its prompt must as well.
            places = None if valid is None else (valid.cumsum(1) - 1).clamp(min=0)
            check_places(positions, places, valid)
            logits = self(
                ids, inputs_embeds=embeds, attention_mask=mask, position_ids=places,
                past_key_values=prompt,
                logits_to_keep=1 if isinstance(kept, int) and kept == 0 else kept,
            ).logits  # fmt: skip
            cache.load(prompt, valid)
            cache.serve(self)
        else:
            logits = step_logits(self, cache, ids)
        return ClsaOutput(logits=logits, past_key_values=cache)

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Give ``generate`` a cache of this model's own kind."""
        # All tokens but the last are in the cache; of embeddings, max_length has not the prompt.
        tokens = max_cache_length + 1
        given, wanted = model_kwargs.get("past_key_values"), generation_config.cache_implementation
        check_cache(given, self.config)
        if max_cache_length > self.config.max_position_embeddings:
            check_length(self.config, tokens)  # the last token written is never read
        if getattr(generation_config, "assistant_early_exit", None) is not None:
            raise ArgumentError(
                "a CLSA model cannot draft with its first layers, since all behind the first half "
                f"share a cache, got assistant_early_exit="
                f"{generation_config.assistant_early_exit!r}"
            )
        if wanted not in (None, "dynamic", "static"):
            raise UnsupportedCacheError(
                "a CLSA model keeps its tokens in a ClsaCache or a ClsaStaticCache, got "
                f"cache_implementation {wanted!r}"
            )
        if given is not None and wanted is not None:
            raise ArgumentError(
                "give past_key_values or cache_implementation, one of them, got a "
                f"{type(given).__name__} and {wanted!r}"
            )
        if given is not None or generation_config.use_cache is False:
            return
        cache: Any
        if wanted == "static":
            # As many rows as the batch has once sequences and beams are made of its rows.
            copies = max(
                generation_config.num_beams or 1, generation_config.num_return_sequences or 1
            )
            rows = batch_size * copies
            cache = ClsaStaticCache(self.config, rows, tokens, self.dtype, self.device)
        else:
            cache = ClsaCache(self.config)
            if getattr(generation_config, "is_assistant", False):
                cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: it keeps the tokens of many requests in memory of its own."""
        raise UnsupportedModelError(
            "a CLSA model keeps its tokens in a ClsaCache, so Transformers cannot batch requests "
            "continuously; vLLM does"
        )


def _noted(x: Tensor, states: list[Tensor] | None) -> Tensor:
    """Keep a hidden state where they are asked for: of a long prompt they are many bytes."""
    if states is not None:
        states.append(x)
    return x


AutoModel.register(ClsaConfig, ClsaModel, exist_ok=True)
AutoModelForCausalLM.register(ClsaConfig, ClsaForCausalLM, exist_ok=True)
