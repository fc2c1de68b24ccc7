"""Which releases of vLLM the smoke tests ran with, from the reports of ``make smoke-vllm``."""
