"""Prompts: read, checked and put into tokens."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltadecode.architecture import longest_prompt, text_config
from deltadecode.cli.options import check_text
from deltadecode.cli.output import BadInput

if TYPE_CHECKING:
    from torch import Tensor


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """The prompt from the argument, a file or stdin (``"-"`` or neither); both files are UTF-8."""
    if prompt is not None and prompt_file is not None:
        raise BadInput(f"give PROMPT or --prompt-file, not both; got {str(prompt_file)!r} as well")
    try:
        if prompt_file is not None:
            text = prompt_file.read_text(encoding="utf-8-sig")
        elif prompt in (None, "-"):
            if prompt is None and sys.stdin.isatty():
                raise BadInput("no prompt: give PROMPT, --prompt-file, or pipe one in")
            if isinstance(sys.stdin, io.TextIOWrapper):
                # The locale's own encoding and error handler may let any bytes pass.
                sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
            text = sys.stdin.read()
        else:
            text = str(prompt)
    except OSError as error:
        raise BadInput(f"cannot read prompt file {str(prompt_file)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"prompt {str(prompt_file or '-')!r} is not UTF-8 text: {error}") from error
    check_text("the prompt", text)
    if not text.strip():
        raise BadInput(f"the prompt must not be empty, got {text!r}")
    return text


def encode(tokenizer: Any, text: str, system: str | None, *, use_template: bool) -> Tensor:
    """Token ids of a prompt, [1, tokens] int64; the chat template is used if there is one.

    Raises
    ------
    BadInput
        When a system message has no place, or the prompt has no tokens.
    """
    if use_template and tokenizer.chat_template:
        messages = [{"role": "user", "content": text}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        ids: Tensor = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids
        return ids
    if system is not None:
        reason = "this tokenizer has none" if use_template else "--no-chat-template is given"
        raise BadInput(f"--system {system!r} needs a chat template; {reason}")
    ids = tokenizer(text, return_tensors="pt").input_ids
    if ids.shape[1] == 0:
        raise BadInput(f"the prompt must have at least one token, got none from {text!r}")
    return ids.long()


def fit(config: Any, prompt_tokens: int, max_new_tokens: int) -> int:
    """Tokens that may be written within the model's positions, ``max_new_tokens`` at most."""
    positions = longest_prompt(text_config(config))
    if positions is None:
        return max_new_tokens
    if prompt_tokens > positions:
        raise BadInput(
            f"the prompt must not be longer than the model's {positions} positions, "
            f"got {prompt_tokens} tokens"
        )
    # The last token written is never read, so it needs no position.
    return min(max_new_tokens, positions - prompt_tokens + 1)
