"""Calibrated plans of known models: one JSON file each, found by the model's architecture.

A profile is a file that ``DeltaConfig.load`` reads. Its ``meta.match`` holds the architecture facts
(see ``deltadecode.architecture.signature``) that a model must have, all of them, to get the plan.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any


@cache
def profiles() -> dict[str, dict[str, Any]]:
    """All shipped profiles.

    Returns
    -------
    dict
        File name without ``.json``, to the file's JSON object. Shared: do not change it.
    """
    files = (file for file in resources.files(__name__).iterdir() if file.name.endswith(".json"))
    return {
        file.name.removesuffix(".json"): json.loads(file.read_text(encoding="utf-8"))
        for file in sorted(files, key=lambda file: file.name)
    }


def find_profile(signature: Mapping[str, object]) -> dict[str, Any] | None:
    """Find the profile made for an architecture.

    Parameters
    ----------
    signature : mapping
        Architecture facts of a model.

    Returns
    -------
    dict or None
        The first profile whose every ``meta.match`` entry equals the model's; None if there is
        none.
    """
    for profile in profiles().values():
        match = profile["meta"]["match"]
        if all(signature.get(key) == value for key, value in match.items()):
            return profile
    return None
