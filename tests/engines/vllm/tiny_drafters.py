"""Tiny drafters that read hidden states of a model, made of its weights and of random ones.

Their tokens are as good as random: nearly every draft is rejected.
"""

import json


def make_drafter(kind, path, drafts):
    """Write "eagle" or "eagle3" beside a Llama at ``path``, or "mtp" into a GLM-4-MoE there.

    Returns the ``speculative_config`` of vLLM for so many drafts.
    """
    found = {"method": kind, "num_speculative_tokens": drafts}
    if kind == "mtp":
        add_mtp(path)
        return found
    return {**found, "model": str(make_eagle(kind, path))}


def make_eagle(kind, path):
    """The first layer of the model behind a projection of what the drafter reads."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = path.with_name(f"{path.name}-{kind}")
    folder.mkdir(exist_ok=True)
    values = json.loads((path / "config.json").read_text())
    weights, size = load_file(path / "model.safetensors"), values["hidden_size"]
    generator = torch.Generator().manual_seed(3)
    place = "model.layers.0."
    layer = {
        name.removeprefix(place): weight.clone()
        for name, weight in weights.items()
        if name.startswith(place)
    }
    values["num_hidden_layers"] = 1
    if kind == "eagle":
        values["architectures"] = ["LlamaForCausalLM"]
        del layer["input_layernorm.weight"]
        made = {f"layers.0.{name}": weight for name, weight in layer.items()}
        # The mean of an embedding and a hidden state, nearly.
        mean = torch.eye(size).repeat(1, 2) / 2
        made["fc.weight"] = mean + 0.01 * torch.randn(size, 2 * size, generator=generator)
    else:
        values |= {
            "architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": values["vocab_size"],
            "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
        }  # fmt: skip
        # Attention reads both the embedding and the hidden state, side by side.
        for name in ("q_proj", "k_proj", "v_proj"):
            layer[f"self_attn.{name}.weight"] = layer[f"self_attn.{name}.weight"].repeat(1, 2)
        made = {f"midlayer.{name}": weight for name, weight in layer.items()}
        made |= {
            "midlayer.hidden_norm.weight": torch.ones(size), "norm.weight": torch.ones(size),
            "fc.weight": 0.1 * torch.randn(size, 3 * size, generator=generator),
            "lm_head.weight": weights["lm_head.weight"].clone(),
        }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))
    save_file({k: v.contiguous() for k, v in made.items()}, folder / "model.safetensors")
    return folder


def add_mtp(path):
    """Write the last layer once more, as the one behind it, with what MTP has beside."""
    import torch
    from safetensors.torch import load_file, save_file

    values = json.loads((path / "config.json").read_text())
    weights, size = load_file(path / "model.safetensors"), values["hidden_size"]
    count = values["num_hidden_layers"]
    last, place = f"model.layers.{count - 1}.", f"model.layers.{count}."
    made = {n.replace(last, place): w.clone() for n, w in weights.items() if n.startswith(last)}
    generator = torch.Generator().manual_seed(1)
    made |= {f"{place}{n}.weight": torch.ones(size) for n in ("enorm", "hnorm", "shared_head.norm")}
    made |= {
        f"{place}eh_proj.weight": 0.1 * torch.randn(size, 2 * size, generator=generator),
        f"{place}embed_tokens.weight": weights["model.embed_tokens.weight"].clone(),
        f"{place}shared_head.head.weight": weights["lm_head.weight"].clone(),
    }
    save_file(weights | made, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({**values, "num_nextn_predict_layers": 1}))
