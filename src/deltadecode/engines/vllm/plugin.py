"""What vLLM loads in each of its processes: the entry point of ``vllm.general_plugins``."""

from __future__ import annotations

import functools
import sys
from typing import Any

from deltadecode.engines.vllm import versions
from deltadecode.engines.vllm.settings import KEY, Settings, own_settings
from deltadecode.errors import DeltaConfigError, DeltaDecodeError, UnsupportedModelError

BACKEND = "deltadecode.engines.vllm.backend.DeltaBackend"
_DONE = "_deltadecode"


def register() -> None:
    """Register the backend, and check an engine's configuration as soon as it is made.

    Nothing changes for engines that do not choose the backend. vLLM may call this many times.
    """
    from vllm.logger import init_logger

    taken = versions.register_backend(BACKEND)
    if taken is not None:
        init_logger("vllm.deltadecode").warning(
            "deltadecode: the attention backend CUSTOM is %s already, so it is not DELTA", taken
        )
        return
    versions.let_cpu_choose(BACKEND)
    _check_new_configurations()


def _check_new_configurations() -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    make = EngineArgs.create_engine_config
    if hasattr(make, _DONE):
        return

    @functools.wraps(make)
    def create_engine_config(
        self: Any, usage_context: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        vllm_config = make(self, usage_context, *args, **kwargs)
        try:
            prepare(vllm_config)
        except DeltaDecodeError as error:
            # A server's owner gets the line; a program that embeds vLLM gets the exception.
            if usage_context is UsageContext.OPENAI_API_SERVER:
                print(f"deltadecode: error: {error}", file=sys.stderr, flush=True)
                raise SystemExit(2) from None
            raise
        return vllm_config

    setattr(create_engine_config, _DONE, True)
    EngineArgs.create_engine_config = create_engine_config


def prepare(vllm_config: Any) -> Settings | None:
    """Check what a new engine is asked for, and write the plan into its configuration.

    Parameters
    ----------
    vllm_config : vllm.config.VllmConfig
        Of the engine; its workers read the plan from it.

    Returns
    -------
    Settings or None
        None when it runs with stock attention.

    Raises
    ------
    DeltaConfigError, UnsupportedModelError, UnsupportedCacheError
        In one line.
    """
    import vllm
    from vllm.logger import init_logger

    from deltadecode.engines.vllm.checks import check_engine, find_settings
    from deltadecode.engines.vllm.metrics import describe, install

    logger = init_logger("vllm.deltadecode")
    additional = vllm_config.additional_config
    if not versions.chosen(vllm_config, BACKEND):
        if isinstance(additional, dict) and KEY in additional:
            logger.warning(
                "deltadecode: stock attention, since --attention-backend CUSTOM is not given"
            )
        return None
    reason = versions.outside_range(vllm.__version__)
    if reason is not None:
        raise DeltaConfigError(reason)
    if not isinstance(additional, dict):
        raise DeltaConfigError(f"additional_config must be an object, got {additional!r}")
    try:
        settings = find_settings(vllm_config)
    except UnsupportedModelError as error:
        if own_settings(additional.get(KEY))[2] == "error":
            raise UnsupportedModelError(
                f'{error}; on_unsupported="stock" serves it with stock attention'
            ) from error
        logger.warning("deltadecode: stock attention, since %s", error)
        vllm_config.attention_config.backend = None
        return None
    check_engine(vllm_config, settings)
    additional[KEY] = settings.as_dict()
    logger.info("deltadecode: %s", describe(settings, vllm_config.model_config.max_model_len))
    install(settings, str(vllm_config.model_config.served_model_name))
    return settings
