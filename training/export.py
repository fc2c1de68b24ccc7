"""Write a checkpoint as a Transformers model directory: bf16 safetensors and tokenizer.

python training/export.py --workdir DIR --out packages/embedded/src/deltadecode_embedded/model
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deltadecode.lab.tasks.tokenizer import build_tokenizer
from deltadecode.lab.tasks.vocabulary import EOS_ID, PAD_ID

MAX_POSITIONS = 8192  # problems of up to 6,400 tokens were trained on


def to_transformers(saved: dict) -> LlamaForCausalLM:
    """The checkpoint's weights in a `LlamaForCausalLM`, in their own dtype."""
    shape = dict(saved["shape"])
    theta = shape.pop("rope_theta")
    config = LlamaConfig(
        **shape,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=False,
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(saved["model"])
    return model.eval()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--workdir", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args()
    saved = torch.load(args.workdir / "checkpoint.pt", map_location="cpu")
    model = to_transformers(saved).to(torch.bfloat16)
    model.generation_config.do_sample = False
    model.save_pretrained(args.out)
    build_tokenizer(MAX_POSITIONS).save_pretrained(args.out)


if __name__ == "__main__":
    main()
