"""The three methods of one model's ``generate`` that DELTA replaces on that model alone."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any, ClassVar

from torch import Tensor
from transformers.cache_utils import StaticCache
from transformers.modeling_utils import PreTrainedModel

from deltadecode.engines.transformers.cache import DeltaCache
from deltadecode.engines.transformers.checks import check_generate
from deltadecode.engines.transformers.state import ModelState
from deltadecode.engines.transformers.static_cache import DeltaStaticCache, replace_static

FindState = Callable[[PreTrainedModel], "ModelState | None"]


class Override:
    """Stands in for one method of one model, and passes on to the method of its class.

    It holds the model weakly, so that a model is freed as promptly as without it, and goes along
    when the model is copied or pickled.

    Parameters
    ----------
    model : PreTrainedModel
        The model.
    find_state : callable
        Gives the model's state, or None while its attention implementation is another one.
    """

    method: ClassVar[str]

    def __init__(self, model: PreTrainedModel, find_state: FindState) -> None:
        self._model = weakref.ref(model)
        self._find_state = find_state
        self.__doc__ = getattr(type(model), self.method).__doc__

    @property
    def model(self) -> PreTrainedModel:
        """The model whose method this is."""
        model = self._model()
        assert model is not None
        return model

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(MethodType(getattr(type(self.model), self.method), self.model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method."""
        state = self._find_state(self.model)
        return self.stock(*args, **kwargs) if state is None else self.run(state, *args, **kwargs)

    def stock(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method that the model's class defines."""
        return getattr(type(self.model), self.method)(self.model, *args, **kwargs)

    def run(self, state: ModelState, *args: Any, **kwargs: Any) -> Any:
        """Do what DELTA does in its place; given the model's state."""
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> Override:
        """The same for the copy of the model, which is being made."""
        return type(self)(memo.get(id(self.model), self.model), self._find_state)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle with the model itself."""
        return type(self), (self.model, self._find_state)


class Generate(Override):
    """``generate``: refuse what cannot work before anything has run."""

    method = "generate"

    def run(self, state: ModelState, *args: Any, **kwargs: Any) -> Any:
        """Check all arguments, then generate."""
        method = getattr(type(self.model), self.method)
        given = arguments_of(method, (self.model, *args), kwargs)
        check_generate(self.model, state, given)
        return self.stock(*args, **kwargs)


class PrepareCache(Override):
    """``_prepare_cache_for_generation``: a cache that appends in place, or a static one of ours."""

    method = "_prepare_cache_for_generation"

    def run(
        self,
        state: ModelState,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Let the class make a cache, and put one of ours in its place."""
        given = model_kwargs.get("past_key_values")
        result = self.stock(generation_config, model_kwargs, *args, **kwargs)
        made = model_kwargs.get("past_key_values")
        if given is None and made is not None:
            config = self.model.config
            cache: DeltaCache | DeltaStaticCache
            if isinstance(made, StaticCache):
                cache = replace_static(made, config, state.cfg.page_size)
                # With buffers already made, chunks of the prompt run compiled: the last moment.
                for number, layer in enumerate(cache.layers):
                    keys = getattr(layer, "keys", None)
                    if keys is not None:
                        state.prepare_counts(number, keys.device)
            else:
                cache = DeltaCache(config)
            model_kwargs["past_key_values"] = cache
            if generation_config.is_assistant:
                cache.activate_past_recording()
        return result


class Prefill(Override):
    """``_prefill``: the last chunk of a prompt is prefill too, even one of a single token (R1)."""

    method = "_prefill"

    def run(
        self,
        state: ModelState,
        input_ids: Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Mark the forward passes as prefill, unless only one token is new.

        One token behind a cache goes on where decoding stopped, and must give what it would have
        given then.
        """
        cache = model_kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        mask = model_kwargs.get("attention_mask")
        seen = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
        # As the class does it: a prompt as long as its mask includes what the cache holds.
        new = input_ids.shape[1] - (past if seen == input_ids.shape[1] else 0)
        state.progress.prefilling = state.static.prefilling = new != 1
        try:
            return self.stock(input_ids, generation_config, model_kwargs, *args, **kwargs)
        finally:
            state.progress.prefilling = state.static.prefilling = False


OVERRIDES: tuple[type[Override], ...] = (Generate, PrepareCache, Prefill)


def arguments_of(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of a call by name, those in ``**kwargs`` included.

    Parameters
    ----------
    function : callable
        What is called.
    args, kwargs
        The arguments.

    Returns
    -------
    dict
        Only what was given.
    """
    signature = inspect.signature(function)
    named = dict(signature.bind_partial(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named.update(named.pop(parameter.name, {}))
    return named
