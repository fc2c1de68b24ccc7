"""The shape of a CLSA model, and the two dense models that it is compared with."""

from __future__ import annotations

import math
from typing import Any

from transformers.configuration_utils import PretrainedConfig

from deltadecode.errors import ArgumentTypeError, ModelConfigError

MODES = ("clsa", "yoco", "transformer")
_OWN_ATTENTION = {
    "clsa": "selects the tokens that it reads by itself",
    "yoco": "of mode 'yoco' attends by code of its own to keys and values that its layers share",
    # Of Transformers alone: in vLLM its layers are stock ones.
    "transformer": "of mode 'transformer' attends without the attention interface of Transformers",
}


class ClsaConfig(PretrainedConfig):
    """Configuration of :class:`ClsaForCausalLM`; the defaults are the paper's 4 B shape.

    Parameters
    ----------
    mode
        ``"clsa"``: the cross-decoder attends to the tokens of the index. ``"yoco"``: to all tokens,
        and there is no index. ``"transformer"``: every layer has keys and values of its own and
        attends to all tokens.
    num_hidden_layers
        Even: the first half is the self-decoder, the second the cross-decoder.
    sliding_window
        Tokens that a layer of the self-decoder attends to, the new one included.
    rope_theta
        Base of the rotary positions of the self-decoder, and of all layers of a Transformer. By
        default 1e4, and 5e5 for a Transformer. The cross-decoder has no positions.
    index_topk
        Tokens that the index selects, k. With k tokens or fewer, CLSA is YOCO.
    index_head_dim
        Size of the index's one head.
    max_position_embeddings
        Longest context in tokens.

    Raises
    ------
    ModelConfigError
        With the offending value and the rule.
    """

    model_type = "clsa"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size: int = 151_936,
        hidden_size: int = 2560,
        intermediate_size: int = 7680,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 20,
        num_key_value_heads: int = 4,
        head_dim: int = 128,
        mode: str = "clsa",
        sliding_window: int = 512,
        rope_theta: float | None = None,
        index_topk: int = 2048,
        index_head_dim: int = 128,
        max_position_embeddings: int = 131_072,
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = True,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.mode = mode
        self.sliding_window = sliding_window
        if rope_theta is None:
            rope_theta = 5e5 if mode == "transformer" else 1e4
        self.rope_theta = rope_theta
        self.index_topk = index_topk
        self.index_head_dim = index_head_dim
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.tie_word_embeddings = tie_word_embeddings
        self.check()
        self._check_positions(kwargs)
        super().__init__(**kwargs)
        # The base class of some versions has no such parameter, of others a default.
        self.tie_word_embeddings = tie_word_embeddings

    @property
    def own_attention(self) -> str:
        """How the model attends, in words that say why DELTA cannot plan it."""
        return _OWN_ATTENTION[self.mode]

    @property
    def self_layers(self) -> int:
        """Layers of the self-decoder; all of a Transformer's."""
        layers: int = self.num_hidden_layers
        return layers if self.mode == "transformer" else layers // 2

    def check(self) -> None:
        """Refuse a shape that no model can have, in one line."""
        if self.mode not in MODES:
            raise ModelConfigError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window",
            "index_topk", "index_head_dim", "max_position_embeddings",
        ):  # fmt: skip
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ModelConfigError(f"{name} must be an integer of 1 or more, got {value!r}")
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise ModelConfigError(f"{name} must be a number greater than 0, got {value!r}")
        for name in ("tie_word_embeddings", "use_cache"):
            if type(getattr(self, name)) is not bool:
                raise ModelConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        layers = self.num_hidden_layers
        if layers % 2 and self.mode != "transformer":
            raise ModelConfigError(
                f"num_hidden_layers must be even, half self-decoder and half cross-decoder, "
                f"got {layers}"
            )
        heads, own = self.num_attention_heads, self.num_key_value_heads
        if heads % own:
            raise ModelConfigError(
                f"num_attention_heads must be a multiple of num_key_value_heads, "
                f"got {heads} and {own}"
            )
        if self.head_dim % 2:
            raise ModelConfigError(
                f"head_dim must be even for rotary positions, got {self.head_dim}"
            )
        self._check_positions(vars(self))

    def _check_positions(self, options: dict[str, Any]) -> None:
        """Refuse rotary positions of another kind, which Transformers writes in these words."""
        plain = {"rope_type": "default", "type": "default", "rope_theta": self.rope_theta}
        for name in ("rope_parameters", "rope_scaling"):
            given = options.get(name)
            if given is None or (isinstance(given, dict) and given.items() <= plain.items()):
                continue
            raise ModelConfigError(
                f"rotary positions of a CLSA model have rope_theta and nothing else, "
                f"got {name} {given!r}"
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a configuration from a checkpoint's; refuse what has other weights."""
        made_for = config_dict.get("model_type", cls.model_type)
        if made_for != cls.model_type:
            raise ModelConfigError(
                f"a checkpoint of model type {made_for!r} has no weights of a "
                f"{cls.model_type!r} model"
            )
        saved = config_dict.get("mode", "clsa")
        wanted = kwargs.get("mode", saved)
        if wanted != saved:
            raise ModelConfigError(
                f"a checkpoint of mode {saved!r} has not the weights of mode {wanted!r}"
            )
        layers = config_dict.get("num_hidden_layers")
        if saved != "transformer" and kwargs.get("num_hidden_layers", layers) != layers:
            raise ModelConfigError(
                f"a checkpoint of {layers} layers, half of them self-decoder, has not the weights "
                f"of {kwargs['num_hidden_layers']!r}"
            )
        made = super().from_dict(config_dict, **kwargs)
        (made[0] if isinstance(made, tuple) else made).check()
        return made


def check_config(config: Any) -> None:
    """Refuse another model's configuration, or a model, in one line (ArgumentTypeError)."""
    if not isinstance(config, ClsaConfig):
        raise ArgumentTypeError(f"config must be a ClsaConfig, got {type(config).__name__}")
