"""The command line in this process, and a tiny model for it."""

import pytest
from cli_models import make_model

from deltadecode.cli import main


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def run(capfd):
    """Run the command in this process: exit code, stdout and stderr."""

    def call(*arguments):
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return ended.value.code, out, err

    return call


@pytest.fixture
def refused(run):
    """Run the command, and check that it refuses with exit code 2 and one line."""

    def call(*arguments):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("deltadecode: error: ")
        assert err.count("\n") == 1 and err.endswith("\n")
        return err

    return call


@pytest.fixture
def nothing_loads(monkeypatch):
    """Fail when a configuration, a tokenizer or weights are loaded."""
    import transformers

    def fail(*_, **__):
        raise AssertionError("something was loaded")

    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", fail)
