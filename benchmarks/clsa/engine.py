"""One vLLM engine of a CLSA model with random weights: ``python -m benchmarks.clsa.engine``."""

from typing import Any

import deltadecode_vllm
from benchmarks.e2e.engine import Engine, set_environment
from benchmarks.processes import serve_process


class ClsaEngine(Engine):
    """As :class:`benchmarks.e2e.engine.Engine`, where vLLM knows CLSA."""

    def __init__(self, spec: dict[str, Any]) -> None:
        set_environment()
        deltadecode_vllm.register()
        super().__init__(
            {"plan": None, "ranks": 1, "worker_process": False, "drafts": 0, "lossless": False,
             "acceptance": None, "kv_bytes": None, "kv_cache_dtype": "auto", **spec}
        )  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """What runs; ``blocks`` of ``block_size`` tokens of one layer's keys and values."""
        cache = self._engine.vllm_config.cache_config
        return {
            **super().facts(), "blocks": cache.num_gpu_blocks, "block_size": cache.block_size,
        }  # fmt: skip


if __name__ == "__main__":
    serve_process(ClsaEngine)
