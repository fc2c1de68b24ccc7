"""A tiny model on disk, and the command line as a process."""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deltadecode.lab.tasks.tokenizer import build_tokenizer

LAYERS = 6
POSITIONS = 128


def make_model(folder, positions=POSITIONS):
    """Write a tiny random Llama with the embedded task's tokenizer."""
    tokenizer = build_tokenizer(positions)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=positions,
        eos_token_id=None,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def command(*arguments):
    code = "from deltadecode.cli import main; main()"
    return [sys.executable, "-c", code, *map(str, arguments)]
