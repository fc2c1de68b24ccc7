"""Makes an engine's configuration for each case, as ``vllm serve`` does, and reports the end."""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

import vllm
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.usage.usage_lib import UsageContext

from deltadecode.lab.tasks import model_path


def attempt(case):
    engine = {"model": str(model_path()), "dtype": "float32", **case["engine"]}
    if engine.pop("chosen", True):
        engine["attention_backend"] = "CUSTOM"
    real = vllm.__version__
    vllm.__version__ = engine.pop("version", real)
    variables = engine.pop("variables", {})
    os.environ.update(variables)
    # As some users do who know that positions reach further.
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            args = AsyncEngineArgs(additional_config={"deltadecode": case["config"]}, **engine)
            config = args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    except SystemExit as end:
        return end.code, stderr.getvalue(), None
    finally:
        vllm.__version__ = real
        for name in variables:
            del os.environ[name]
    chosen = config.attention_config.backend
    return 0, stderr.getvalue(), config.additional_config["deltadecode"] if chosen else None


if __name__ == "__main__":
    cases = json.loads(Path(sys.argv[1]).read_text())["cases"]
    found = {name: attempt(case) for name, case in cases.items()}
    Path(sys.argv[2]).write_text(json.dumps(found))
