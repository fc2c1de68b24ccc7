"""The backend of the platform that vLLM runs on, under the one name that is registered."""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform

__all__ = ["DeltaBackend"]

DeltaBackend: type[Any]
if current_platform.is_cpu():
    from deltadecode.engines.vllm.cpu import DeltaCPUBackend as DeltaBackend
else:
    from deltadecode.engines.vllm.flash import DeltaFlashBackend as DeltaBackend
