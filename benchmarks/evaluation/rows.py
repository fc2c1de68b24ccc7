"""Speed of rows at once: 128 decode steps of a text in one pass, beside one after the other."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.report import Progress
from deltadecode.lab.generation import forced_log_probs
from deltadecode.lab.policies import make_policy
from deltadecode.lab.results import result, row
from deltadecode.lab.rows import RowsText

CONTEXTS, ROWS, BUDGET = (4000, 6000), 128, 512
PLAN = "recent_pages=8:sink_pages=1:dense_layers=0+1:delta_layers=2+7+12+17+23"
POLICIES = (f"delta:{PLAN}", "oracle", "quest-kv", "streaming")
_OTHER = "delta:recent_pages=0:sink_pages=0:dense_layers=0+:delta_layers=1+"
_PEER = "one step after the other"


class _NoTokens:
    """What generation asks of a tokenizer."""

    pad_token_id, eos_token_id = 0, None


def run_rows(
    command: str,
    progress: Progress,
    contexts: Sequence[int] = CONTEXTS,
    rows: int = ROWS,
    policies: Sequence[str] = POLICIES,
    budget: int = BUDGET,
    **shape: int,
) -> dict[str, Any]:
    """Losses of a text under each policy, both ways, with random weights in SmolLM2-135M's shape.

    A row per context and policy, in seconds: ``theirs`` is a prompt and its decode steps, ``ours``
    one pass behind the prefix, which is kept (``prepare`` are the seconds that it took, once for
    all policies). ``largest_difference`` is that of two log-probabilities.
    """
    model = smollm2_shape(**shape)
    measured = []
    total = len(contexts) * (len(policies) + 1)
    for place, context in enumerate(contexts):
        done = place * (len(policies) + 1)
        progress(f"context {context}: prepare", done / total)
        ids = torch.randint(2, model.config.vocab_size, (context + rows + 1,))
        start = time.monotonic()
        text = RowsText.prepare(model, ids, context)
        prepare = time.monotonic() - start
        # Warm up. Not with a plan that is timed: a text keeps states of the plans that it has seen.
        for spec in (_OTHER, *(each for each in policies if not each.startswith("delta"))):
            text.log_probs(model, make_policy(spec, model, budget))
        for number, spec in enumerate(policies, 1):
            policy = make_policy(spec, model, budget)
            progress(f"context {context}: {policy.name}", (done + number) / total)
            start = time.monotonic()
            at_once = text.log_probs(model, policy)
            ours = time.monotonic() - start
            start = time.monotonic()
            stepwise = forced_log_probs(
                model, _NoTokens, policy, ids.tolist(), context, lambda step: None
            )
            theirs = time.monotonic() - start
            measured.append(
                row(
                    f"{policy.name}, {rows} rows behind {context} tokens", _PEER, "s a policy",
                    ours, theirs, policy=spec, prepare=round(prepare, 2),
                    largest_difference=float((at_once - stepwise).abs().max()),
                )
            )  # fmt: skip
    return result("eval", command, measured)


def smollm2_shape(**shape: int) -> Any:
    """SmolLM2-135M with random weights, or a smaller one."""
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "max_position_embeddings": 8192, **shape,
    }  # fmt: skip
    config = LlamaConfig(**values, tie_word_embeddings=True, eos_token_id=None, pad_token_id=0)
    return LlamaForCausalLM(config).eval()
