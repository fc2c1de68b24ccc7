"""The closed vocabulary of the embedded task: plain words, digits and made-up node names.

Every word is one token, so a problem's length in tokens is the number of its words plus its
line ends, whatever the tokenizer's implementation.
"""

from __future__ import annotations

SPECIAL = ("<pad>", "<eos>", "<unk>")
NEWLINE = "\n"
DIGITS = tuple("0123456789")
WORDS = (
    *("Facts", "Question", "Steps", "start", "at", "with", "follow", "the", "chain", "keeping"),
    *("last", "digit", "of", "every", "sum", "leads", "to", "and", "adds", "holds", "so"),
    *("ends", "answer", "is", ":", "+", "=", ".", ","),
)

_CONSONANTS = "bdfklmnprstvz"
_VOWELS = "aeiou"
_SECOND_SYLLABLES = 8
_RUDE = {"puto"}


def _names() -> tuple[str, ...]:
    """Two-syllable names; a fixed stride pairs the syllables so that no two names are alike."""
    syllables = [c + v for c in _CONSONANTS for v in _VOWELS]
    count = len(syllables)
    names = (
        first + syllables[(3 * i + 7 * k + 1) % count]
        for i, first in enumerate(syllables)
        for k in range(_SECOND_SYLLABLES)
    )
    return tuple(name for name in names if name not in _RUDE)


NAMES = _names()
TOKENS = (*SPECIAL, NEWLINE, *DIGITS, *WORDS, *NAMES)
TOKEN_IDS = {token: i for i, token in enumerate(TOKENS)}
PAD_ID, EOS_ID, UNK_ID = 0, 1, 2


def encode(text: str) -> list[int]:
    """Token ids of `text`, as the shipped tokenizer gives; KeyError for an unknown word."""
    return [TOKEN_IDS[word] for word in text.replace("\n", " \n ").split(" ") if word]
