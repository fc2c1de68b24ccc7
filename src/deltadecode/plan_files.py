"""Files of plans: JSON objects, read and written whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from deltadecode.errors import DeltaConfigError


def write_plan(path: object, values: dict[str, Any], meta: Mapping[str, object] | None) -> None:
    """Write values as JSON, with ``meta`` beside them; see :meth:`DeltaConfig.save`."""
    place = _path(path)
    if meta is not None:
        if not isinstance(meta, Mapping):
            raise DeltaConfigError(f"meta must be a mapping, got {meta!r}")
        values = {**values, "meta": dict(meta)}
    try:
        text = json.dumps(values, indent=2, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise DeltaConfigError(f"meta must be what JSON can hold: {error}") from error
    place.write_text(text + "\n", encoding="utf-8")


def read_plan(path: str | PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file; DeltaConfigError where there is none."""
    place = _path(path)
    try:
        values = json.loads(place.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DeltaConfigError(
            f"cannot read a DeltaConfig from {str(path)!r}: {error.strerror or error}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DeltaConfigError(f"{str(path)!r} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise DeltaConfigError(
            f"{str(path)!r} must hold one JSON object, got {type(values).__name__}"
        )
    return values


def load_meta(path: str | PathLike[str]) -> dict[str, Any]:
    """Read where a plan comes from, as :meth:`DeltaConfig.save` wrote it.

    Parameters
    ----------
    path : path-like
        File of a plan.

    Returns
    -------
    dict
        Empty where the file says nothing of it.

    Raises
    ------
    DeltaConfigError
        When the file cannot be read, or is not a JSON object.
    """
    meta = read_plan(path).get("meta")
    return meta if isinstance(meta, dict) else {}


def _path(path: object) -> Path:
    if not isinstance(path, (str, PathLike)):
        raise DeltaConfigError(f"path must be a str or a path, got {path!r}")
    return Path(path)
