"""A GGUF used as it is, packed weights included, decodes with DELTA like the dequantized model."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import deltadecode as dd
from deltadecode.lab.smollm2 import SMOLLM2

PLAN = dd.DeltaConfig(
    page_size=4, budget_pages=4, recent_pages=1, sink_pages=1, dense_layers=(0,), delta_layers=(1,)
)
PROMPT, STEPS = 60, 3


def decoded(model, vocabulary):
    """Logits of some decode steps, and how many tokens they read."""
    torch.manual_seed(1)
    ids = torch.randint(3, vocabulary, (1, PROMPT + STEPS))
    with torch.inference_mode():
        cache = model(input_ids=ids[:, :PROMPT], logits_to_keep=1).past_key_values
        steps = [
            model(input_ids=ids[:, at, None], past_key_values=cache).logits[0, -1]
            for at in range(PROMPT, PROMPT + STEPS)
        ]
    return torch.stack(steps).float(), dd.stats(model).attended_tokens


def test_smollm2_from_its_gguf_decodes_as_from_its_folder(smollm2, tmp_path):
    gguf = SMOLLM2.find(tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, attn_implementation="delta"
    ).eval()
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    dd.enable(ours, PLAN)
    dd.enable(theirs, PLAN)
    found, read = decoded(ours, 40000)
    expected, as_many = decoded(theirs, 40000)
    assert read == as_many < 30 * sum(range(PROMPT + 1, PROMPT + STEPS + 1))
    # The folder has its weights in bfloat16.
    assert (found.log_softmax(-1) - expected.log_softmax(-1)).abs().mean() < 0.05
    assert (found.argmax(-1) == expected.argmax(-1)).all()


def test_packed_linear_layers_are_no_matter(monkeypatch):
    kernels = pytest.importorskip("transformers.integrations.gguf.kernels")
    utils = pytest.importorskip("transformers.integrations.gguf.utils")
    gguf = pytest.importorskip("gguf")

    def multiply(weight, x, kind, rows):
        return x @ kernels.dequantize_blocks(weight, kind, rows, x.shape[1], x.dtype).T

    # Published kernels are for GPUs; this is what they compute.
    monkeypatch.setattr(utils, "mul_mat_vec", multiply)
    kind = gguf.GGMLQuantizationType.Q8_0
    plain = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2,
        )
    ).eval()  # fmt: skip
    packed = copy.deepcopy(plain)
    for name, module in plain.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        blocks = gguf.quantize(module.weight.detach().numpy(), kind)
        replacement = utils.GgufLinear(module.in_features, module.out_features, int(kind))
        replacement.weight.data = torch.from_numpy(blocks)
        packed.set_submodule(name, replacement)
        module.weight.data = torch.from_numpy(gguf.dequantize(blocks, kind))
    dd.enable(packed, PLAN)
    dd.enable(plain, PLAN)
    found, read = decoded(packed, 64)
    expected, as_many = decoded(plain, 64)
    assert read == as_many < 4 * sum(range(PROMPT + 1, PROMPT + STEPS + 1))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
