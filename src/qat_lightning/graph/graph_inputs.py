"""The inputs of a traced graph: the parameters of ``forward`` in order, also those that the trace fixed to one value.

A graph has an input for each parameter, so that a call binds its arguments as that of ``forward`` does. One that the
trace fixed is read by no node, and its node has the value beside the default. So copies of a graph, pickles and files
have both.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from qat_lightning.graph.example import Example, describe

FIXED = "fixed"
"""Keyword argument of the node of a fixed input; torch.fx reads no keyword arguments of inputs."""

_LONG = 60

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class GraphInputs:
    """How the arguments of a call bind to the inputs of a graph.

    Attributes:
        names: All inputs, in order.
        fixed: The inputs that can have one value only, and that value.
        defaults: The inputs that a call may omit, and what they are then.
        read: The inputs that the graph reads.

    Example:
        >>> graph = fx.Graph()
        >>> _ = graph.output(graph.placeholder("x"))
        >>> give_parameters(graph, inspect.signature(lambda x, y=1: x), {})
        >>> inputs = GraphInputs.of(graph)
        >>> inputs.fixed, inputs.others((0, 1), {}), inputs.others((0,), {"y": 2})
        ({'y': 1}, [], ['y'])
    """

    names: tuple[str, ...]
    fixed: dict[str, Any]
    defaults: dict[str, Any]
    read: tuple[str, ...]

    @classmethod
    def of(cls, graph: fx.Graph) -> GraphInputs:
        """The inputs of a graph; in a file of an earlier version, those that were fixed are missing."""
        nodes = {str(node.target): node for node in graph.find_nodes(op="placeholder")}
        return cls(
            tuple(nodes),
            {name: node.kwargs[FIXED] for name, node in nodes.items() if FIXED in node.kwargs},
            {name: node.args[0] for name, node in nodes.items() if node.args},
            tuple(name for name, node in nodes.items() if node.users),
        )

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call, by name."""
        return dict(zip(self.names, args, strict=False)) | kwargs

    def others(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        """The fixed inputs that have another value in a call."""
        given = self.defaults | self.named(args, kwargs)
        return [name for name, value in self.fixed.items() if name in given and not _is(given[name], value)]

    def omitted(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The inputs that are not fixed and that a call omits, with their defaults."""
        given = self.named(args, kwargs).keys() | self.fixed.keys()
        return {name: value for name, value in self.defaults.items() if name not in given}

    def refusal(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """The error message for a call with other inputs than those of the trace; empty if it has these."""
        others = self.others(args, kwargs)
        as_fixed = self.fixed.keys() - others
        given = self.named(args, kwargs)
        called_with = [name for name, value in given.items() if value is not None and name not in as_fixed]
        traced = [name for name in self.names if name not in self.fixed]
        missing = [name for name in self.read if name not in called_with]
        unknown = [name for name in called_with if name not in self.names]
        if len(args) <= len(self.names) and not (missing or unknown or others):
            return ""
        traced += [f"{name}={self.fixed[name]!r}" for name in others if self.fixed[name] is not ...]
        called = [f"{name}={_brief(given[name])}" if name in others else name for name in called_with]
        return (
            f"The network was traced with the inputs {', '.join(traced)}, and is called with "
            f"{', '.join(called) or 'none'}{_list(' and without ', missing)}"
            f"{_list('; the trace fixes the value of ', others)}{_list('; the trace has no input ', unknown)}. Call it "
            "with the inputs of the trace in every step, give example_inputs= with these inputs, or use mode='eager', "
            "which needs no graph."
        )


def fixed_parameters(signature: inspect.Signature, example: Example) -> dict[str, Any]:
    """The parameters that a trace fixes, with their values: those that are None, and plain defaults of omitted ones.

    Example:
        >>> fixed_parameters(inspect.signature(lambda x, mask=None, *, scale=2.0: x), Example((0, None)))
        {'mask': None, 'scale': 2.0}
    """
    parameters = signature.parameters.values()
    by_position = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    given = dict(zip(by_position, example.args, strict=False)) | example.kwargs
    values = {p.name: given.get(p.name, p.default) for p in parameters if p.kind not in _VARIADIC}
    return {
        name: value
        for name, value in values.items()
        # Others, such as a tuple of sizes, are traced as they are.
        if value is None or (name not in given and isinstance(value, (bool, int, float, str)))
    }


def drop_checks(graph: fx.Graph, signature: inspect.Signature, fixed: dict[str, Any]) -> None:
    """Remove the checks that torch.fx adds for fixed parameters, and rename their inputs, whose names it changes.

    Args:
        graph: A trace of torch.fx, which has an input for each parameter.
        signature: The signature of ``forward``.
        fixed: The parameters that the trace fixed.
    """
    in_order = sorted(signature.parameters.values(), key=lambda parameter: parameter.kind in _VARIADIC)
    for parameter, node in zip(in_order, graph.find_nodes(op="placeholder"), strict=False):
        if parameter.name in fixed:
            node.target = parameter.name
            for user in list(node.users):
                _erase(user)


def give_parameters(graph: fx.Graph, signature: inspect.Signature, fixed: dict[str, Any]) -> None:
    """Give a graph an input for each parameter of ``forward``, in order.

    Args:
        graph: A trace, with inputs named like the parameters; it may lack some that the example omits.
        signature: The signature of ``forward``.
        fixed: The parameters that the trace fixed, with their values.
    """
    nodes = {str(node.target): node for node in graph.find_nodes(op="placeholder")}
    before: fx.Node | None = None
    for parameter in signature.parameters.values():
        if parameter.kind in _VARIADIC:
            continue
        name, node = parameter.name, nodes.get(parameter.name)
        if parameter.kind is parameter.KEYWORD_ONLY:  # after those that are given by position
            before = next(reversed(graph.find_nodes(op="placeholder")), None)
        if node is None:
            with graph.inserting_before() if before is None else graph.inserting_after(before):
                node = graph.placeholder(name)
            fixed = fixed | {name: parameter.default}
        if name in fixed:
            node.kwargs = {FIXED: _plain(fixed[name])}
            node.args = () if parameter.default is parameter.empty else (_plain(parameter.default),)
        before = node
    _order_defaults(graph)


def _erase(node: fx.Node) -> None:
    """Remove a node, and all that depend on it."""
    for user in list(node.users):
        _erase(user)
    node.graph.erase_node(node)


def _order_defaults(graph: fx.Graph) -> None:
    """Give inputs that follow one with a default a default too, as Python requires."""
    seen = False
    for node in graph.find_nodes(op="placeholder"):
        if seen and not node.args and not str(node.target).startswith("*"):
            node.args = (None,)
        seen = seen or bool(node.args)


def _plain(value: Any) -> Any:
    """A value that code can spell; ``...`` in place of any other, which then cannot be compared."""
    if type(value) is tuple:
        return value if all(_plain(part) is part for part in value) else ...
    return value if value is None or type(value) in (bool, int, float, str) else ...


def _is(value: Any, fixed: Any) -> bool:
    return value is fixed or (type(value) is type(fixed) and repr(value) == repr(fixed))


def _brief(value: Any) -> str:
    """A value, or its type and shape if it is long."""
    spelled = repr(value)
    return describe(value) if isinstance(value, Tensor) or len(spelled) > _LONG else spelled


def _list(start: str, names: list[str]) -> str:
    return f"{start}{' and '.join(names)}" if names else ""
