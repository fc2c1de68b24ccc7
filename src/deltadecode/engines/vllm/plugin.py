"""What runs in vLLM's processes before a forward pass, once an engine has chosen the backend."""

from __future__ import annotations

import sys
from typing import Any

from deltadecode.engines.serving.counts import describe
from deltadecode.engines.serving.settings import KEY, own_settings
from deltadecode.engines.vllm import metrics, pacing, versions
from deltadecode.engines.vllm.checks import check_engine, find_settings
from deltadecode.errors import DeltaConfigError, DeltaDecodeError, UnsupportedModelError
from deltadecode_vllm import is_lossless


def prepare_engine(
    vllm_config: Any, usage_context: Any = None, async_scheduling: bool | None = None
) -> bool:
    """Check a new engine's configuration, and write the plan into it for the workers.

    ``async_scheduling`` is what the user says of it, None for nothing. Returns whether the engine
    runs DELTA, and not stock attention as ``on_unsupported`` has it.

    ``vllm serve`` and ``vllm run-batch`` print one line and exit with code 2; a program that embeds
    vLLM gets the exception: DeltaConfigError, UnsupportedModelError or UnsupportedCacheError.
    """
    from vllm.usage.usage_lib import UsageContext

    try:
        versions.check_backend(vllm_config)
        prepared = _prepare(vllm_config)
        if is_lossless(vllm_config) and async_scheduling is not False:
            versions.schedule_ahead(vllm_config)
        return prepared
    except DeltaDecodeError as error:
        if usage_context in (UsageContext.OPENAI_API_SERVER, UsageContext.OPENAI_BATCH_RUNNER):
            print(f"deltadecode: error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(2) from None
        raise


def prepare_scheduler(scheduler: Any) -> None:
    """Let a new scheduler's engine count its decode steps, and keep its cache apart by the plan."""
    settings = versions.settings_of(scheduler.vllm_config)
    within = settings.within(scheduler.vllm_config.model_config.max_model_len)
    if is_lossless(scheduler.vllm_config):
        # Its blocks hold full attention's keys and values only, so they need no salt.
        pacing.pace_drafts(scheduler, within)
    else:
        versions.salt_requests(scheduler, settings.cache_salt)
    if scheduler.log_stats:
        metrics.count_steps(scheduler, within)


def _prepare(vllm_config: Any) -> bool:
    import vllm
    from vllm.logger import init_logger
    from vllm.platforms import current_platform

    logger = init_logger("vllm.deltadecode")
    additional = vllm_config.additional_config
    warning = versions.check_version(vllm.__version__, current_platform.is_cpu())
    if warning is not None:
        logger.warning("deltadecode: %s", warning)
    if not isinstance(additional, dict):
        raise DeltaConfigError(f"additional_config must be an object, got {additional!r}")
    try:
        settings = find_settings(vllm_config)
    except UnsupportedModelError as error:
        if is_lossless(vllm_config):
            raise
        if own_settings(additional.get(KEY))[2] == "error":
            raise UnsupportedModelError(
                f'{error}; on_unsupported="stock" serves it with stock attention'
            ) from error
        logger.warning("deltadecode: stock attention, since %s", error)
        return False
    check_engine(vllm_config, settings)
    additional[KEY] = settings.as_dict()
    drafts = versions.most_tokens(vllm_config) - 1 if is_lossless(vllm_config) else 0
    longest = vllm_config.model_config.max_model_len
    logger.info("deltadecode: %s", describe(settings, longest, drafts))
    metrics.install(settings, str(vllm_config.model_config.served_model_name))
    return True
