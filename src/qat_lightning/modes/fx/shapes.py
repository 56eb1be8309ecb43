"""A tracer that runs along with the example, so that shapes, dtypes and devices are plain values.

The number of samples is never fixed: such a size stays a value of the graph, and so does everything computed from it. A
decision that depends on it raises an error, unless the result is the same for any number of samples, or for any but
one: then the network is tried with one. Other sizes are values of the graph as well if nothing is decided by them;
otherwise they are fixed to those of the example.
"""

from __future__ import annotations

import operator
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Proxy
from torch.fx.proxy import TraceError as FxTraceError

from qat_lightning.graph.assignment import assigned
from qat_lightning.graph.example import Example
from qat_lightning.graph.structures import given_fields, is_namedtuple, is_record, make_mapping
from qat_lightning.modes.fx.assignments import Assignments
from qat_lightning.modes.fx.examples import LARGER, MORE, NUMBERS, ONE, CallFails, Calls, Plan
from qat_lightning.modes.fx.known import Known, KnownKind, KnownNumber, KnownTensor, Sizes
from qat_lightning.modes.fx.patches import answering
from qat_lightning.modes.fx.tracer import CallAsWhole, NetworkTracer, holds_no_layer

CONSTANT = "_example_constant"
"""Prefix of the names of tensors that a forward computes without its inputs."""


class SizesDecide(BaseException):
    """A decision depends on a size other than the number of samples, or on a number among the inputs.

    Not an `Exception`, which a ``forward`` might catch.

    Args:
        call: `LARGER` or `NUMBERS`.
    """

    def __init__(self, call: str) -> None:
        super().__init__(call)
        self.call = call


