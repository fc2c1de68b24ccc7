"""Seeing what an engine does from outside."""

from collections.abc import Callable
from typing import Any


def watch(owner: object, name: str, saw: Callable[[Any], None]) -> None:
    """Have ``saw`` called with the result of each call of a method of ``owner`` from now on."""
    method = getattr(owner, name)

    def watched(*arguments: Any, **options: Any) -> Any:
        result = method(*arguments, **options)
        saw(result)
        return result

    setattr(owner, name, watched)
