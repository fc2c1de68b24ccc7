"""Which layer does what: :class:`DeltaConfig`, and the :class:`LayerPlan` it gives for a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from os import PathLike
from typing import Any, Literal

from deltadecode.architecture import attention_layers, signature
from deltadecode.errors import DeltaConfigError
from deltadecode.plan_files import read_plan, write_plan
from deltadecode.profiles import find_profile

Role = Literal["dense", "delta", "sparse", "own"]
# A share is so many of these parts, so that all that is computed with it is of whole numbers.
SHARE_DEN = 10_000
# Drafts before a verification in lossless mode, in every engine (R12).
MOST_DRAFTS = 16
# What caches hold keys and values in, if not in the model's type.
KV_DTYPES = ("int8", "fp8")


@dataclass(frozen=True)
class LayerPlan:
    """The role of every layer of one model; made by :meth:`DeltaConfig.layer_plan`.

    Attributes
    ----------
    num_layers : int
        Layers of the model.
    attention_layers : tuple of int
        The planned layers: those with full attention, ascending.
    roles : tuple of str
        One of ``"dense"``, ``"delta"``, ``"sparse"``, ``"own"`` per layer.
    sources : tuple of int or None
        Per layer, the Δ-layer whose pages it reads; None unless the layer is sparse.
    """

    num_layers: int
    attention_layers: tuple[int, ...]
    roles: tuple[Role, ...]
    sources: tuple[int | None, ...]

    def role(self, layer: int) -> Role:
        """Role of a layer: ``"own"`` keeps the model's own (sliding, linear, ...) attention."""
        return self.roles[self._checked(layer)]

    def source(self, layer: int) -> int | None:
        """Δ-layer that selects the pages of a sparse layer; None for any other layer."""
        return self.sources[self._checked(layer)]

    def _checked(self, layer: int) -> int:
        if not 0 <= layer < self.num_layers:
            raise IndexError(f"layer {layer} is outside 0..{self.num_layers - 1}")
        return layer


