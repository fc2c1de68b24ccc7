"""``deltadecode generate``: any model's own ``generate``, with DELTA."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltadecode.architecture import text_config
from deltadecode.cli.loading import (
    check_model_path,
    find_device,
    load_config,
    load_model,
    load_tokenizer,
    make_plan,
    parse_layers,
)
from deltadecode.cli.output import (
    BadInput,
    note,
    print_json,
    progress_bar,
    quiet_libraries,
    stderr,
)
from deltadecode.cli.plan_options import (
    PANEL,
    BudgetPages,
    DeltaLayers,
    DenseLayers,
    PageSize,
    PlanFile,
    RecentPages,
    SinkPages,
)
from deltadecode.cli.report import compared, remarks, summary
from deltadecode.config import DeltaConfig

if TYPE_CHECKING:
    from torch import Tensor

    from deltadecode.cli.decoding import Decoded

_SAMPLING = "Sampling"


class Dtype(str, Enum):
    """Dtypes of weights and cache."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def generate(
    model: Annotated[str, typer.Argument(help="Folder of a Transformers model.")],
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; '-' or none: read it from stdin.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from a file.")] = None,
    system: Annotated[str | None, typer.Option(help="System message of the chat.")] = None,
    no_chat_template: Annotated[
        bool, typer.Option("--no-chat-template", help="Give the model the bare prompt.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write.")] = 1024,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0: the likeliest token.", rich_help_panel=_SAMPLING)
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Nucleus, in (0, 1].", rich_help_panel=_SAMPLING)
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling.", rich_help_panel=_SAMPLING)] = 0,
    dtype: Annotated[Dtype, typer.Option(help="auto: that of the checkpoint.")] = Dtype.auto,
    device: Annotated[str, typer.Option(help="auto: the first GPU, else cpu.")] = "auto",
    plan: PlanFile = None,
    page_size: PageSize = None,
    budget_pages: BudgetPages = None,
    recent_pages: RecentPages = None,
    sink_pages: SinkPages = None,
    dense_layers: DenseLayers = None,
    delta_layers: DeltaLayers = None,
    full: Annotated[
        bool, typer.Option("--full", help="Full attention only.", rich_help_panel=PANEL)
    ] = False,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Then full attention too, and compare.", rich_help_panel=PANEL
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Generate text with a Transformers model and DELTA; the text comes to stdout as it is written.

    Without DELTA options the model gets its calibrated profile, or the default plan for its depth
    ('deltadecode info MODEL' shows it). The chat template is used when the tokenizer has one.
    """
    given = {
        "page_size": page_size,
        "budget_pages": budget_pages,
        "recent_pages": recent_pages,
        "sink_pages": sink_pages,
        "dense_layers": parse_layers("--dense-layers", dense_layers),
        "delta_layers": parse_layers("--delta-layers", delta_layers),
    }
    _check_full(full, {"plan": plan, "compare": compare or None, **given})
    if not 0.0 < top_p <= 1.0:
        raise BadInput(f"--top-p must be in (0, 1], got {top_p}")
    check_model_path(model)
    text = read_prompt(prompt, prompt_file)

    quiet_libraries()
    place = find_device(device)
    config = load_config(model)
    cfg = None if full else make_plan(config, plan, given)
    tokenizer = load_tokenizer(model)
    prompt_ids = encode(tokenizer, text, system, use_template=not no_chat_template)
    new_tokens = fit(config, prompt_ids.shape[1], max_new_tokens)
    settings: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        settings |= {"temperature": temperature, "top_p": top_p}

    with stderr().status(f"loading {Path(model).name}"):
        job = Job(
            model=load_model(model, dtype.value, place),
            tokenizer=tokenizer,
            prompt_ids=prompt_ids.to(place),
            settings=settings,
            seed=seed,
        )
    if new_tokens < max_new_tokens:
        note(f"writing at most {new_tokens} tokens: the model has no more positions")
    first = job.run(cfg, show=not as_json)
    second = job.run(None, show=False) if compare else None
    if as_json:
        found = summary(model, prompt_ids.shape[1], cfg, first)
        print_json(found if second is None else {**found, "compare": compared(first, second)})
        return
    for remark in remarks(first, second, delta=cfg is not None):
        note(remark)


@dataclass(frozen=True)
class Job:
    """A model, a prompt and settings, to run with DELTA and without."""

    model: Any
    tokenizer: Any
    prompt_ids: Tensor
    settings: dict[str, Any]
    seed: int

    def run(self, cfg: DeltaConfig | None, *, show: bool) -> Decoded:
        """Decode once: the text to stdout, or a progress bar to stderr.

        Parameters
        ----------
        cfg : DeltaConfig or None
            None: full attention.
        show : bool
            Whether to print the text.

        Returns
        -------
        Decoded
        """
        from deltadecode.cli.decoding import decode

        name = "full attention" if cfg is None else "DELTA"
        total = self.settings["max_new_tokens"]
        # On a terminal the text itself is the progress, and a bar would be drawn into it.
        with progress_bar(f"{name}: reading the prompt", total) as (bar, task), _line_end(show):

            def on_token(tokens: int) -> None:
                if show and sys.stdout.isatty():
                    if tokens == 1:
                        bar.stop()
                else:
                    bar.update(task, completed=tokens, description=name)

            return decode(
                self.model,
                self.tokenizer,
                self.prompt_ids,
                cfg,
                settings=self.settings,
                seed=self.seed,
                on_token=on_token,
                on_text=_print if show else lambda text: None,
            )


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """The prompt, from the argument, a file or stdin.

    Parameters
    ----------
    prompt : str or None
        The argument.
    prompt_file : Path or None
        The file.

    Returns
    -------
    str
        As it was given, line ends included.

    Raises
    ------
    BadInput
        When there are two prompts, none, an unreadable one or an empty one.
    """
    if prompt is not None and prompt_file is not None:
        raise BadInput(f"give PROMPT or --prompt-file, not both; got {str(prompt_file)!r} as well")
    try:
        if prompt_file is not None:
            text = prompt_file.read_text(encoding="utf-8")
        elif prompt in (None, "-"):
            if prompt is None and sys.stdin.isatty():
                raise BadInput("no prompt: give PROMPT, --prompt-file, or pipe one in")
            text = sys.stdin.read()
        else:
            text = str(prompt)
    except OSError as error:
        raise BadInput(f"cannot read prompt file {str(prompt_file)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"prompt {str(prompt_file or '-')!r} is not UTF-8 text: {error}") from error
    if not text.strip():
        raise BadInput(f"the prompt must not be empty, got {text!r}")
    return text


def encode(tokenizer: Any, text: str, system: str | None, *, use_template: bool) -> Tensor:
    """Token ids of the prompt.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        Of the model.
    text : str
        The prompt.
    system : str or None
        System message, for chat templates only.
    use_template : bool
        Use the chat template if there is one.

    Returns
    -------
    Tensor
        [1, tokens] int64.

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
    """Tokens that may be written within the model's positions.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        Of the model.
    prompt_tokens, max_new_tokens : int
        What there is and what was asked for.

    Returns
    -------
    int
        At most ``max_new_tokens``.

    Raises
    ------
    BadInput
        When the prompt alone is too long.
    """
    from deltadecode.architecture import longest_prompt

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


def _check_full(full: bool, given: dict[str, Any]) -> None:
    clash = [name for name, value in given.items() if value is not None]
    if full and clash:
        raise BadInput(f"--full takes no DELTA options, got --{clash[0].replace('_', '-')}")


def _print(text: str) -> None:
    print(text, end="", flush=True)


@contextmanager
def _line_end(show: bool) -> Iterator[None]:
    # Also when interrupted: the next thing on a terminal starts on its own line.
    try:
        yield
    finally:
        if show:
            print(flush=True)
