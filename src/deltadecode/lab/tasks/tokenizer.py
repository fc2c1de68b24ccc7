"""The embedded model's tokenizer: one token a word, line ends are words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltadecode.lab.tasks.vocabulary import EOS_ID, NEWLINE, PAD_ID, SPECIAL, TOKEN_IDS, UNK_ID

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def build_tokenizer(model_max_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer that ships with the embedded model.

    Decoding gives back the text: words are joined by single spaces, and the spaces around a line
    end are dropped.
    """
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel(TOKEN_IDS, unk_token=SPECIAL[UNK_ID]))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n"), "isolated"),
            pre_tokenizers.Split(Regex(" +"), "removed"),
        ]
    )
    words.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="\x00", cleanup=False),  # puts a space before every word
            decoders.Fuse(),
            decoders.Replace(f" {NEWLINE}", NEWLINE),
            decoders.Replace(f"{NEWLINE} ", NEWLINE),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=SPECIAL[PAD_ID],
        eos_token=SPECIAL[EOS_ID],
        unk_token=SPECIAL[UNK_ID],
        padding_side="left",
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )
