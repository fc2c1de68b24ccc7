"""The demo of a real model: a text of Python's documentation, its next tokens, and a question.

Each side reads the first part of the text, decodes its next tokens as they stand there, and then
answers. The answer's beginning is given: a model of 135 million parameters loses itself without.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deltadecode.architecture import attention_layers
from deltadecode.config import DeltaConfig
from deltadecode.errors import DeltaDecodeError

TOPIC = "debugger"  # of pydoc_data.topics
QUESTION = "For which signal does Pdb set a handler?"
BEGINNING = "Pdb sets a handler for the"
EXPECTED = "SIGINT"
CONTEXT, SCORED, MOST_NEW = 3800, 128, 12


def encode(tokenizer: Any, context: int, scored: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids: the text [1, context + scored + 1], the question, and the answer's beginning.

    Together they are one message to the chat template and the start of its answer.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DeltaDecodeError(f"this Python has no documentation to read: {error}") from error
    place = "TEXT"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": place}], add_generation_prompt=True, tokenize=False
    )
    head, _, tail = chat.partition(place)

    def tokens(text: str) -> Tensor:
        ids: Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        return ids

    text = tokens(head + topics[TOPIC])[:, : context + scored + 1]
    if text.shape[1] < context + scored + 1:
        raise DeltaDecodeError(
            f"topic {TOPIC!r} of this Python's documentation has {text.shape[1]} tokens, and "
            f"{context + scored + 1} are needed"
        )
    return text, tokens(f"\n\n{QUESTION}{tail}"), tokens(BEGINNING)


class Reader:
    """One side: a model with its cache, fed by hand.

    Parameters
    ----------
    model : PreTrainedModel
        In evaluation mode; attention is what it is switched to.
    on_token : callable
        Told the number of decode steps so far.
    """

    def __init__(self, model: Any, on_token: Callable[[int], None]) -> None:
        self.steps = 0
        self.length = 0  # tokens in the cache
        self.read = 0  # tokens that one layer with full attention would have read in decode steps
        self._model, self._cache, self._on_token = model, None, on_token

    def prefill(self, ids: Tensor) -> Tensor:
        """Logits after a part of the prompt, [V]."""
        output = self._model(
            input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        self._cache = output.past_key_values
        self.length += ids.shape[1]
        logits: Tensor = output.logits[0, -1].float()
        return logits

    def step(self, token: Tensor) -> Tensor:
        """Logits after one more token, [V]."""
        logits = self.prefill(token.view(1, 1))
        self.steps += 1
        self.read += self.length
        self._on_token(self.steps)
        return logits


def solve(
    model: Any,
    tokenizer: Any,
    cfg: DeltaConfig | None,
    *,
    on_ready: Callable[[int], None],
    on_token: Callable[[int], None] = lambda tokens: None,
    on_text: Callable[[str], None] = lambda text: None,
    context: int = CONTEXT,
    scored: int = SCORED,
) -> dict[str, Any]:
    """Read, decode and answer; None: with full attention.

    ``on_ready`` is told the most decode steps when the first part is read. ``seconds`` is the time
    after it, ``loss`` the mean over the scored tokens, in nats.
    """
    from deltadecode.engines.transformers import enable, stats

    text, question, beginning = encode(tokenizer, context, scored)
    if cfg is not None:
        enable(model, cfg)
    reader = Reader(model, on_token)
    with torch.inference_mode():
        reader.prefill(text[:, :context])
        on_ready(scored + beginning.shape[1] + MOST_NEW)
        start = time.perf_counter()
        loss = 0.0
        for token, following in zip(text[0, context:-1], text[0, context + 1 :], strict=True):
            loss -= float(reader.step(token).log_softmax(-1)[following])
            on_text(tokenizer.decode(token))
        reader.prefill(torch.cat([text[:, -1:], question], dim=1))
        on_text(f"\n{QUESTION}\n{BEGINNING}")
        for token in beginning[0]:
            logits = reader.step(token)
        written = _write(reader, logits, tokenizer, on_text)
        seconds = time.perf_counter() - start
    layers = len(attention_layers(model))
    counts = stats(model) if cfg is not None else None
    full_tokens = layers * reader.read
    answer = first_word(tokenizer.decode(written, skip_special_tokens=True))
    return {
        "answer": answer,
        "correct": answer == EXPECTED,
        "expected": EXPECTED,
        "question": QUESTION,
        "beginning": BEGINNING,
        "text": tokenizer.decode(written, skip_special_tokens=True).strip(),
        "loss": loss / scored,
        "context_tokens": context,
        "scored_tokens": scored,
        "tokens": len(written),
        "steps": reader.steps,
        "seconds": seconds,
        "attended_tokens": full_tokens if counts is None else counts.attended_tokens,
        "full_tokens": full_tokens if counts is None else counts.full_tokens,
    }


def first_word(text: str) -> str | None:
    """The first word of an answer, which is all that is asked for; None: it has none."""
    found = re.search(r"\w+", text)
    return found[0] if found else None


def _write(
    reader: Reader, logits: Tensor, tokenizer: Any, on_text: Callable[[str], None]
) -> list[int]:
    """The likeliest tokens, until the answer's end."""
    written: list[int] = []
    while len(written) < MOST_NEW:
        token = logits.argmax()
        if token == tokenizer.eos_token_id:
            break
        written.append(int(token))
        on_text(tokenizer.decode(token))
        logits = reader.step(token)
    return written
