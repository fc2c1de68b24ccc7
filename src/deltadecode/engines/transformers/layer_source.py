"""How a class of layers calls the attention interface of Transformers, read from its source."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from dataclasses import dataclass
from typing import Any

import transformers.cache_utils
from transformers.cache_utils import Cache
from transformers.modeling_utils import PreTrainedModel

# Parameters by which a layer takes the states of another sequence.
_CROSS = ("key_value_states", "cross_attention_states", "encoder_hidden_states")
# Methods that leave the values of a mask alone.
_VIEWS = frozenset(["get", "to", "expand", "unsqueeze", "contiguous", "bool"])
_LOOPS = (ast.For, ast.While, ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)


@dataclass(frozen=True)
class InterfaceUse:
    """How the ``forward`` of one class calls the attention interface.

    ``calls`` is the largest number of calls on any way through it; one in a loop counts twice.
    ``never_causal``: every call passes ``is_causal=False``. ``crosses`` is the parameter that takes
    the states of another sequence. ``own_mask``: the layer computes the mask that it passes.
    ``asks_name``: it compares the name of the implementation with ``sdpa``.
    """

    calls: int
    keywords: frozenset[str]
    never_causal: bool
    crosses: str | None
    own_mask: bool
    asks_name: bool


@functools.cache
def interface_use(kind: Any, absent: frozenset[str] = frozenset()) -> InterfaceUse | None:
    """Read a class of modules; None where its source cannot be read.

    ``absent`` names attributes that are None; what a layer does only with these is left out.
    """
    try:
        return _Reader(kind, absent).use()
    except (OSError, TypeError, SyntaxError):
        return None


@functools.cache
def own_cache(kind: Any) -> str | None:
    """Name of a cache class of the model's own, if its ``forward`` tests for one."""
    if not issubclass(kind, PreTrainedModel):
        return None
    try:
        forward = _Reader(kind).method("forward")
    except (OSError, TypeError, SyntaxError):
        return None
    for node in ast.walk(forward):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
            subject, name = map(ast.unparse, node.args)
            cache = getattr(sys.modules.get(kind.__module__), name, None)
            stock = cache is getattr(transformers.cache_utils, name, None)
            own = isinstance(cache, type) and issubclass(cache, Cache) and not stock
            if subject == "past_key_values" and own:
                return name
    return None


class _Prune(ast.NodeTransformer):
    """Takes out what an ``if self.x is not None`` guards, where x is absent."""

    def __init__(self, absent: frozenset[str]) -> None:
        self.tests = {f"self.{name} is not None" for name in absent}

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        if ast.unparse(node.test) not in self.tests:
            return node
        return node.orelse or ast.Pass()


