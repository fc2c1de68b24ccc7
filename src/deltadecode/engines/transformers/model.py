"""Turning DELTA on and off for one model: ``enable``, ``disable``, ``stats``."""

from __future__ import annotations

from transformers.modeling_utils import PreTrainedModel

from deltadecode.config import DeltaConfig
from deltadecode.engines.transformers.bind import (
    bind,
    detach,
    find_decoder,
    find_hook,
    find_state,
    is_shared,
    set_implementation,
    unwrap,
)
from deltadecode.engines.transformers.cache import check_unshared
from deltadecode.engines.transformers.checks import check_attentions
from deltadecode.engines.transformers.lossless import (
    check_croppable,
    check_draft_tokens,
    check_flag,
)
from deltadecode.engines.transformers.packing import check_kv_dtype
from deltadecode.engines.transformers.stats import DecodeStats
from deltadecode.errors import ArgumentError, ArgumentTypeError


def enable(
    model: PreTrainedModel,
    cfg: DeltaConfig | None = None,
    *,
    lossless: bool = False,
    draft_tokens: int | None = None,
    kv_dtype: str | None = None,
    layer_graphs: bool = False,
) -> None:
    """Decode with DELTA from now on (arXiv 2510.09883; docs/semantics.md).

    The model's own ``generate`` and ``forward`` then attend to selected pages in sparse layers at
    every decode step. Weights are not touched. Enabling again takes the new configuration and
    starts new counts.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder-only model of Transformers, already loaded; PEFT and ``torch.compile`` wrappers
        are looked through.
    cfg : DeltaConfig, optional
        Plan and budget; by default :meth:`DeltaConfig.for_model`.
    lossless : bool
        Let sparse steps only draft, and full attention verify: ``generate`` then gives what full
        attention gives (R12 to R14). Every planned layer selects for itself, whatever its role.
    draft_tokens : int, optional
        Drafts before a verification, 1 to 16, with ``lossless`` only. By default up to 8: as many
        as acceptance makes worth it, and in greedy decoding none where they take longer.
    kv_dtype : str, optional
        ``"int8"`` or ``"fp8"``: in the caches that ``generate`` and ``forward`` make, store keys
        and values in eight bits (docs/memory.md says what that loses). Not with ``lossless``.
    layer_graphs : bool
        On a GPU, run each decoder layer as two CUDA graphs, before and behind its cache and its
        attention, at decode steps from a :class:`DeltaCache` or a :class:`DeltaOffloadedCache`. It
        does nothing while the model is on the CPU or on several devices. Not with ``lossless``.

    Raises
    ------
    UnsupportedModelError
        When the model has nothing that could be planned, or ``lossless`` and a cache that cannot
        take drafts back, naming its class.
    DeltaConfigError
        When the plan does not fit the model; the model is then unchanged.
    ArgumentError
        For another type, a number of drafts out of range, eight bits or layer graphs in lossless
        mode, or when the model is set to return attention weights.
    """
    inner = unwrap(model)
    drafts = check_draft_tokens(lossless, draft_tokens)
    if cfg is not None and not isinstance(cfg, DeltaConfig):
        raise ArgumentTypeError(f"cfg must be a DeltaConfig, got {type(cfg).__name__}")
    check_attentions(inner.config.output_attentions)
    check_kv_dtype(kv_dtype)
    check_flag("layer_graphs", layer_graphs)
    if layer_graphs and lossless:
        raise ArgumentError(
            "layer_graphs=True is for steps that read selected pages, got lossless=True, whose "
            "passes are others"
        )
    if kv_dtype is not None:
        if lossless:
            raise ArgumentError(
                f"lossless decoding gives what full attention gives, got kv_dtype={kv_dtype!r}, "
                "which rounds keys and values"
            )
        check_unshared(inner.config, "stored in eight bits")
    if drafts:
        check_croppable(find_decoder(inner).model)
    bind(inner, cfg, drafts, draft_tokens is not None, kv_dtype, layer_graphs)


def disable(model: PreTrainedModel) -> None:
    """Decode as before: restore the attention implementation, take all hooks away.

    A model that was loaded with ``attn_implementation="delta"`` gets the implementation that
    Transformers takes by default. Does nothing when DELTA is not enabled. While another model
    decodes with DELTA by the same configuration object, this one attends to everything with
    DELTA's function.
    """
    inner = unwrap(model, decodes=False)
    hook = find_hook(inner)
    if hook is None:
        return
    detach(inner)
    if not is_shared(hook.state):
        set_implementation(inner, hook.state.previous if hook.state is not None else None)


def stats(model: PreTrainedModel) -> DecodeStats:
    """What decoding has read since the model was enabled, over all calls of ``generate``.

    Parameters
    ----------
    model : PreTrainedModel
        A model that is enabled, or was loaded with ``attn_implementation="delta"``.

    Returns
    -------
    DecodeStats
        Live counts; :meth:`DecodeStats.reset` sets them to zero.

    Raises
    ------
    ArgumentError
        When DELTA is not enabled on the model.
    """
    state = find_state(unwrap(model))
    if state is None:
        raise ArgumentError(
            f"DELTA is not enabled on this {type(model).__name__}; call deltadecode.enable(model)"
        )
    return state.stats
