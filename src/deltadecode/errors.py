"""Errors that a user can act on: each message is one line with the offending value and the rule."""


class DeltaDecodeError(ValueError):
    """Base of all errors that deltadecode raises on purpose."""


class ArgumentError(DeltaDecodeError):
    """An argument that cannot be what it is."""


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument of another type."""


class MissingSelectionError(DeltaDecodeError, RuntimeError):
    """A sparse layer ran before its Δ-layer."""

    def __init__(self, layer: int, source: int) -> None:
        super().__init__(
            f"layer {layer} reads the pages of Δ-layer {source}, which has not run in this step"
        )


class DeltaConfigError(DeltaDecodeError):
    """A configuration or a layer plan breaks one of its rules (docs/semantics.md, R9)."""


class OperationError(DeltaDecodeError):
    """Inputs that an operation of ``deltadecode.ops`` does not take, or a backend it has not."""


class ModelConfigError(DeltaDecodeError):
    """A configuration of one of our own models breaks one of its rules."""


class UnsupportedModelError(DeltaDecodeError):
    """The model has no full-attention layers that could be planned."""


class UnsupportedCacheError(DeltaDecodeError):
    """A KV cache of another kind, or in another state, than decoding with DELTA needs."""


class PolicyError(DeltaDecodeError):
    """A policy that is not known, or that cannot do what it is asked for."""


class EvaluationError(DeltaDecodeError):
    """An evaluation that cannot be run, resumed or reported as asked."""


class CalibrationError(DeltaDecodeError):
    """A calibration that cannot be run as asked, or data that it cannot read."""


class InspectionError(DeltaDecodeError):
    """A model or text that cannot be inspected as asked."""
