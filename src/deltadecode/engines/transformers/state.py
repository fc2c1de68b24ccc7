"""What DELTA knows of a model, and what it hangs on each of its attention modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from deltadecode.architecture import attention_layers, longest_prompt, num_layers, text_config
from deltadecode.config import DeltaConfig
from deltadecode.engines.times import Times
from deltadecode.engines.transformers.layer_graphs import LayerGraphs
from deltadecode.engines.transformers.planned import PlannedKernels
from deltadecode.engines.transformers.stats import DecodeStats
from deltadecode.engines.transformers.step import LocalPass, StaticPass

NAME = "delta"
# Where a module carries its role.
ROLE = "_deltadecode_role"


class ModelState:
    """Plan, counts and current forward pass of one model.

    A copy or a pickle has the same plan, and counts of its own.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        The configuration object that the attention modules hold: it says how they attend now.
    cfg : DeltaConfig or None
        None takes :meth:`DeltaConfig.for_model`.
    previous : str or None
        Attention implementation that ``disable`` restores; None: the model's default.
    draft_tokens : int
        Largest number of drafts before a verification, in lossless mode; 0 otherwise.
    draft_fixed : bool
        Always draft so many, where there are pages to read.
    kv_dtype : str or None
        That of the caches which ``generate`` and ``forward`` make.
    layer_graphs : bool
        Run decoder layers as CUDA graphs at decode steps from growing caches.

    Raises
    ------
    DeltaConfigError
        When the plan does not fit the model (R9).
    """

    def __init__(
        self,
        config: Any,
        cfg: DeltaConfig | None,
        previous: str | None,
        draft_tokens: int = 0,
        draft_fixed: bool = True,
        kv_dtype: str | None = None,
        layer_graphs: bool = False,
    ) -> None:
        text = text_config(config)
        layers = attention_layers(text)
        self.config, self.previous = config, previous
        self.draft_tokens, self.draft_fixed = draft_tokens, draft_fixed
        self.kv_dtype = kv_dtype
        self.graphs = LayerGraphs() if layer_graphs else None
        self.cfg = DeltaConfig.for_model(text) if cfg is None else cfg
        self.plan = self.cfg.layer_plan(num_layers(text), layers)
        self.first, self.last = layers[0], layers[-1]
        self.longest = longest_prompt(text)
        self.stats = DecodeStats(self.plan, lossless=self.draft_tokens > 0)
        self.local = LocalPass()
        self.static = StaticPass()
        self.kernels = PlannedKernels()
        # Of lossless decoding from static caches, with its graphs.
        self.kept_cache: Any = None
        self._times: dict[tuple[int, int], Times] = {}

    @property
    def active(self) -> bool:
        """Whether the modules attend with DELTA now, and not with another implementation."""
        return bool(self.config._attn_implementation == NAME)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle the plan alone."""
        drafts = self.draft_tokens, self.draft_fixed
        own = self.kv_dtype, self.graphs is not None
        return type(self), (self.config, self.cfg, self.previous, *drafts, *own)

    def times_of(self, rows: int, tokens: int) -> Times:
        """What lossless decoding took with so many rows and about so many tokens of each."""
        return self._times.setdefault((rows, tokens.bit_length()), Times())

    def prepare_counts(self, layer: int, device: torch.device) -> None:
        """Make what a layer counts in at steps from a static cache, before they are compiled."""
        if layer == self.first or self.plan.roles[layer] == "delta":
            self.stats.device_counts(layer, device)


@dataclass(eq=False)
class Role:
    """What one attention module does; ``own``: as if DELTA were not there.

    A layer that is copied alone stays with the state of its model.
    """

    state: ModelState
    layer: int
    kind: str
    source: int | None

    def __deepcopy__(self, memo: dict[int, Any]) -> Role:
        state = memo.get(id(self.state), self.state)
        return Role(state, self.layer, self.kind, self.source)
