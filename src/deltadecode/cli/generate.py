"""``deltadecode generate``: any model's own ``generate``, with DELTA."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltadecode.architecture import own_attention
from deltadecode.cli import loading, options
from deltadecode.cli.output import BadInput, note, print_json, progress_bar, quiet_libraries
from deltadecode.cli.prompts import encode, fit, read_prompt
from deltadecode.cli.report import FULL_ATTENTION, OWN_ATTENTION, compared, remarks, summary
from deltadecode.config import DeltaConfig

if TYPE_CHECKING:
    from torch import Tensor

    from deltadecode.cli.decoding import Decoded


def generate(
    model: options.AnyModel,
    prompt: options.PromptArgument = None,
    prompt_file: options.PromptFile = None,
    system: options.System = None,
    no_chat_template: options.NoChatTemplate = False,
    max_new_tokens: options.NewTokens = 1024,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    seed: options.SamplingSeed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    plan: options.PlanFile = None,
    page_size: options.PageSize = None,
    budget_pages: options.BudgetPages = None,
    budget_share: options.BudgetShare = None,
    recent_pages: options.RecentPages = None,
    sink_pages: options.SinkPages = None,
    dense_layers: options.DenseLayers = None,
    delta_layers: options.DeltaLayers = None,
    full: options.Full = False,
    lossless: options.Lossless = False,
    draft_tokens: options.DraftTokens = None,
    kv_dtype: options.KvDtype = None,
    compare: options.Compare = False,
    as_json: options.AsJson = False,
) -> None:
    """Generate text with a Transformers model and DELTA; the text comes to stdout as it is written.

    Without DELTA options the model gets its calibrated profile, or the default plan for its depth
    ('deltadecode info MODEL' shows it). A model with attention of its own (CLSA) runs without
    DELTA. The chat template is used when the tokenizer has one.
    """
    fields = options.plan_fields(
        page_size, budget_pages, recent_pages, sink_pages, dense_layers, delta_layers, budget_share
    )
    mode = {"lossless": lossless or None, "draft_tokens": draft_tokens, "kv_dtype": kv_dtype}
    of_delta = {"plan": plan, "compare": compare or None, **mode, **fields}
    if full:
        _check_without(of_delta, "--full")
    if draft_tokens is not None and not lossless:
        raise BadInput("--draft-tokens needs --lossless")
    if kv_dtype is not None and lossless:
        raise BadInput("--kv-dtype rounds keys and values, and cannot be combined with --lossless")
    if not 0.0 < top_p <= 1.0:
        raise BadInput(f"--top-p must be in (0, 1], got {top_p}")
    if not math.isfinite(temperature):
        raise BadInput(f"--temperature must be a finite number, got {temperature}")
    folder = loading.resolve_model(model)
    text = read_prompt(prompt, prompt_file)

    quiet_libraries()
    place = loading.find_device(device)
    config = loading.load_config(folder)
    own = own_attention(config) is not None
    if own:
        _check_without({"full": full or None, **of_delta}, "a model with attention of its own")
    cfg = None if full or own else loading.make_plan(config, plan, fields)
    tokenizer = loading.load_tokenizer(folder)
    prompt_ids = encode(tokenizer, text, system, use_template=not no_chat_template)
    new_tokens = fit(config, prompt_ids.shape[1], max_new_tokens)
    settings: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        settings |= {"temperature": temperature, "top_p": top_p}

    loaded = loading.load_model(folder, dtype, place)
    job = Job(
        loaded, tokenizer, prompt_ids.to(place), settings, seed, lossless, draft_tokens,
        OWN_ATTENTION if own else FULL_ATTENTION, kv_dtype,
    )  # fmt: skip
    if new_tokens < max_new_tokens:
        note(f"writing at most {new_tokens} tokens: the model has no more positions")
    first = job.run(cfg, show=not as_json)
    second = job.run(None, show=False) if compare else None
    if as_json:
        result = summary(model, prompt_ids.shape[1], cfg, first)
        if own:
            result["attention"] = "own"
        print_json(result if second is None else {**result, "compare": compared(first, second)})
        return
    for remark in remarks(first, second, delta=cfg is not None, stock=job.stock):
        note(remark)


@dataclass(frozen=True)
class Job:
    """A model, a prompt and settings, to run with DELTA and without."""

    model: Any
    tokenizer: Any
    prompt_ids: Tensor
    settings: dict[str, Any]
    seed: int
    lossless: bool = False
    draft_tokens: int | None = None
    stock: str = FULL_ATTENTION
    kv_dtype: str | None = None

    def run(self, cfg: DeltaConfig | None, *, show: bool) -> Decoded:
        """Decode once, None: with full attention; the text to stdout, or a bar to stderr."""
        from deltadecode.cli.decoding import decode

        name = self.stock if cfg is None else "DELTA"
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
                lossless=self.lossless and cfg is not None,
                draft_tokens=self.draft_tokens,
                kv_dtype=self.kv_dtype,
                on_token=on_token,
                on_text=_print if show else lambda text: None,
            )


def _check_without(options: dict[str, Any], what: str) -> None:
    clash = [name for name, value in options.items() if value is not None]
    if clash:
        raise BadInput(f"{what} takes no DELTA options, got --{clash[0].replace('_', '-')}")


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
