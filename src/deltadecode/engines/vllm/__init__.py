"""DELTA in vLLM: a plugin that registers an attention backend (docs/vllm.md).

``vllm serve MODEL --attention-backend CUSTOM`` uses it; without that flag vLLM runs as if the
package were not installed. Importing this package imports nothing of vLLM.
"""

from deltadecode.engines.vllm.settings import Settings, attended_tokens, resolve

__all__ = ["Settings", "attended_tokens", "resolve"]
