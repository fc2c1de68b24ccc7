"""CLSA in engines of one process: ``python clsa_worker.py JOB OUT``, both files of JSON.

A job has ``folder`` (for the models), ``prompts``, ``max_tokens``, ``engine`` (arguments of
``vllm.LLM`` for all) and ``runs`` by name: each has ``mode`` and ``engine``, the ``rounds`` that
the prompts come, ``params`` of sampling, or ``configure``: then only a configuration is made. A run
of a saved model has its ``path`` and ``prompts`` of its own, and is compared with it. For
each mode, or those of ``reference``, Transformers says what the tokens are, and their logprobs; of
each run in ``judged``, by how many nats a token its own fall behind the likeliest, in float32.
"""

import json
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "models"))
# The engine core then runs here, and its errors are seen.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
SHAPE = {
    "head_dim": 32,
    "index_head_dim": 32,
    "sliding_window": 20,
    "index_topk": 16,
    "max_position_embeddings": 512,
    "eos_token_id": None,
}


def make(mode, job):
    import torch
    from clsa_models import make_model

    path = Path(job["folder"]) / mode
    if not path.is_dir():
        make_model(torch.float32, mode=mode, **{**SHAPE, **job.get("shape", {})}).save_pretrained(
            path
        )
    return path


def by_transformers(path, job):
    """Tokens of each prompt, alone, and the logprobs of all its tokens [n, vocabulary]."""
    import torch

    from deltadecode.models.clsa import ClsaForCausalLM

    model = ClsaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens, logprobs = [], []
    for prompt in job["prompts"]:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=job["max_tokens"],
            do_sample=False,
        )  # fmt: skip
        tokens.append(out[0, len(prompt) :].tolist())
        with torch.no_grad():
            logprobs.append(model(out).logits[0].log_softmax(-1).tolist())
    return {"tokens": tokens, "logprobs": logprobs}


def lost(path, job, written):
    """Mean nats by which the written tokens fall behind those that Transformers takes there."""
    import torch

    from deltadecode.models.clsa import ClsaForCausalLM

    model = ClsaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    nats = []
    for prompt, tokens in zip(job["prompts"], written, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1)
        taken = logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        nats.append((logprobs.amax(1) - taken).mean())
    return torch.stack(nats).mean().item()


def by_vllm(path, run, job):
    from vllm import LLM, SamplingParams
    from vllm.compilation.counter import compilation_counter
    from vllm.engine.arg_utils import EngineArgs

    engine = {
        "model": str(path), "dtype": "float32", "skip_tokenizer_init": True, "seed": 0,
        "max_model_len": 512, "max_num_seqs": 4, "enforce_eager": True, **job.get("engine", {}),
        **run.get("engine", {}),
    }  # fmt: skip
    if run.get("configure"):
        EngineArgs(**engine).create_engine_config()
        return {}
    captured = compilation_counter.num_cudagraph_captured
    llm = LLM(**engine)
    params = SamplingParams(
        temperature=0.0, max_tokens=job["max_tokens"], ignore_eos=True, detokenize=False,
        **run.get("params", {}),
    )  # fmt: skip
    prompts = [{"prompt_token_ids": prompt} for prompt in run.get("prompts", job["prompts"])]
    rounds = [llm.generate(prompts, params, use_tqdm=False) for _ in range(run.get("rounds", 1))]
    core = llm.llm_engine.engine_core.engine_core
    return {
        "tokens": [[list(each.outputs[0].token_ids) for each in outputs] for outputs in rounds],
        "cached": [[each.num_cached_tokens for each in outputs] for outputs in rounds],
        "prompt_logprobs": [
            [
                {token: entry.logprob for token, entry in step.items()}
                for step in (each.prompt_logprobs or [])[1:]
            ]
            for each in rounds[0]
        ],
        "runner": 2 if llm.llm_engine.vllm_config.use_v2_model_runner else 1,
        "captured": compilation_counter.num_cudagraph_captured - captured,
        "graphs": llm.llm_engine.vllm_config.compilation_config.cudagraph_mode.name,
        "bytes": bytes_of_a_token(core.scheduler.kv_cache_config),
    }


def bytes_of_a_token(cache):
    """What the caches that keep all tokens take for one."""
    specs = [group.kv_cache_spec for group in cache.kv_cache_groups]
    return sum(
        spec.page_size_bytes * len(group.layer_names) // spec.block_size
        for spec, group in zip(specs, cache.kv_cache_groups, strict=True)
        if getattr(spec, "sliding_window", None) is None
    )


def attempt(run, job):
    try:
        if "path" in run:
            found = by_vllm(run["path"], run, job)
            return found | {"expected": by_transformers(run["path"], {**job, **run})["tokens"]}
        return by_vllm(make(run["mode"], job), run, job)
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    found = {name: attempt(run, job) for name, run in job["runs"].items()}
    modes = {run["mode"] for run in job["runs"].values() if "mode" in run}
    for mode in job.get("reference", modes):
        found[mode] = by_transformers(make(mode, job), job)
    for name in job.get("judged", ()):
        path = make(job["runs"][name]["mode"], job)
        found[name]["lost"] = lost(path, job, found[name]["tokens"][0])
    Path(sys.argv[2]).write_text(json.dumps(found))
