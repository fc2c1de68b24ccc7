"""NVLink multicast, off in every process that a benchmark starts, on both sides alike.

Not every machine has it, and some must not use it: it belongs to the whole host, not to one GPU.
"""

ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0",
    "NVSHMEM_DISABLE_NVLS": "1",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
}
# No variable turns this pass of vLLM's compiler off.
COMPILATION = {"pass_config": {"fuse_allreduce_rms": False}}
FLAG = "--compilation-config.pass_config.fuse_allreduce_rms=false"
