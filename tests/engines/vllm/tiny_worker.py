"""Tiny random models in engines of one process: ``python tiny_worker.py JOB OUT``, files of JSON.

A job has ``folder`` (for the models) and ``runs``. Each of those makes one engine after the other
and says what it gave: ``model`` (a name of MODELS), ``config`` (of DELTA; without it the engine is
stock), ``engine`` (arguments of ``vllm.LLM``), ``prompts`` and ``max_tokens``.
"""

import gc
import json
import os
import sys
from pathlib import Path

# The engine core then runs here, where its batches can be seen.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

SHAPE = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256, "bos_token_id": 0,
    "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.4, "tie_word_embeddings": False,
}  # fmt: skip
MODELS = {
    "llama": {"model_type": "llama", "num_hidden_layers": 4},
    # As Phi-3 and Phi-4 have it: a window on every layer, as long as the longest sequence.
    "phi": {"model_type": "phi3", "num_hidden_layers": 4, "sliding_window": 256},
    # Layers 5 and 7 read the cache of layer 3; the even ones slide.
    "gemma": {
        "model_type": "gemma3n_text", "num_hidden_layers": 8, "num_kv_shared_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 4, "sliding_window": 16,
        "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 16, "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 8, "initializer_range": 0.1,
        "tie_word_embeddings": True,
    },
}  # fmt: skip


def make(name, folder):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(folder) / name
    if not path.is_dir():
        values = {**SHAPE, **MODELS[name]}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
        model.float().save_pretrained(path)
    return path


def record_batches(batches):
    """Keep new tokens and lengths of the rows that the stock builder is given."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder as Builder

    build = Builder.build

    def recorded(self, common_prefix_len, common, *args, **kwargs):
        starts = common.query_start_loc[: common.num_reqs + 1]
        batches.append([starts.diff().tolist(), common.seq_lens[: common.num_reqs].tolist()])
        return build(self, common_prefix_len, common, *args, **kwargs)

    Builder.build = recorded
    return lambda: setattr(Builder, "build", build)


def record_hashes(hashes):
    """Keep the block hashes of each request that a scheduler is given."""
    from vllm.v1.core.sched.scheduler import Scheduler

    add = Scheduler.add_request

    def recorded(self, request, *args, **kwargs):
        hashes.append([str(each) for each in request.block_hashes])
        return add(self, request, *args, **kwargs)

    Scheduler.add_request = recorded
    return lambda: setattr(Scheduler, "add_request", add)


def counted(name):
    from prometheus_client import REGISTRY

    kinds = ("attended", "full")
    labels = {"model_name": name}
    return [REGISTRY.get_sample_value(f"deltadecode_{k}_tokens_total", labels) or 0 for k in kinds]


def run(job, folder):
    from vllm import LLM, SamplingParams

    engine = {
        "model": str(make(job["model"], folder)), "served_model_name": job["model"],
        "dtype": "float32", "skip_tokenizer_init": True, "enforce_eager": True, "seed": 0,
        "max_model_len": 256, "max_num_seqs": 4, "disable_log_stats": False,
        **job.get("engine", {}),
    }  # fmt: skip
    if "config" in job:
        engine |= {
            "attention_backend": "CUSTOM",
            "additional_config": {"deltadecode": job["config"]},
        }
    before = counted(job["model"])
    llm = LLM(**engine)
    batches, hashes = [], []
    restore = record_batches(batches), record_hashes(hashes)
    params = SamplingParams(
        temperature=0.0, max_tokens=job["max_tokens"], logprobs=3, ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    try:
        outputs = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    finally:
        for each in restore:
            each()
    return {
        "tokens": [list(output.token_ids) for output in outputs],
        "logprobs": [
            [{str(token): entry.logprob for token, entry in step.items()} for step in each.logprobs]
            for each in outputs
        ],
        "batches": batches,
        "hashes": hashes,
        "counted": [int(new - old) for new, old in zip(counted(job["model"]), before, strict=True)],
    }


def loaded():
    """Modules of ours, and whether Transformers knows the attention ``delta``."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    modules = [name for name in sys.modules if name.split(".")[0] == "deltadecode"]
    return {"modules": modules, "delta": "delta" in ALL_ATTENTION_FUNCTIONS}


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    found = []
    for each in job["runs"]:
        try:
            found.append(run(each, job["folder"]))
        except Exception as error:
            found.append({"error": f"{type(error).__name__}: {error}"})
        found[-1] |= loaded()
        Path(sys.argv[2]).write_text(json.dumps(found))
        gc.collect()