class _Reader:
    """``forward`` of one class and the methods that it calls, as syntax trees."""

    def __init__(self, kind: Any, absent: frozenset[str] = frozenset()) -> None:
        self.kind = kind
        self.prune = _Prune(absent)
        self.most: dict[str, int] = {}  # most calls of the interface on any way through a method
        self.calls: dict[ast.Call, ast.FunctionDef] = {}
        self.asks_name = False

    def method(self, name: str) -> ast.FunctionDef:
        source = inspect.getsource(inspect.unwrap(inspect.getattr_static(self.kind, name)))
        tree = ast.parse(textwrap.dedent(source)).body[0]
        if not isinstance(tree, ast.FunctionDef):
            raise TypeError(f"{name} of {self.kind.__name__} is no method")
        self.prune.visit(tree)
        return tree

    def use(self) -> InterfaceUse:
        forward = self.method("forward").args
        parameters = {argument.arg for argument in [*forward.args, *forward.kwonlyargs]}
        most = self._most_calls("forward")
        causal = [_keyword(call, "is_causal") for call in self.calls]
        return InterfaceUse(
            calls=most,
            keywords=frozenset(
                keyword.arg
                for call, tree in self.calls.items()
                for keyword in call.keywords
                if keyword.arg is not None and not _is_none(keyword.value, tree)
            ),
            never_causal=bool(causal) and all(_is_false(value) for value in causal),
            crosses=next((name for name in _CROSS if name in parameters), None),
            own_mask=any(_computes_mask(call, tree) for call, tree in self.calls.items()),
            asks_name=self.asks_name,
        )

    def _most_calls(self, name: str) -> int:
        if name not in self.most:
            self.most[name] = 0  # where it calls itself
            tree = self.method(name)
            self.asks_name |= any(_asks_name(node) for node in ast.walk(tree))
            self.most[name] = self._count(tree.body, tree)
        return self.most[name]

    def _count(self, node: Any, tree: ast.FunctionDef) -> int:
        """Most calls on any way through a node of a method, or through a list of nodes."""
        calls = 0
        if isinstance(node, list):
            for place, part in enumerate(node):
                if isinstance(part, ast.If) and isinstance(part.body[-1], (ast.Return, ast.Raise)):
                    rest = [*part.orelse, *node[place + 1 :]]
                    ways = self._count(part.body, tree), self._count(rest, tree)
                    return calls + self._count(part.test, tree) + max(ways)
                calls += self._count(part, tree)
        elif isinstance(node, (ast.If, ast.IfExp)):
            ways = self._count(node.body, tree), self._count(node.orelse, tree)
            calls = self._count(node.test, tree) + max(ways)
        elif isinstance(node, ast.AST):
            calls = sum(self._count(part, tree) for _, part in ast.iter_fields(node))
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called in _interface_names(tree):
                self.calls[node] = tree  # type: ignore[index]
                calls += 1
            elif called.startswith("self.") and inspect.isfunction(
                inspect.getattr_static(self.kind, called[5:], None)
            ):
                calls += self._most_calls(called[5:])
            calls *= 2 if isinstance(node, _LOOPS) else 1
        return calls


@functools.cache
def _interface_names(tree: ast.FunctionDef) -> frozenset[str]:
    """Names that a method gives to the function it takes from the interface."""
    names = {"attention_interface"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and "ALL_ATTENTION_FUNCTIONS" in ast.unparse(node.value):
            names.update(map(ast.unparse, node.targets))
    return frozenset(names)


def _keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((keyword.value for keyword in call.keywords if keyword.arg == name), None)


def _given(name: ast.expr, tree: ast.FunctionDef) -> list[ast.AST]:
    """What a method assigns to a name."""
    values: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if ast.unparse(name) in map(ast.unparse, targets):
                values.append(node.value if isinstance(node, ast.Assign) else node)
    return values


def _is_none(value: ast.expr, tree: ast.FunctionDef) -> bool:
    """Whether a value is None, or a name to which nothing else is assigned."""
    values = _given(value, tree) or [value]
    return all(isinstance(other, ast.Constant) and other.value is None for other in values)


def _is_false(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


def _asks_name(node: ast.AST) -> bool:
    test = ast.unparse(node) if isinstance(node, ast.Compare) else ""
    return "_attn_implementation" in test and "'sdpa'" in test


def _computes_mask(call: ast.Call, tree: ast.FunctionDef) -> bool:
    """Whether a call's mask has other values than a parameter of its method, or a part of one."""
    mask = call.args[4] if len(call.args) > 4 else _keyword(call, "attention_mask")
    if mask is None:
        return False
    return not all(map(_is_view, [mask, *_given(mask, tree)]))


def _is_view(value: ast.AST) -> bool:
    if isinstance(value, ast.Subscript):
        return _is_view(value.value)
    if isinstance(value, ast.IfExp):
        return _is_view(value.body) and _is_view(value.orelse)
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
        return value.func.attr in _VIEWS and _is_view(value.func.value)
    return isinstance(value, (ast.Name, ast.Attribute, ast.Constant))
