"""A tiny model for the command line."""

import pytest
from cli_models import make_model


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def nothing_loads(monkeypatch):
    """Fail when a configuration, a tokenizer or weights are loaded."""
    import transformers

    def fail(*_, **__):
        raise AssertionError("something was loaded")

    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", fail)
