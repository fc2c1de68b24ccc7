"""Short prompts are enough for the tests, if the cache appends in place from the first token on."""

import pytest

from deltadecode.engines.transformers import layers


@pytest.fixture(autouse=True)
def append_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_SHORT", 0)
