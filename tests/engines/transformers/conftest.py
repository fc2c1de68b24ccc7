"""Short prompts are enough for the tests, if the cache appends in place from the first token on."""

import pytest
from hf_pieces import SimulatedPiece, simulate

from deltadecode.engines.transformers import layers


@pytest.fixture(autouse=True)
def append_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_SHORT", 0)


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[SimulatedPiece]:
    """Pieces of layer graphs, simulated on the CPU, in the order in which they are made."""
    return simulate(monkeypatch)
