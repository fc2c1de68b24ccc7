"""The engine of the end-to-end benchmark, on CPUs with drafts whose acceptance is drawn.

vLLM draws acceptance in a kernel for GPUs alone: its kernel for CPUs refuses to. What the kernel
does is done here in Python, and nothing else differs from ``python -m benchmarks.e2e.engine``.
"""

from vllm.utils import cpu_triton_utils

from benchmarks.e2e.engine import Engine
from benchmarks.processes import serve_process


def draw(
    output_token_ids, cu_num_draft_tokens, draft_token_ids, target_argmax, bonus_token_ids,
    is_greedy, max_spec_len, uniform_probs, synthetic_conditional_rates, SYNTHETIC_MODE,
):  # fmt: skip
    assert SYNTHETIC_MODE
    ends = cu_num_draft_tokens.tolist()
    for request, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if is_greedy is not None and not is_greedy[request]:
            continue
        for place in range(end - start):
            at = start + place
            if uniform_probs[at] >= synthetic_conditional_rates[place] or draft_token_ids[at] < 0:
                output_token_ids[request, place] = target_argmax[at]
                break
            output_token_ids[request, place] = draft_token_ids[at]
        else:
            output_token_ids[request, end - start] = bonus_token_ids[request, 0]


cpu_triton_utils._rejection_greedy_sample_kernel_impl = draw

if __name__ == "__main__":
    serve_process(Engine)
