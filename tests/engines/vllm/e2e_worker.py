"""The engine of the end-to-end benchmark, in a fork: ``python e2e_worker.py COMMANDS ANSWERS``.

Both are files of JSON lines, as ``python -m benchmarks.e2e.engine`` has them on stdin and stdout.
With a third argument, ``draw``, the acceptance of drafts is drawn on CPUs, too: vLLM's kernel for
CPUs refuses to, and what its kernel for GPUs does is done here in Python. Nothing else differs.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))


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


if __name__ == "__main__":
    from vllm.utils import cpu_triton_utils

    from benchmarks.e2e.engine import Engine
    from benchmarks.processes import serve

    if "draw" in sys.argv[3:]:
        # The code, since what launches the function keeps it by now.
        cpu_triton_utils._rejection_greedy_sample_kernel_impl.__code__ = draw.__code__
    with open(sys.argv[1]) as commands, open(sys.argv[2], "w") as answers:
        serve(commands, answers, Engine)