class ShapesTracer(NetworkTracer):
    """Traces a network along with an example.

    Args:
        leaves: Paths of modules to call as a whole.
        example: One call.
        plan: The calls to follow.
        buffers: See `NetworkTracer`.

    Attributes:
        fixed: Whether a size of the inputs other than the number of samples may be a constant of the graph.
    """

    def __init__(self, leaves: list[str], example: Example, plan: Plan, *, buffers: bool = True) -> None:
        super().__init__(leaves, buffers=buffers)
        self.example = example
        self.fixed = False
        self._calls = Calls(example, plan)
        self._values: dict[fx.Node, tuple[Any, ...]] = {}
        self._sized: dict[fx.Node, set[str]] = {}
        self._whole: dict[int, tuple[Any, fx.Node]] = {}
        self._assignments = Assignments()

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """See `NetworkTracer.trace`."""
        with answering(self, root):
            graph = super().trace(root, concrete_args)
        self._assignments.check(graph)
        return graph

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: dict[str, Any] | tuple[Any, ...] | None = None
    ) -> tuple[Any, list[Any]]:
        """A placeholder for each input of the example, and a function that calls ``root_fn`` like the example."""
        parameters = signature(self.root.forward).parameters
        by_position = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        rest = next((p.name for p in parameters.values() if p.kind is p.VAR_POSITIONAL), "")
        args, kwargs = self.example.args, self.example.kwargs
        names = [*by_position, *(f"{rest}{number}" for number in range(len(args)))][: len(args)]
        given: dict[Any, Any] = {}
        order = list(parameters)
        for key in (*range(len(args)), *sorted(kwargs, key=lambda name: order.index(name) if name in order else 999)):
            name = names[key] if isinstance(key, int) else key
            default = parameters[name].default if name in parameters else Parameter.empty
            # A parameter without a default must not follow one with a default.
            late = any(node.args for node in self.graph.find_nodes(op="placeholder"))
            has = (default,) if default is not Parameter.empty else (None,) if late else ()
            proxy = super().create_proxy("placeholder", name, has, {})
            values = [(call.args if isinstance(key, int) else call.kwargs)[key] for call in self._calls.inputs]
            given[key] = self._wrap(proxy.node, tuple(values), proxy)

        def call() -> Any:
            by_keyword = {name: value for name, value in given.items() if isinstance(name, str)}
            return root_fn(self.root, *(given[number] for number in range(len(args))), **by_keyword)

        return call, []

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Proxy]) -> Any:
        """The network's plain attribute while something is only tried."""
        return attr_val if self._calls.running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `NetworkTracer.call_module`."""
        if self._calls.running:
            return forward(*args, **kwargs)
        try:
            return super().call_module(m, forward, args, kwargs)
        except SizesDecide:
            if holds_no_layer(m) and not self.is_of_no_network(m):
                raise CallAsWhole(self.path_of_module(m)) from None
            raise

    def create_arg(self, a: Any) -> Any:
        """The representation of ``a`` in the graph; for a tuple that a node returned, that node."""
        if isinstance(a, tuple):
            whole, node = self._whole.get(id(a), (None, None))
            if whole is a and node is not None:
                return node
            if isinstance(a, Sizes) or (type(a) is not tuple and not is_namedtuple(type(a))):
                a = tuple(a)
        a = self.as_constant(a)
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and a not in self.tensor_attrs:
            # Evaluation reuses the constants of training.
            name = next((name for kept, name in self.tensor_attrs.items() if _equal(kept, a)), None)
            if name is not None:
                self.tensor_attrs[a] = name
        return super().create_arg(a)

    def get_fresh_qualname(self, prefix: str) -> str:
        """A name for a constant that shows its origin."""
        return super().get_fresh_qualname(CONSTANT if prefix == "_tensor_constant" else prefix)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Create a node; for a tensor of the network its metadata is known."""
        node = super().create_node(kind, target, *args, **kwargs)
        if kind == "get_attr" and (values := self._calls.known(self.root, str(target))) is not None:
            self._values[node] = values
        return node

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any | None = None,
        proxy_factory_fn: Any = None,
    ) -> Any:
        """The result of a node: its plain value if known, containers of such, otherwise a proxy."""
        if kind == "call_method" and (function := _operator(str(target))) is not None:
            kind, target, args = "call_function", function, args if hasattr(operator, str(target)) else args[::-1]
        proxy = super().create_proxy(kind, target, args, kwargs, name, type_expr, proxy_factory_fn)
        if not isinstance(proxy, Proxy) or isinstance(proxy, Known):
            return proxy  # of a function that was traced through
        node = proxy.node
        if kind in ("placeholder", "output"):
            return proxy
        values = self._values.get(node) or self._calls.run(node, self._values, self.root)
        return proxy if values is None else self._wrap(node, values, proxy)

    def assign(self, tensor: KnownTensor, index: Any, value: Any) -> None:
        """Let ``tensor`` from now on be a copy of itself with ``value`` at ``index``."""
        made = self.create_proxy("call_function", assigned, (tensor, index, value), {})
        if not isinstance(made, KnownTensor):
            raise FxTraceError("an assignment by values")
        self._assignments.note(tensor.node, made.node, self._values)
        tensor.node, tensor.values = made.node, made.values

    def decide(self, number: KnownNumber) -> Any:
        """The value of a number that a decision depends on.

        Raises:
            SizesDecide: It depends on another size of the inputs, or is one of them.
            CallFails: It differs for a single sample only. torch.fx.proxy.TraceError: It depends on the number of
                samples.
        """
        self._refuse_free(number.node)
        first = number.values[0]
        others = [name for name, value in zip(self._calls.names, number.values, strict=True) if value != first]
        if others == [ONE] and MORE in self._calls.names:
            raise CallFails(ONE)  # use the decision for two and more samples, and try it with one
        if others:
            raise FxTraceError("this decision depends on the batch size, which is not fixed")
        return first

    def _wrap(self, node: fx.Node, values: tuple[Any, ...], proxy: Proxy) -> Any:
        self._values[node] = values
        self._note_sizes(node, values)
        first = values[0]
        if isinstance(first, Tensor):
            self._alike(values, lambda value: value.ndim)
            return KnownTensor(node, self, values)
        if isinstance(first, (tuple, list, dict)) or is_record(type(first)):
            return self._wrap_container(node, values)
        if isinstance(first, (torch.dtype, torch.device)):
            return KnownKind(node, self, values)
        if first is None or isinstance(first, (bool, int, float, str, complex, torch.layout, torch.memory_format)):
            return self._wrap_plain(node, values)
        del self._values[node]
        return proxy

    def _note_sizes(self, node: fx.Node, values: tuple[Any, ...]) -> None:
        """Record numbers that depend on sizes other than the number of samples, or on numbers among the inputs."""
        if not isinstance(values[0], (bool, int, float)):
            return
        found = {call for source in node.all_input_nodes for call in self._sized.get(source, ())}
        calls = zip(self._calls.names, values, strict=True)
        found |= {call for call, value in calls if call in (LARGER, NUMBERS) and value != values[0]}
        if found:
            self._sized[node] = found

    def _refuse_free(self, node: fx.Node) -> None:
        if node in self._sized:
            raise SizesDecide(max(self._sized[node]))

    def _wrap_plain(self, node: fx.Node, values: tuple[Any, ...]) -> Any:
        first = values[0]
        same = all(type(value) is type(first) and value == first for value in values)
        computed = any(
            isinstance(self._values.get(source, (None,))[0], (bool, int, float))
            for source in node.args
            if isinstance(source, fx.Node)
        )
        if isinstance(first, bool):
            self._refuse_free(node)
        if not same or (computed and not isinstance(first, bool)) or node in self._sized:
            return KnownNumber(node, self, values)
        if node.op in ("call_function", "call_method") and not node.users:
            self.fixed = self.fixed or _is_size(node, first)
            self.graph.erase_node(node)
        return first

    def _wrap_container(self, node: fx.Node, values: tuple[Any, ...]) -> Any:
        first = values[0]
        if isinstance(first, torch.Size):
            self._alike(values, len)
            if node.op == "placeholder" or node.all_input_nodes[0].op != "get_attr":
                self.fixed = True
            return self._whole_of(node, Sizes(self._sizes(node, values)))
        if is_record(type(first)):
            made = {name: self._part(node, getattr, name) for name in given_fields(first)}
            return type(first)(**made)
        if isinstance(first, dict):
            self._alike(values, lambda value: list(value))
            items = [(key, self._part(node, operator.getitem, key)) for key in first]
            return dict(items) if type(first) is dict else make_mapping(type(first), items)
        self._alike(values, len)
        parts = [self._part(node, operator.getitem, position) for position in range(len(first))]
        if isinstance(first, list):
            return parts
        return self._whole_of(node, type(first)(*parts) if is_namedtuple(type(first)) else type(first)(parts))

    def _sizes(self, node: fx.Node, values: tuple[Any, ...]) -> list[Any]:
        return [
            sizes[0] if len(set(sizes)) == 1 else self._part(node, operator.getitem, dim)
            for dim, sizes in enumerate(zip(*values, strict=True))
        ]

    def _part(self, node: fx.Node, look: Any, key: Any) -> Any:
        return self.create_proxy("call_function", look, (Proxy(node, self), key), {})

    def _whole_of(self, node: fx.Node, made: Any) -> Any:
        self._whole[id(made)] = made, node
        return made

    def _alike(self, values: tuple[Any, ...], of: Any) -> None:
        """Give up a call in which a value has another type than in the example."""
        for name, value in zip(self._calls.names, values, strict=True):
            if type(value) is not type(values[0]) or of(value) != of(values[0]):
                raise CallFails(name)


def _operator(name: str) -> Any:
    """The function of an operator that is called as a method of a tensor outside of the graph."""
    if not (name.startswith("__") and name.endswith("__")):
        return None
    return getattr(operator, name, None) or getattr(operator, name.replace("__r", "__", 1), None)


def _is_size(node: fx.Node, value: Any) -> bool:
    return isinstance(value, int) and node.target in ("size", "numel", "nelement", "stride")


def _equal(kept: Any, constant: Tensor) -> bool:
    alike = isinstance(kept, Tensor) and (kept.shape, kept.dtype) == (constant.shape, constant.dtype)
    return alike and torch.equal(kept, constant)
