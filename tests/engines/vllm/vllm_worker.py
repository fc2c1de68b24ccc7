"""One engine's work in one process: ``python vllm_worker.py JOB OUT``, both files of JSON.

A job has ``side`` ("vllm" or "transformers"), ``engine`` (arguments of ``vllm.LLM``), ``config``
(of DELTA), ``sleep`` (whether the engine sleeps after each round), ``async_scheduling``, and
``rounds``: lists of requests, each with a ``prompt``, in text or token ids, and sampling
``params``.
"""

import contextlib
import json
import os
import sys
from pathlib import Path
from unittest.mock import MagicMock

MODEL = (
    Path(__file__).parents[3] / "packages" / "embedded" / "src" / "deltadecode_embedded" / "model"
)
STAND_INS = "DELTADECODE_TEST_STAND_INS"


def schedule_ahead():
    """Have vLLM schedule asynchronously on a CPU, in whatever processes it starts."""
    import deltadecode_vllm
    from deltadecode.engines.vllm import versions

    def ahead(vllm_config):
        vllm_config.scheduler_config.async_scheduling = True
        setattr(vllm_config.scheduler_config, deltadecode_vllm.AHEAD, True)

    versions.schedule_ahead = ahead
    os.environ[STAND_INS] = "1"
    stand_in()


def stand_in():
    """Put something in the place of a GPU's streams and events: nothing has to be waited for."""
    import torch

    torch.cuda.Event = torch.cuda.current_stream = MagicMock()
    torch.cuda.stream = contextlib.nullcontext


# A process that is not forked imports this file first.
if STAND_INS in os.environ:
    stand_in()


def run_vllm(job):
    if job.get("async_scheduling"):
        schedule_ahead()
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # functions that workers are asked for
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform
    from vllm.sampling_params import StructuredOutputsParams

    engine = {
        "model": str(MODEL), "dtype": "float32", "max_model_len": 2048, "max_num_seqs": 32,
        "enforce_eager": True, "seed": 0, **job.get("engine", {}),
    }  # fmt: skip
    if not current_platform.is_cuda():
        # Twice the tokens of the most rows; a whole GiB takes longer to fill. Blocks have 128.
        blocks = 2**15 // engine.get("block_size", 128)
        engine = {"num_gpu_blocks_override": blocks, **engine}
    if "config" in job:
        engine |= {
            "attention_backend": "CUSTOM",
            "additional_config": {"deltadecode": job["config"]},
        }
    llm = LLM(**engine)

    def params(given):
        given = {"temperature": 0.0, "max_tokens": 600, **given}
        if "choice" in given:
            given["structured_outputs"] = StructuredOutputsParams(choice=given.pop("choice"))
        return SamplingParams(**given)

    rounds = []
    for requests in job["rounds"]:
        outputs = llm.generate(
            [prompt(request["prompt"]) for request in requests],
            [params(request.get("params", {})) for request in requests],
            use_tqdm=False,
        )
        rounds.append(
            [
                {
                    "cached": output.num_cached_tokens,
                    "completions": [
                        {
                            "tokens": list(each.token_ids),
                            "text": each.text,
                            "logprobs": [
                                {str(token): entry.logprob for token, entry in step.items()}
                                for step in each.logprobs or []
                            ],
                        }
                        for each in output.outputs
                    ],
                }
                for output in outputs
            ]
        )
        if job.get("sleep"):
            llm.sleep(level=1)
            llm.wake_up()
    return {
        "rounds": rounds,
        "async_scheduling": llm.collective_rpc(is_ahead)[0],
        "preempted": counted(llm, "vllm:num_preemptions"),
        "accepted": counted(llm, "vllm:spec_decode_num_accepted_tokens"),
        "drafted": counted(llm, "vllm:spec_decode_num_draft_tokens"),
    }


def is_ahead(worker):
    """Whether it schedules asynchronously, by the configuration of the engine's own process."""
    return worker.vllm_config.scheduler_config.async_scheduling


def prompt(given):
    return given if isinstance(given, str) else {"prompt_token_ids": given}


def counted(llm, name):
    metrics = llm.get_metrics() if llm.llm_engine.log_stats else []
    return sum(metric.value for metric in metrics if metric.name == name)


def run_transformers(job):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import deltadecode as dd

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    base = dd.DeltaConfig.for_model(model)
    dd.enable(model, dd.DeltaConfig.from_dict({**vars(base), **job["config"]}))
    rounds = []
    for requests in job["rounds"]:
        texts = [request["prompt"] for request in requests]
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=600, do_sample=False)
        new = out[:, inputs.input_ids.shape[1] :].tolist()
        end = tokenizer.eos_token_id
        rounds.append([[*row[: row.index(end)], end] if end in row else row for row in new])
    return {"rounds": rounds, "attended_fraction": dd.stats(model).attended_fraction}


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    found = run_transformers(job) if job["side"] == "transformers" else run_vllm(job)
    Path(sys.argv[2]).write_text(json.dumps(found))
