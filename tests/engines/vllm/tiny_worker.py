"""Tiny random models in engines of one process: ``python tiny_worker.py JOB OUT``, files of JSON.

A job has ``folder`` (for the models) and ``runs``. Each of those makes one engine after the other
and says what it gave: ``model`` (a name of MODELS), ``config`` (of DELTA; without it the engine is
stock), ``engine`` (arguments of ``vllm.LLM``), ``prompts``, ``max_tokens`` and ``rounds``, how
often the prompts come; with ``logprobs`` null it gives none. Further ``params`` are of sampling.
With ``answered`` each round's prompts are those of the one before, and what came of them.
With ``drafter``, a name of DRAFTERS, that many ``drafts`` come from it. With ``lora`` an adapter
answers. With ``float8``, scales of keys and of values, Transformers keeps
them so, and for vLLM they are written into the checkpoint, unless both are 1. With ``cut`` ours
rounds as stock vLLM on CPUs. Where ``side`` is "transformers", that integration runs the prompts.
With ``fork`` each run has a process of its own, which need not import vLLM again.
"""

import gc
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

from tiny_drafters import make_drafter
from tiny_models import MODELS, SHAPE


def make(name, folder):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(folder) / name
    if not path.is_dir():
        values = {**SHAPE, **MODELS[name]}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
        for part, weight in model.named_parameters():
            if part.endswith(".sinks"):
                weight.data += 8  # beyond the logits of most keys, so that a lost one is seen
        if values["tie_word_embeddings"]:
            # Else each token is its own successor, whatever layers do.
            model.get_input_embeddings().weight.data *= 0.3
        model.float().save_pretrained(path)
        complete(path)
    return path


def complete(path):
    """Write into a checkpoint what vLLM looks for there and Transformers leaves out."""
    from safetensors.torch import load_file, save_file

    values = json.loads((path / "config.json").read_text())
    weights = load_file(path / "model.safetensors")
    there = set(weights)
    first = values["num_hidden_layers"] - (values.get("num_kv_shared_layers") or 0)
    # Published checkpoints have keys and values of layers that share a cache, though none reads
    # them, and vLLM 0.24 misses those that are not there.
    for layer in range(first, values["num_hidden_layers"]):
        for part in ("k_proj", "v_proj", "k_norm"):
            own, shared = (f"model.layers.{n}.self_attn.{part}.weight" for n in (first - 1, layer))
            weights.setdefault(shared, weights[own].clone())
    # Experts of gpt-oss that are not quantized are known by another name to vLLM 0.24.
    if values["model_type"] == "gpt_oss" and version("vllm").startswith("0.24."):
        other = ".experts.", ".experts.routed_experts."
        weights = {name.replace(*other): weight for name, weight in weights.items()}
    if set(weights) != there:
        save_file(weights, path / "model.safetensors", {"format": "pt"})