@dataclass(frozen=True)
class DeltaConfig:
    """A layer plan and a page budget (arXiv 2510.09883; docs/semantics.md).

    Parameters
    ----------
    page_size : int
        Tokens of a page, P ≥ 1.
    budget_pages : int
        Pages that a sparse layer may read, K; recent and sink pages included.
    budget_share : float
        Lets the budget grow with the context: of a row of N pages, a sparse layer may read this
        share if that is more than K; 0 ≤ share < 1. Given by name only.
    recent_pages : int
        Last pages, always selected, L ≥ 0.
    sink_pages : int
        First pages, always selected, S ≥ 0. K > L + S.
    dense_layers : sequence of int
        Full attention that selects nothing.
    delta_layers : sequence of int
        Full attention that selects the pages of the sparse layers after it; all of them after the
        last dense layer. Every other full-attention layer is sparse.

    Raises
    ------
    DeltaConfigError
        When a value breaks a rule that holds for every depth (docs/semantics.md, R9).
    """

    page_size: int = 16
    budget_pages: int = 64
    budget_share: float = field(default=0.0, kw_only=True)
    recent_pages: int = 8
    sink_pages: int = 1
    dense_layers: Sequence[int] = (0, 1)
    delta_layers: Sequence[int] = (2, 14, 22)

    def __post_init__(self) -> None:
        _check_int("page_size", self.page_size, at_least=1)
        _check_int("budget_pages", self.budget_pages, at_least=1)
        _check_int("recent_pages", self.recent_pages, at_least=0)
        _check_int("sink_pages", self.sink_pages, at_least=0)
        share = self.budget_share
        # bool is an int to isinstance. NaN is in no range.
        if type(share) not in (int, float) or not 0 <= share < 1:
            raise DeltaConfigError(f"budget_share must be a number in [0, 1), got {share!r}")
        object.__setattr__(self, "budget_share", float(share))
        forced = self.recent_pages + self.sink_pages
        if self.budget_pages <= forced:
            raise DeltaConfigError(
                f"budget_pages must be greater than recent_pages + sink_pages, got "
                f"{self.budget_pages} <= {self.recent_pages} + {self.sink_pages}"
            )
        # Tuples, so that equal plans are equal and hash alike whatever they were written as.
        object.__setattr__(self, "dense_layers", _checked_layers("dense_layers", self.dense_layers))
        object.__setattr__(self, "delta_layers", _checked_layers("delta_layers", self.delta_layers))
        if self.dense_layers and self.delta_layers:
            last, first = self.dense_layers[-1], self.delta_layers[0]
            if first <= last:
                raise DeltaConfigError(
                    f"delta_layers must come after the dense ones, got Δ-layer {first} "
                    f"and dense layer {last}"
                )

    @property
    def share_num(self) -> int:
        """The share in 10,000ths, rounded to the nearest one."""
        return round(self.budget_share * SHARE_DEN)

    def pages_for(self, pages: int) -> int:
        """Most pages that a sparse layer reads of a row of N pages, K(N); see docs/semantics.md."""
        return max(self.budget_pages, -(-self.share_num * pages // SHARE_DEN))

    def reads_all(self, tokens: int) -> bool:
        """Whether a sparse layer reads every page of a row of so many tokens."""
        pages = -(-tokens // self.page_size)
        return pages <= self.pages_for(pages)

    def table_width(self, pages: int) -> int:
        """Columns of the page ids of rows of up to ``pages`` pages.

        K without a share. With one, K(pages) rounded up to a power of two, so that the ids of a
        cache that grows keep their shape for long.
        """
        if not self.share_num:
            return self.budget_pages
        return 1 << (self.pages_for(pages) - 1).bit_length()

    def layer_plan(
        self, num_layers: int, attention_layers: Sequence[int] | None = None
    ) -> LayerPlan:
        """Plan for a model of a given depth.

        Parameters
        ----------
        num_layers : int
            Layers of the model.
        attention_layers : sequence of int, optional
            Its full-attention layers, ascending; by default all. Other layers get the role
            ``"own"``. A dense layer number among those is tolerated, a Δ-layer is not.

        Returns
        -------
        LayerPlan
            Role and source of every layer, in the model's own numbering.

        Raises
        ------
        DeltaConfigError
            When a layer number is out of range, a Δ-layer has no full attention, or a sparse
            layer has no Δ-layer before it (docs/semantics.md, R9).
        """
        _check_int("num_layers", num_layers, at_least=1)
        planned = (
            tuple(range(num_layers))
            if attention_layers is None
            else _checked_layers("attention_layers", attention_layers)
        )
        for name, layers in (
            ("dense_layers", self.dense_layers),
            ("delta_layers", self.delta_layers),
            ("attention_layers", planned),
        ):
            for layer in layers:
                if layer >= num_layers:
                    raise DeltaConfigError(
                        f"{name} must be in 0..{num_layers - 1} for a model of {num_layers} "
                        f"layers, got {layer}"
                    )
        for layer in self.delta_layers:
            if layer not in planned:
                raise DeltaConfigError(
                    f"delta_layers must be full-attention layers, got {layer}, which is none of "
                    f"{', '.join(map(str, planned)) or 'this model'}"
                )
        return self._assign(num_layers, planned)

    def _assign(self, num_layers: int, planned: tuple[int, ...]) -> LayerPlan:
        roles: list[Role] = ["own"] * num_layers
        sources: list[int | None] = [None] * num_layers
        source: int | None = None
        for layer in planned:
            if layer in self.dense_layers:
                roles[layer] = "dense"
            elif layer in self.delta_layers:
                roles[layer] = "delta"
                source = layer
            elif source is None:
                raise DeltaConfigError(
                    f"every sparse layer needs a Δ-layer before it, got sparse layer {layer} "
                    f"with delta_layers {_list(self.delta_layers)}"
                )
            else:
                roles[layer] = "sparse"
                sources[layer] = source
        return LayerPlan(num_layers, planned, tuple(roles), tuple(sources))

    @classmethod
    def for_model(cls, model_or_config: Any) -> DeltaConfig:
        """Calibrated profile of a known architecture, else the default plan for its depth.

        The default takes the full-attention layers in order, d of them. With d ≥ 6 the first two
        are dense, and Δ-layers are those at 2 + ⌊k d / 5⌋ for k = 0 … 3. With fewer, as in hybrid
        models, none is dense, and Δ-layers are the first and the one at ⌊d / 2⌋. A Δ-layer is left
        out when no sparse layer would lie between it and the one before it, or after it; a lone
        layer is dense. Pages have 8 tokens; K = 96, L = 16, S = 1 (docs/accuracy.md says why).

        Parameters
        ----------
        model_or_config
            A Hugging Face model or configuration (or an object with the same attributes).

        Returns
        -------
        DeltaConfig
            A configuration whose plan is valid for this model.

        Raises
        ------
        UnsupportedModelError
            When the model has no full-attention layers that could be planned.
        """
        layers = attention_layers(model_or_config)
        facts = signature(model_or_config)
        profile = find_profile(facts)
        config = default_config(layers) if profile is None else cls.from_dict(profile)
        depth = facts["num_hidden_layers"]
        assert isinstance(depth, int)
        config.layer_plan(depth, layers)
        return config

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> DeltaConfig:
        """Make a configuration from a mapping of field names, as :meth:`load` reads it.

        Parameters
        ----------
        values : mapping
            Field names to values; a missing field takes its default. The key ``meta`` may hold a
            mapping of remarks (where the plan comes from), which is not interpreted.

        Returns
        -------
        DeltaConfig

        Raises
        ------
        DeltaConfigError
            For an unknown key, a wrong type, or a broken rule.
        """
        if not isinstance(values, Mapping):
            raise DeltaConfigError(f"values must be a mapping, got {type(values).__name__}")
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known and key != "meta":
                raise DeltaConfigError(f"unknown key {key!r}; a DeltaConfig has {', '.join(known)}")
        if not isinstance(values.get("meta", {}), Mapping):
            raise DeltaConfigError(f"meta must be an object, got {values['meta']!r}")
        return cls(**{key: value for key, value in values.items() if key in known})  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """Values as JSON holds them; :meth:`from_dict` makes an equal configuration of them.

        Returns
        -------
        dict
            Field name -> int, or list of layer numbers.
        """
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    def save(self, path: str | PathLike[str], *, meta: Mapping[str, object] | None = None) -> None:
        """Write the configuration as JSON; :meth:`load` gives an equal one.

        Parameters
        ----------
        path : path-like
            File to write; replaced if it exists.
        meta : mapping, optional
            Where the plan comes from, under the key ``meta``; anything that JSON can hold. It is
            no part of the configuration: :meth:`load` leaves it out, and
            :func:`deltadecode.plan_files.load_meta` reads it.

        Raises
        ------
        DeltaConfigError
            For another type of path or meta, or what JSON cannot hold; nothing is written then.
        OSError
            When the file cannot be written.
        """
        write_plan(path, self.to_dict(), meta)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> DeltaConfig:
        """Read a configuration that :meth:`save` wrote or a person did.

        Parameters
        ----------
        path : path-like
            JSON file with one object; see :meth:`from_dict`.

        Returns
        -------
        DeltaConfig

        Raises
        ------
        DeltaConfigError
            When the file cannot be read, is not a JSON object, or breaks a rule.
        """
        values = read_plan(path)
        try:
            return cls.from_dict(values)
        except DeltaConfigError as error:
            raise DeltaConfigError(f"{str(path)!r}: {error}") from error


def default_config(attention_layers: Sequence[int]) -> DeltaConfig:
    """Uncalibrated plan over the given full-attention layers; see :meth:`DeltaConfig.for_model`.

    Parameters
    ----------
    attention_layers : sequence of int
        Ascending layer numbers, at least one.

    Returns
    -------
    DeltaConfig
        With pages of 8 tokens, and a budget of 768 tokens.
    """
    depth = len(attention_layers)
    dense = 2 if depth >= 6 else depth == 1
    places = [2 + k * depth // 5 for k in range(4)] if depth >= 6 else [0, depth // 2]
    deltas: list[int] = []
    for place in places:
        if place <= depth - 2 and (not deltas or place - deltas[-1] >= 2):
            deltas.append(place)
    return DeltaConfig(
        page_size=8,
        budget_pages=96,
        recent_pages=16,
        dense_layers=tuple(attention_layers[:dense]),
        delta_layers=tuple(attention_layers[place] for place in deltas),
    )


def _check_int(name: str, value: object, *, at_least: int) -> None:
    # bool is an int to isinstance, but True pages are a mistake.
    if type(value) is not int:
        raise DeltaConfigError(f"{name} must be an int, got {value!r}")
    if value < at_least:
        raise DeltaConfigError(f"{name} must be at least {at_least}, got {value}")


def _checked_layers(name: str, layers: object) -> tuple[int, ...]:
    if not isinstance(layers, (list, tuple)):
        raise DeltaConfigError(f"{name} must be a list or tuple of layer numbers, got {layers!r}")
    for layer in layers:
        if type(layer) is not int:
            raise DeltaConfigError(f"{name} must hold ints, got {layer!r}")
        if layer < 0:
            raise DeltaConfigError(f"{name} must not be negative, got {layer}")
    for before, after in pairwise(layers):
        if after <= before:
            raise DeltaConfigError(
                f"{name} must ascend without repeats, got {after} after {before}"
            )
    return tuple(layers)


def _list(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers)) or "none"
