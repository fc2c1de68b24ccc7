"""DELTA and its peers, one file each, all on the protocol of :class:`Policy`.

>>> policy = make_policy("quest", model, budget=512)
>>> with policy.decoding(model):
...     model.generate(**inputs, past_key_values=dd.DeltaCache(model.config))

A name may be followed by options of the policy: ``delta:recent_pages=4``,
``tidal:layers=2+9``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from deltadecode.config import DeltaConfig
from deltadecode.errors import DeltaConfigError, PolicyError
from deltadecode.lab.policies.base import Counts, Layout, Policy
from deltadecode.lab.policies.delta import Delta
from deltadecode.lab.policies.delta_variants import DeltaVariant
from deltadecode.lab.policies.full import Full
from deltadecode.lab.policies.h2o import H2O
from deltadecode.lab.policies.kascade import Kascade
from deltadecode.lab.policies.keydiff import KeyDiff
from deltadecode.lab.policies.lessismore import LessIsMore
from deltadecode.lab.policies.omnikv import OmniKV
from deltadecode.lab.policies.oracle import Oracle
from deltadecode.lab.policies.quest import Quest
from deltadecode.lab.policies.raas import RaaS
from deltadecode.lab.policies.random_attention import RandomAttention
from deltadecode.lab.policies.random_pages import RandomPages
from deltadecode.lab.policies.snapkv import SnapKV
from deltadecode.lab.policies.streaming import Streaming
from deltadecode.lab.policies.tidal import Tidal

__all__ = [
    "POLICIES",
    "Counts",
    "Layout",
    "Policy",
    "make_policy",
    "parse_policy",
    "policy_class",
]

# Name -> class, and the options that make this name of it.
POLICIES: dict[str, tuple[type[Policy], dict[str, Any]]] = {
    "full": (Full, {}),
    "delta": (Delta, {}),
    "quest": (Quest, {}),
    "quest-kv": (Quest, {"shared": 1}),
    "tidal": (Tidal, {}),
    "tidal-kv": (Tidal, {"shared": 1}),
    "kascade": (Kascade, {}),
    "lessismore": (LessIsMore, {}),
    "omnikv": (OmniKV, {}),
    "streaming": (Streaming, {}),
    "h2o": (H2O, {}),
    "raas": (RaaS, {}),
    "raas-evict": (RaaS, {"keep_prompt": 0}),
    "snapkv": (SnapKV, {}),
    "keydiff": (KeyDiff, {}),
    "random-attention": (RandomAttention, {}),
    "random-attention-evict": (RandomAttention, {"keep_prompt": 0}),
    "oracle": (Oracle, {}),
    "random": (RandomPages, {}),
    "delta-variant": (DeltaVariant, {}),
}
_PLAN_FIELDS = (
    "page_size", "budget_share", "recent_pages", "sink_pages", "dense_layers", "delta_layers",
)  # fmt: skip


def policy_class(name: str) -> type[Policy]:
    """Class of a policy, by its name without options; PolicyError lists the known names."""
    if name not in POLICIES:
        raise PolicyError(f"unknown policy {name!r}; there are {', '.join(POLICIES)}")
    return POLICIES[name][0]


def parse_policy(text: str) -> tuple[str, dict[str, Any]]:
    """Name and options of a policy, from ``name:option=value:option=value``.

    A value is a number, a word, or numbers with ``+`` between them, which become a tuple (``2+9``;
    a single layer is written ``2+``, none is ``+``). Raises PolicyError for an unknown policy or
    option, listing the known.
    """
    name, *parts = text.strip().split(":")
    kind = policy_class(name)
    known = _options(kind)
    options: dict[str, Any] = {}
    for part in parts:
        key, sign, value = part.partition("=")
        if key not in known or not sign:
            raise PolicyError(
                f"unknown option {part!r} of policy {name!r}; there are "
                f"{', '.join(known) or 'none'}, each written option=value"
            )
        options[key] = _value(value, part)
        _check(name, key, options[key], kind)
    return name, options


def make_policy(text: str, model: Any, budget: int) -> Policy:
    """Make a policy for a model or configuration; ``text`` is as of :func:`parse_policy`.

    The budget is in tokens that a sparse layer may read; of no matter to ``full``. Policies with
    pages take their size from the model's DELTA plan unless an option says otherwise, so that all
    of them have pages of one size. Raises PolicyError when the name or an option is unknown, or the
    policy cannot keep to the budget.
    """
    name, options = parse_policy(text)
    kind, fixed = POLICIES[name]
    layout = Layout.of(model)
    options = {**fixed, **options}
    if budget < 1:
        raise PolicyError(f"a budget must be at least 1 token, got {budget}")
    try:
        if issubclass(kind, (Delta, DeltaVariant)):
            return kind.make(model, layout, budget, **options)
        if "page_size" in _options(kind):
            options.setdefault("page_size", DeltaConfig.for_model(model).page_size)
        return kind(layout, budget, **options)
    except DeltaConfigError as error:
        raise PolicyError(f"policy {text!r}: {error}") from error
    except TypeError as error:
        raise PolicyError(f"policy {text!r} has an option of a wrong kind: {error}") from error


def _options(kind: type[Policy]) -> list[str]:
    factory: Callable[..., Any] = getattr(kind, "make", kind)
    names = [name for name in inspect.signature(factory).parameters if name != "fields"]
    if issubclass(kind, (Delta, DeltaVariant)):
        names += _PLAN_FIELDS
    return [name for name in names if name not in ("model", "layout", "budget")]


def _check(name: str, key: str, value: Any, kind: type[Policy]) -> None:
    """Refuse what no layer, size or share can be; the policy's constructor refuses the rest."""
    parameter = inspect.signature(kind).parameters.get(key)
    if parameter is None:  # a field of DeltaConfig, which checks its own
        return
    number = isinstance(value, (int, float)) and value >= 0
    if parameter.annotation == "int" and not (number and isinstance(value, int)):
        rule = "a whole number, 0 or more"
    elif parameter.annotation == "float" and not number:
        rule = "a number, 0 or more"
    else:
        return
    raise PolicyError(f"{key} of policy {name!r} must be {rule}, got {value!r}")


def _value(text: str, part: str) -> Any:
    if "+" in text:
        numbers = [number for number in text.split("+") if number]
        if not all(number.isdigit() for number in numbers):
            raise PolicyError(f"layers are numbers with + between them, got {part!r}")
        return tuple(int(number) for number in numbers)
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