def make_adapter(path):
    """Write a random LoRA adapter of a Llama beside it; returns the folder, and what it adds."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = path.with_name(f"{path.name}-adapter")
    folder.mkdir(exist_ok=True)
    rank, targets = 8, ("q_proj", "v_proj")
    generator = torch.Generator().manual_seed(1)
    weights, added = {}, {}
    for name, weight in load_file(path / "model.safetensors").items():
        if name.split(".")[-2] in targets:
            out, inner = weight.shape
            b = torch.randn(out, rank, generator=generator) * 0.2
            a = torch.randn(rank, inner, generator=generator) * 0.2
            place = "base_model.model." + name.removesuffix(".weight")
            weights |= {f"{place}.lora_A.weight": a, f"{place}.lora_B.weight": b}
            added[name] = b @ a
    save_file(weights, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(targets)}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder, added


def with_scales(path, k_scale, v_scale):
    """Write a checkpoint of float8 keys and values, as llm-compressor does; returns its folder."""
    from safetensors.torch import load_file, save_file
    from torch import tensor

    folder = path.with_name(f"{path.name}-float8")
    folder.mkdir(exist_ok=True)
    values = json.loads((path / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    values["quantization_config"] = {
        "quant_method": "compressed-tensors", "config_groups": {}, "ignore": [],
        "kv_cache_scheme": {**scheme, "symmetric": True},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))
    weights = load_file(path / "model.safetensors")
    for layer in range(values["num_hidden_layers"]):
        place = f"model.layers.{layer}.self_attn"
        weights |= {f"{place}.k_scale": tensor(k_scale), f"{place}.v_scale": tensor(v_scale)}
    save_file(weights, folder / "model.safetensors")
    return folder


def keep_as_float8(k_scale, v_scale):
    """Let caches of the integration lose what float8 loses."""
    from torch import float8_e4m3fn

    from deltadecode.engines.transformers.layers import DeltaLayer

    update = DeltaLayer.update

    def rounded(self, keys, values, *args, **kwargs):
        keys, values = (
            (numbers / scale).clamp(-448, 448).to(float8_e4m3fn).to(numbers.dtype) * scale
            for numbers, scale in ((keys, k_scale), (values, v_scale))
        )
        return update(self, keys, values, *args, **kwargs)

    DeltaLayer.update = rounded


def cut_float8():
    """Let our writer round towards zero, as the stock one does on CPUs, and not on GPUs."""
    import torch

    from deltadecode.engines.vllm import cpu

    nearest = cpu.to_float8

    def cut(numbers, scale):
        rounded = nearest(numbers, scale)
        beyond = rounded.to(numbers.dtype).abs() > (numbers / scale).abs()
        return (rounded.view(torch.uint8) - beyond.to(torch.uint8)).view(rounded.dtype)

    cpu.to_float8 = cut


def expand_numbers():
    """Give each token the temperature of its row: on CPUs vLLM 0.32 leaves it to chance.

    Its function writes into a copy of everything that is not int64.
    """
    from vllm.v1.sample import rejection_sampler

    def expand(x, cu_num_tokens, num_tokens, replace_from=0, replace_to=0):
        counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
        each = x.repeat_interleave(counts.long())
        return each.masked_fill(each == replace_from, replace_to)

    rejection_sampler.expand_batch_to_tokens = expand


def run_transformers(job, folder):
    """Each prompt alone, by the Transformers integration: what else a run gives has no meaning.

    With ``answered`` a round reads the whole blocks that the one before left, as vLLM does.
    """
    import torch
    from transformers import AutoModelForCausalLM

    import deltadecode as dd

    path = make(job["model"], folder)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    if job.get("lora"):
        weights = dict(model.named_parameters())
        with torch.no_grad():
            for name, more in make_adapter(path)[1].items():
                weights[name] += more
    if job.get("float8"):
        keep_as_float8(*job["float8"])
    dd.enable(model, dd.DeltaConfig.from_dict(job["config"]))
    tokens = []
    for prompt in job["prompts"]:
        cache = None
        for _ in range(job["rounds"] if job.get("answered") else 1):
            if cache is not None:
                block = job["engine"]["block_size"]
                cache.crop((len(prompt) - 1) // block * block - cache.get_seq_length())
            ids = torch.tensor([prompt])
            # Without a mask, tokens of the padding's id would be left out.
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=job["max_tokens"],
                do_sample=False, eos_token_id=None, past_key_values=cache,
                return_dict_in_generate=True,
            )  # fmt: skip
            answer = out.sequences[0, len(prompt) :].tolist()
            prompt, cache = prompt + answer, out.past_key_values
        tokens.append(answer)
    return {"tokens": tokens}


def record_batches(batches):
    """Keep new tokens and lengths of the rows that the stock builder is given."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder as Builder

    build = Builder.build

    def recorded(self, common_prefix_len, common_attn_metadata, *args, **kwargs):
        common = common_attn_metadata  # drafters of EAGLE's kind name it
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
    from vllm.lora.request import LoRARequest

    path = make(job["model"], folder)
    if job.get("cut"):
        cut_float8()
    if "params" in job:
        expand_numbers()
    if (job.get("float8") or [1, 1]) != [1, 1]:
        path = with_scales(path, *job["float8"])
    adapter = LoRARequest("adapter", 1, str(make_adapter(path)[0])) if job.get("lora") else None
    engine = {
        "model": str(path), "enable_lora": adapter is not None, "served_model_name": job["model"],
        "dtype": "float32", "skip_tokenizer_init": True, "enforce_eager": True, "seed": 0,
        "max_model_len": 256, "max_num_seqs": 4, "disable_log_stats": False,
        "num_gpu_blocks_override": 1024,  # to fill a whole GiB takes longer than most runs
        **job.get("engine", {}),
    }  # fmt: skip
    if "drafter" in job:
        engine["speculative_config"] = make_drafter(job["drafter"], path, job["drafts"])
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
        max_tokens=job["max_tokens"], logprobs=job.get("logprobs", 3),
        ignore_eos=True, detokenize=False, **{"temperature": 0.0, **job.get("params", {})},
    )  # fmt: skip
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    requests = None
    try:
        for number in range(job.get("rounds", 1)):
            if requests and job.get("answered"):
                prompts = [
                    {"prompt_token_ids": [*each.prompt_token_ids, *each.outputs[0].token_ids]}
                    for each in requests
                ]
            # The other way round each time: what came last may be cached still.
            order = -1 if number % 2 else 1
            requests = llm.generate(prompts[::order], params, use_tqdm=False, lora_request=adapter)[
                ::order
            ]
    finally:
        for each in restore:
            each()
    outputs = [request.outputs[0] for request in requests]
    return {
        "tokens": [list(output.token_ids) for output in outputs],
        "logprobs": [
            [
                {str(token): entry.logprob for token, entry in step.items()}
                for step in each.logprobs or ()
            ]
            for each in outputs
        ],
        "batches": batches,
        "runner": 2 if llm.llm_engine.vllm_config.use_v2_model_runner else 1,
        "hashes": hashes,
        "cached": [request.num_cached_tokens for request in requests],
        "preempted": total(llm, "vllm:num_preemptions"),
        "accepted": total(llm, "vllm:spec_decode_num_accepted_tokens"),
        "drafted": total(llm, "vllm:spec_decode_num_draft_tokens"),
        "counted": [int(new - old) for new, old in zip(counted(job["model"]), before, strict=True)],
    }


def total(llm, name):
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


def loaded():
    """Modules of ours, and whether Transformers knows the attention ``delta``."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    modules = [name for name in sys.modules if name.split(".")[0] == "deltadecode"]
    return {"modules": modules, "delta": "delta" in ALL_ATTENTION_FUNCTIONS}


def attempt(job, folder):
    try:
        found = (run_transformers if job.get("side") == "transformers" else run)(job, folder)
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    return found | loaded()


def in_a_fork(job, folder):
    path = Path(folder) / "fork.json"
    path.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        path.write_text(json.dumps(attempt(job, folder)))
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
    return json.loads(path.read_text())


if __name__ == "__main__":
    # The engine core then runs here, where its batches can be seen.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    job = json.loads(Path(sys.argv[1]).read_text())
    todo = attempt
    if job.get("fork"):
        import compressed_tensors  # noqa: F401  once for all, as the others
        import vllm.v1.engine.llm_engine
        import vllm.v1.worker.cpu_worker  # noqa: F401

        gc.freeze()  # what is shared is not looked through in every process
        todo = in_a_fork
    found = []
    for each in job["runs"]:
        found.append(todo(each, job["folder"]))
        Path(sys.argv[2]).write_text(json.dumps(found))
        gc.collect()
