"""What DELTA knows of a model while it runs: its plan, its counts, and the step in progress."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltadecode.architecture import attention_layers, text_config
from deltadecode.config import DeltaConfig
from deltadecode.engines.transformers.rows import RowGroup, group_rows
from deltadecode.engines.transformers.stats import DecodeStats

if TYPE_CHECKING:
    from deltadecode.engines.transformers.static import StaticStep

# Of one Δ-layer: number of the row group -> page ids and page counts. A group within the budget
# selects nothing.
Selection = dict[int, tuple[Tensor, Tensor]]


@dataclass(eq=False)
class Step:
    """One decode step: where the rows lie, and the pages that Δ-layers have selected in it.

    Attributes
    ----------
    batch, slots : int
        Rows, and slots per row of the cache, the new one included.
    groups : list of RowGroup
        The rows by where their tokens lie.
    device : torch.device
        Where the tensors of ``groups`` are.
    mask : Tensor or None
        Attention mask that ``groups`` was read from.
    every_page : bool
        No row has more pages than the budget, so that every layer attends to everything (R3).
    full_tokens, sparse_tokens : int
        Tokens that a full and a sparse layer read, over all rows.
    selections : dict
        Δ-layer -> what it has selected in this step.
    """

    batch: int
    slots: int
    groups: list[RowGroup]
    device: torch.device
    mask: Tensor | None
    every_page: bool
    full_tokens: int
    sparse_tokens: int
    selections: dict[int, Selection] = field(default_factory=dict)


class _Progress(threading.local):
    """Per thread, so that two threads may decode with one model."""

    prefilling = False
    step: Step | None = None


class StaticProgress:
    """The forward pass in progress, as compiled graphs see it.

    Not per thread: what a compiled graph writes to a ``threading.local`` is lost, and it reads the
    defaults there. So only one thread at a time may use a model that decodes from a static cache.
    """

    def __init__(self) -> None:
        self.active = False  # whether the pass reads from a static cache
        self.prefilling = False
        self.step: StaticStep | None = None


class ModelState:
    """Plan, counts and current step of one model.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        Configuration of the text decoder.
    cfg : DeltaConfig or None
        None takes :meth:`DeltaConfig.for_model`.

    Raises
    ------
    DeltaConfigError
        When the plan does not fit the model (R9).
    UnsupportedModelError
        When the model has nothing that could be planned.
    """

    def __init__(self, config: Any, cfg: DeltaConfig | None) -> None:
        layers = attention_layers(config)
        self.cfg = DeltaConfig.for_model(config) if cfg is None else cfg
        self.plan = self.cfg.layer_plan(config.num_hidden_layers, layers)
        self.first, self.last = layers[0], layers[-1]
        self.stats = DecodeStats(self.plan)
        self.longest = longest_prompt(config)
        self.progress = _Progress()
        self.static = StaticProgress()

    def begin(self, layer: int, key: Tensor, mask: Tensor | None) -> Step:
        """The step that a layer is part of: a new one at the first planned layer.

        Parameters
        ----------
        layer : int
            The planned layer that runs now.
        key : Tensor
            [B, Hkv, slots, D], its keys.
        mask : Tensor or None
            Its attention mask.

        Returns
        -------
        Step
            Nothing in it is older than the current forward pass (R1).
        """
        progress = self.progress
        step = progress.step
        batch, _, slots, _ = key.shape
        if layer == self.first or step is None or step.batch != batch or step.slots != slots:
            step = progress.step = self._new_step(key, mask)
            if layer == self.first:
                self.stats.add_step(step.full_tokens, step.sparse_tokens)
        elif step.mask is not mask or (not step.every_page and step.device != key.device):
            # Another layer's view of the same step, as when the model spreads over devices.
            selections = step.selections
            step = progress.step = self._new_step(key, mask)
            step.selections = selections
        if layer == self.last:
            progress.step = None
        return step

    def prepare_counts(self, layer: int, device: torch.device) -> None:
        """Make what a layer counts in at steps from a static cache, before they are compiled.

        Parameters
        ----------
        layer : int
            Any layer; only the first planned one and Δ-layers count.
        device : torch.device
            Where its keys are.
        """
        if layer == self.first or self.plan.roles[layer] == "delta":
            self.stats.device_counts(layer, device)

    def _new_step(self, key: Tensor, mask: Tensor | None) -> Step:
        page, budget, recent = self.cfg.page_size, self.cfg.budget_pages, self.cfg.recent_pages
        groups = group_rows(mask, key)
        full = sparse = 0
        every_page = True
        for group in groups:
            rows, tokens = len(group.members), group.length
            pages = -(-tokens // page)
            full += rows * tokens
            if pages <= budget:
                sparse += rows * tokens
                continue
            every_page = False
            # The last page is partial and, if any recent page is forced, selected. Otherwise the
            # Δ-layer's selection says, and corrects the count.
            missing = pages * page - tokens if recent else 0
            sparse += rows * (budget * page - missing)
        return Step(
            batch=key.shape[0],
            slots=key.shape[2],
            groups=groups,
            device=key.device,
            mask=mask,
            every_page=every_page,
            full_tokens=full,
            sparse_tokens=sparse,
        )


def longest_prompt(config: Any) -> int | None:
    """Positions of a model, with what a stretched rotary embedding adds.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        Configuration of the text decoder.

    Returns
    -------
    int or None
        None when the configuration does not say.
    """
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    longest = positions
    for entry in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        factor = entry.get("factor") or 1.0
        # Some configurations state the stretched number, some the original one: allow the larger.
        original = entry.get("original_max_position_embeddings") or positions
        longest = max(longest, int(factor * original))
    return longest


# Keyed by identity, since configurations compare by value and cannot be hashed. The attention
# module of every layer holds the same configuration object as its model.
_STATES: dict[int, ModelState] = {}


def find_state(config: Any) -> ModelState | None:
    """State of the model with this very configuration object, if there is one.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        Configuration of the text decoder.

    Returns
    -------
    ModelState or None
    """
    return _STATES.get(id(config))


def set_state(config: Any, cfg: DeltaConfig | None) -> ModelState:
    """Make a new state for a model; it goes when the configuration object goes.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        Configuration of the model, or of its text decoder.
    cfg : DeltaConfig or None
        None takes :meth:`DeltaConfig.for_model`.

    Returns
    -------
    ModelState

    Raises
    ------
    DeltaConfigError, UnsupportedModelError
        As :class:`ModelState`; an older state is then kept.
    """
    config = text_config(config)
    state = ModelState(config, cfg)
    key = id(config)
    if key not in _STATES:
        weakref.finalize(config, _STATES.pop, key, None)
    _STATES[key] = state
    return state


def drop_state(config: Any) -> None:
    """Forget the state of a model.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        Configuration of the text decoder.
    """
    _STATES.pop(id(config), None)
