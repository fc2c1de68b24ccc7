"""The entry point of ``vllm.general_plugins``: what vLLM runs in each of its processes.

It is a package of its own because ``import deltadecode`` prepares Transformers. ``deltadecode`` is
imported when an engine chooses the backend, and not before.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

BACKEND_CLASS = "deltadecode.engines.vllm.backend.DeltaBackend"
KEY = "deltadecode"  # in --additional-config
PROPOSER = "deltadecode.engines.vllm.lossless.Proposer"  # in --speculative-config
AHEAD = "deltadecode_ahead"  # attribute of a SchedulerConfig
MODEL = "ClsaForCausalLM"  # in a checkpoint's configuration
_PLUGIN = "deltadecode.engines.vllm.plugin"
_CLSA = "deltadecode.engines.vllm.clsa"
_WRAPPED = "_deltadecode"


def register() -> None:
    """Put the backend under the name ``CUSTOM``, and know CLSA; vLLM may call this many times.

    Where vLLM has not the places to put it, it stays as it is, with a warning.
    """
    for place in (_register, _register_clsa):
        try:
            place()
        except (ImportError, AttributeError) as error:
            _warn("not registered, since it does not know this vLLM: %s", error)


def _register() -> None:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.core.sched.scheduler import Scheduler

    custom = AttentionBackendEnum.CUSTOM
    if custom.is_overridden() and custom.get_path() != BACKEND_CLASS:
        _warn("the attention backend CUSTOM is %s already, so it is not DELTA", custom.get_path())
        return
    register_backend(custom, BACKEND_CLASS)
    wrap_once(EngineArgs, "create_engine_config", _check_new_configurations)
    wrap_once(Scheduler, "__init__", _count_steps)
    wrap_once(VllmConfig, "__post_init__", _stay_ahead)
    if current_platform.is_cpu():
        wrap_once(type(current_platform), "get_attn_backend_cls", _let_cpu_choose)


def _register_clsa() -> None:
    """Make models of type ``clsa`` known; nothing is imported before an engine loads one."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.transformers_utils import config, configs
    from vllm.v1.engine.input_processor import InputProcessor

    class Checks(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            import_module(f"{_CLSA}.checks").prepare_model(model_config)

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            import_module(f"{_CLSA}.checks").prepare_engine(vllm_config)

    if MODEL in MODELS_CONFIG_MAP:
        return
    configs._CLASS_TO_MODULE["ClsaConfig"] = "deltadecode.models.clsa.configuration"
    config._CONFIG_REGISTRY["clsa"] = "ClsaConfig"
    MODELS_CONFIG_MAP[MODEL] = Checks
    ModelRegistry.register_model(MODEL, f"{_CLSA}.model:{MODEL}")
    wrap_once(InputProcessor, "_validate_params", _ask_no_prompt)


def _ask_no_prompt(validate: Callable[..., Any]) -> Any:
    """Refuse logprobs of a prompt whose tokens leave a CLSA model before they have any."""

    def _validate_params(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        if MODEL in self.model_config.architectures:
            import_module(f"{_CLSA}.checks").check_request(self.model_config.hf_config, params)
        return validate(self, params, *args, **kwargs)

    return _validate_params


def wrap_once(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Any]) -> None:
    """Replace function ``owner.name`` by ``wrap(owner.name)``, however often this is called."""
    original = getattr(owner, name)
    if hasattr(original, _WRAPPED):
        return
    wrapped = functools.wraps(original)(wrap(original))
    setattr(wrapped, _WRAPPED, True)
    bound = isinstance(inspect.getattr_static(owner, name), (classmethod, staticmethod))
    setattr(owner, name, staticmethod(wrapped) if bound else wrapped)


def is_chosen(vllm_config: Any) -> bool:
    """Whether an engine runs DELTA."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    custom = AttentionBackendEnum.CUSTOM
    return (
        vllm_config.attention_config.backend is custom
        and custom.is_overridden()
        and custom.get_path() == BACKEND_CLASS
    )


def is_lossless(vllm_config: Any) -> bool:
    """Whether an engine drafts with its own model: lossless mode."""
    speculative = getattr(vllm_config, "speculative_config", None)
    return getattr(speculative, "model", None) == PROPOSER


def _check_new_configurations(create: Callable[..., Any]) -> Any:
    def create_engine_config(
        self: Any, usage_context: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        vllm_config = create(self, usage_context, *args, **kwargs)
        additional = vllm_config.additional_config
        # Without our attention our proposer is refused there.
        if is_chosen(vllm_config) or is_lossless(vllm_config):
            ahead = getattr(self, "async_scheduling", None)
            if not import_module(_PLUGIN).prepare_engine(vllm_config, usage_context, ahead):
                # Whatever vLLM chooses by the backend is then as without this package.
                self.attention_backend = self.attention_config.backend = None
                vllm_config = create(self, usage_context, *args, **kwargs)
        elif isinstance(additional, dict) and KEY in additional:
            _warn("stock attention, since --attention-backend CUSTOM is not given")
        return vllm_config

    return create_engine_config


def _count_steps(init: Callable[..., None]) -> Any:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if is_chosen(self.vllm_config):
            import_module(_PLUGIN).prepare_scheduler(self)

    return __init__


def _stay_ahead(check: Callable[..., None]) -> Any:
    """Keep asynchronous scheduling where a configuration is marked for it.

    vLLM checks configurations again in an engine's own process, and would refuse it there.
    """

    def __post_init__(self: Any, *args: Any, **kwargs: Any) -> None:
        scheduler = self.scheduler_config
        ahead = getattr(scheduler, AHEAD, False)
        if ahead:
            scheduler.async_scheduling = False
        try:
            check(self, *args, **kwargs)
        finally:
            if ahead:
                scheduler.async_scheduling = True

    return __post_init__


def _let_cpu_choose(choose: Callable[..., str]) -> Any:
    """The CPU platform knows one backend only; let it take the one under ``CUSTOM`` too."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    def get_attn_backend_cls(selected_backend: Any, *args: Any, **kwargs: Any) -> str:
        if selected_backend is AttentionBackendEnum.CUSTOM:
            return BACKEND_CLASS
        return choose(selected_backend, *args, **kwargs)

    return get_attn_backend_cls


def _warn(message: str, *args: object) -> None:
    from vllm.logger import init_logger

    init_logger("vllm.deltadecode").warning(f"deltadecode: {message}", *args)
