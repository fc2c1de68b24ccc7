"""What a user configures: the object ``deltadecode`` of the engine's additional configuration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, get_args

from deltadecode.architecture import attention_layers, num_layers, text_config
from deltadecode.config import DeltaConfig, LayerPlan
from deltadecode.errors import DeltaConfigError

KEY = "deltadecode"
OnUnsupported = Literal["error", "stock"]
_CONFIG_KEYS = tuple(field.name for field in fields(DeltaConfig))
_ANY_BUDGET = 1 << 30
_OWN_KEYS = ("plan", "sync_heads", "on_unsupported", "min_tokens")


@dataclass(frozen=True)
class ServingSettings:
    """A plan for one model, and how the engine runs it.

    Attributes
    ----------
    config : DeltaConfig
        Page budget and layers.
    plan : LayerPlan
        Role of every layer of the model.
    sync_heads : bool
        Under tensor parallelism, select by the maximum over the query heads of all ranks (R2) and
        not of each rank alone; costs a reduction over every token in each Δ-layer.
    on_unsupported : {"error", "stock"}
        What to do with a model that has nothing to plan.
    min_tokens : int
        A decode step that sees fewer tokens reads every page: sparsity pays beyond; 0 for none.
        :func:`resolve` takes the budget for a default, within which there is nothing to leave out.
    """

    config: DeltaConfig
    plan: LayerPlan
    sync_heads: bool = False
    on_unsupported: OnUnsupported = "error"
    min_tokens: int = 0

    def as_dict(self) -> dict[str, Any]:
        """JSON values from which :func:`resolve` makes these settings, with nothing to look up."""
        own = {
            "sync_heads": self.sync_heads,
            "on_unsupported": self.on_unsupported,
            "min_tokens": self.min_tokens,
        }
        return {**self.config.to_dict(), **own}

    @property
    def reads_more_when_short(self) -> bool:
        """Whether ``min_tokens`` goes beyond the budget, and so changes what a step reads."""
        return self.min_tokens > budget_tokens(self.config)

    def within(self, longest: int) -> ServingSettings:
        """What reads the same of sequences of up to ``longest`` tokens, by numbers no larger.

        A table of pages has a column for each page of the budget, and a device's numbers an end.
        """
        config = self.config
        pages = -(-longest // config.page_size)
        recent, sinks = min(config.recent_pages, pages), min(config.sink_pages, pages)
        budget = min(config.budget_pages, max(pages, recent + sinks + 1))
        config = replace(config, budget_pages=budget, recent_pages=recent, sink_pages=sinks)
        least = budget_tokens(config)
        if self.min_tokens != budget_tokens(self.config):
            least = min(self.min_tokens, max(longest, least) + 1)
        return replace(self, config=config, min_tokens=least)

    @cached_property
    def cache_salt(self) -> str:
        """Digest of what decides the keys and values that decoded tokens leave in a cache (R1)."""
        values = {k: v for k, v in self.as_dict().items() if k != "on_unsupported"}
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
        return f"deltadecode-{digest.hexdigest()[:16]}"

    @cached_property
    def layer_counts(self) -> tuple[int, int]:
        """How many layers are sparse, and how many are planned."""
        roles = self.plan.roles
        return sum(role == "sparse" for role in roles), len(self.plan.attention_layers)


def budget_tokens(config: DeltaConfig) -> int:
    """Tokens of the page budget K · P; a share of the pages may make it more."""
    return config.page_size * config.budget_pages


def own_settings(user_values: object) -> tuple[dict[str, Any], bool, OnUnsupported, int | None]:
    """Check the keys that need no model.

    ``user_values`` is the object ``deltadecode``, None for none. Returns the fields of a
    :class:`DeltaConfig` (and perhaps ``plan``), ``sync_heads``, ``on_unsupported`` and
    ``min_tokens``, None where it is not given. Raises DeltaConfigError for an unknown key or a
    value of a wrong type.
    """
    if user_values is None:
        user_values = {}
    if not isinstance(user_values, Mapping):
        raise DeltaConfigError(f"additional_config.{KEY} must be an object, got {user_values!r}")
    values = dict(user_values)
    known = (*_CONFIG_KEYS, *_OWN_KEYS)
    for key in values:
        if key not in known and key != "meta":
            raise DeltaConfigError(
                f"unknown key {key!r} in additional_config.{KEY}; it has {', '.join(known)}"
            )
    sync_heads = values.pop("sync_heads", False)
    if not isinstance(sync_heads, bool):
        raise DeltaConfigError(f"sync_heads must be true or false, got {sync_heads!r}")
    on_unsupported = values.pop("on_unsupported", "error")
    if on_unsupported not in get_args(OnUnsupported):
        raise DeltaConfigError(f"on_unsupported must be 'error' or 'stock', got {on_unsupported!r}")
    min_tokens = values.pop("min_tokens", None)
    if min_tokens is not None and (type(min_tokens) is not int or min_tokens < 0):
        raise DeltaConfigError(f"min_tokens must be an int of at least 0, got {min_tokens!r}")
    if not isinstance(values.get("plan", ""), str):
        raise DeltaConfigError(f"plan must be the path of a JSON file, got {values['plan']!r}")
    return values, sync_heads, on_unsupported, min_tokens


def resolve(user_values: object, model_config: Any) -> ServingSettings:
    """Settings of one model, from its Hugging Face configuration.

    ``user_values`` is as in :func:`own_settings`. Its fields replace those of the file ``plan`` or,
    without one, those of :meth:`DeltaConfig.for_model`.

    Raises
    ------
    DeltaConfigError
        When a key, a type or a rule of the plan is broken (R9).
    UnsupportedModelError
        When the model has nothing to plan (R8).
    """
    values, sync_heads, on_unsupported, min_tokens = own_settings(user_values)
    path = values.pop("plan", None)
    meta = values.pop("meta", {})
    # Before the model is looked at: a wrong type is the user's mistake whatever the model is.
    loaded = DeltaConfig.load(path) if path is not None else None
    DeltaConfig.from_dict({**_defaults(loaded, values), **values, "meta": meta})
    layers = attention_layers(model_config)
    base = loaded or DeltaConfig.for_model(model_config)
    config = DeltaConfig.from_dict({**asdict(base), **values})
    plan = config.layer_plan(num_layers(text_config(model_config)), layers)
    if min_tokens is None:
        min_tokens = budget_tokens(config)
    return ServingSettings(config, plan, sync_heads, on_unsupported, min_tokens)


def _defaults(loaded: DeltaConfig | None, values: Mapping[str, Any]) -> dict[str, Any]:
    # Values that go with any that the user names: the model's own are not known yet.
    if loaded is not None:
        return asdict(loaded)
    pages = {"budget_pages": _ANY_BUDGET, "recent_pages": 0, "sink_pages": 0}
    return {"dense_layers": (), "delta_layers": (), **pages}
