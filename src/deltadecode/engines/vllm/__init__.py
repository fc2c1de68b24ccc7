"""DELTA in vLLM: an attention backend beside the platform's stock one (docs/vllm.md).

vLLM loads :mod:`deltadecode_vllm`, which imports this package when an engine chooses the backend.
"""

# The name that vLLM keeps for backends of others: --attention-backend CUSTOM.
BACKEND = "CUSTOM"
