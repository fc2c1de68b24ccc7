"""Models of the end-to-end benchmark: random weights in the shapes of known ones."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltadecode.config import DeltaConfig
from deltadecode.engines.serving.counts import attended_tokens
from deltadecode.engines.serving.settings import ServingSettings

_BYTES = {"auto": 2, "fp8": 1}  # of a number in the cache, by its dtype; weights are bfloat16


@dataclass(frozen=True)
class ModelShape:
    """What a model's speed depends on, and the plan that it is measured with."""

    name: str  # as --shape takes it
    architecture: str  # Llama, Qwen2 or Qwen3
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    positions: int
    plan: DeltaConfig  # unless another one is given
    plan_note: str  # where it comes from
    eager: bool = False  # without compilation and graphs, for tests on the CPU

    @property
    def parameters(self) -> int:
        """Weights of the model, embedding and output matrix not shared."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        # Qwen2 has biases on queries, keys and values; Qwen3 norms of queries and keys instead.
        extras = {"Llama": 0, "Qwen2": queries + 2 * keys, "Qwen3": 2 * self.head_dim}
        attention = self.hidden * (2 * queries + 2 * keys) + extras[self.architecture]
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.layers * layer + 2 * self.vocabulary * self.hidden + self.hidden

    def kv_bytes(self, kv_cache_dtype: str = "auto") -> int:
        """Bytes of KV cache per token, all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * _BYTES[kv_cache_dtype]

    def gain_by_bytes(self, batch: int, context: int, kv_cache_dtype: str = "auto") -> float:
        """Time of a decode step of full attention over DELTA's, if bytes read were all its cost.

        Both read all weights, but of the embedding only a row for each token.
        """
        settings = ServingSettings(self.plan, self.plan.layer_plan(self.layers))
        attended, full = attended_tokens(settings, context)
        weights = _BYTES["auto"] * (self.parameters - self.vocabulary * self.hidden)
        cache = batch * context * self.kv_bytes(kv_cache_dtype)
        return (weights + cache) / (weights + cache * attended / full)

    def config(self) -> dict[str, Any]:
        """The model's ``config.json``."""
        return {
            "architectures": [f"{self.architecture}ForCausalLM"],
            "model_type": self.architecture.lower(), "torch_dtype": "bfloat16",
            "hidden_size": self.hidden, "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "vocab_size": self.vocabulary, "max_position_embeddings": self.positions,
            "rope_theta": 1000000.0 if self.architecture == "Qwen3" else 10000.0,
            "rms_norm_eps": 1e-6, "hidden_act": "silu", "use_sliding_window": False,
            "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
        }  # fmt: skip

    def write(self, folder: Path) -> Path:
        """Write the model's folder, without weights."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.config(), indent=2)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        return folder


_SHAPES = (
    ModelShape(
        name="r1-1.5b", architecture="Qwen2", layers=28, hidden=1536, intermediate=8960,
        heads=12, kv_heads=2, head_dim=128, vocabulary=151936, positions=131072,
        plan=DeltaConfig(sink_pages=0, delta_layers=(2, 14, 22)),
        plan_note="the plan of arXiv 2510.09883 for DeepSeek-R1-Distill-Qwen-1.5B",
    ),
    ModelShape(
        name="qwen3-8b", architecture="Qwen3", layers=36, hidden=4096, intermediate=12288,
        heads=32, kv_heads=8, head_dim=128, vocabulary=151936, positions=40960,
        plan=DeltaConfig(sink_pages=0, delta_layers=(2, 18, 28)),
        plan_note="the proportions of the plan for 28 layers; not calibrated",
    ),
    ModelShape(
        name="smollm2", architecture="Llama", layers=30, hidden=576, intermediate=1536,
        heads=9, kv_heads=3, head_dim=64, vocabulary=49152, positions=8192,
        plan=DeltaConfig(), plan_note="the defaults of DeltaConfig",
    ),
    ModelShape(
        name="tiny", architecture="Qwen2", layers=6, hidden=128, intermediate=128,
        heads=4, kv_heads=2, head_dim=32, vocabulary=512, positions=4096, eager=True,
        plan=DeltaConfig(
            budget_pages=4, recent_pages=1, sink_pages=0, dense_layers=(0,), delta_layers=(1, 3)
        ),
        plan_note="for tests; says nothing about speed",
    ),
)  # fmt: skip
SHAPES = {shape.name: shape for shape in _SHAPES}


def find_shape(name: str) -> ModelShape:
    """Shape of a name of :data:`SHAPES`; a ValueError for another one."""
    if name not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {name!r}")
    return SHAPES[name]
