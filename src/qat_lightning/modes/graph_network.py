"""A network that runs a graph, and otherwise is an ordinary module.

Unlike `torch.fx.GraphModule` it keeps children that the graph does not call (a BatchNorm that its convolution calls),
leaves `train` and `eval` alone, and still has the attributes and methods of the original network.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat_lightning.errors import NetworkError
from qat_lightning.graph.given_sizes import GivenSizes
from qat_lightning.graph.graph_inputs import GraphInputs
from qat_lightning.graph.hooks import users_hooks
from qat_lightning.graph.inference_call import InferenceCall
from qat_lightning.graph.portable_graph import hold_graphs, release_graphs
from qat_lightning.graph.training_flags import overrides_train, set_training_flags, training_flags
from qat_lightning.layers.relu_rounding import with_relus_in_roundings
from qat_lightning.modes.prepared import PreparedState
from qat_lightning.modes.read_attributes import ReadAttributes
from qat_lightning.modes.structured_tracer import makes_container


class KeepsExtraState(nn.Module):
    """Saves and loads the extra state of a module whose ``forward`` was merged into a graph."""

    def keep_extra_state_of(self, original: nn.Module) -> None:
        """Use the ``_extra_state`` of ``original`` as the own one, if its class has one."""
        if has_extra_state(original):
            self.__dict__["_extra_state_of"] = original

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        original = self.__dict__.get("_extra_state_of")
        if original is not None:
            destination[prefix + _EXTRA_STATE] = original.get_extra_state()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        original, key = self.__dict__.get("_extra_state_of"), prefix + _EXTRA_STATE
        if original is None:
            return
        if key in state_dict:
            original.set_extra_state(state_dict[key])
            unexpected_keys[:] = [name for name in unexpected_keys if name != key]
        elif strict:
            missing_keys.append(key)


def has_extra_state(module: nn.Module) -> bool:
    """Whether a module's class defines ``get_extra_state``."""
    return type(module).get_extra_state is not nn.Module.get_extra_state


_EXTRA_STATE = "_extra_state"


OtherSizes = Callable[["GraphNetwork", tuple[Any, ...], dict[str, Any]], Callable[..., Any]]
"""Given a network and a call of it, creates the network that runs inputs of that size."""

MOST_SIZES = 64
"""How many graphs for other sizes a network keeps: those that were used last.

Multi-scale training has dozens of sizes, and a network whose sizes take turns would be traced at every call if one were
missing. A graph of a prepared network shares its layers and is small. One of an int8 network has its own weights, in a
quarter of the float network's memory, which is why there is a limit.
"""


@dataclass(frozen=True)
class _Made:
    """A graph for another size.

    Attributes:
        run: Runs it.
        constants: The names of buffers that the network has for it alone.
    """

    run: Callable[..., Any]
    constants: frozenset[str]


class GraphNetwork(KeepsExtraState):
    """The prepared form of a network in the graph modes.

    Args:
        source: A graph module; its children, parameters and buffers are taken over under their names.
    """

    _quantization: PreparedState
    sizes: GivenSizes | None = None
    """The inputs that the graph supports; None if it supports all sizes."""
    attributes: ReadAttributes | None = None
    """The attributes that the graph has as constants; None in an int8 network."""
    inference_call: InferenceCall | None = None
    """The call without the inputs of the loss; None if there are none."""
    evaluated: tuple[str, ...] = ()
    """Layers that the network's own forward puts in evaluation whenever it runs."""
    _merged: Mapping[str, nn.Module] = MappingProxyType({})
    """Modules of the float network that the graph does not call one by one."""
    _known_hooks: frozenset[int] = frozenset()
    """Keys of hooks on them that are part of the graph."""

    def __init__(self, source: fx.GraphModule) -> None:
        super().__init__()
        for name in ("_modules", "_parameters", "_buffers"):
            self.__dict__[name] = dict(source.__dict__[name])
        self._non_persistent_buffers_set = set(source._non_persistent_buffers_set)
        for name in ("_in_spec", "_out_spec"):
            if name in source.__dict__:
                self.__dict__[name] = source.__dict__[name]
        for node in source.graph.nodes:
            # Packed weights of functional layers are neither tensors nor modules.
            if node.op == "get_attr" and node.target in source.__dict__:
                self.__dict__[node.target] = source.__dict__[node.target]
        self.set_graph(source.graph)
        for module in self.modules():
            if type(module) is nn.Module:
                module.__class__ = GraphPart

    def set_graph(self, graph: fx.Graph) -> None:
        """Run another graph from now on."""
        for made in self.__dict__.get("_made_for", {}).values():
            self._drop(made)
        self.__dict__["graph"] = graph
        self.__dict__["_graph_inputs"] = GraphInputs.of(graph)
        self.__dict__["_made_for"] = {}
        self.__dict__["_warned_of_sizes"] = False
        self.__dict__["_run_at_inference"] = None
        self.__dict__["_run"] = self._compile(graph)

    def _compile(self, graph: fx.Graph, call: InferenceCall | None = None) -> Callable[..., Any]:
        """Compile the network's graph, or that of its call without the inputs of the loss."""
        return compile_graph(with_relus_in_roundings(self, graph))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph on the inputs of the original network.

        Raises:
            NetworkError: The graph does not support inputs of this size, and no graph can be made for them; or it was
                traced with other inputs than it is called with, or other values of attributes.
        """
        run = self.__dict__["_run"]
        if torch.compiler.is_compiling():  # compiled steps are only used for inputs that fit
            return run(self, *args, **kwargs)
        self._evaluate()
        self._refuse_hooks()
        self._refuse_changed_attributes()
        inputs: GraphInputs = self.__dict__["_graph_inputs"]
        if inputs.others(args, kwargs):
            raise NetworkError(self._other_inputs(args, kwargs))
        kwargs = inputs.omitted(args, kwargs) | kwargs
        call = self.inference_call
        if call is not None and call.is_made_by(args, kwargs):
            run, args, kwargs = self._run_of(call), (), call.arguments(args, kwargs)
        try:
            if self.sizes is not None:
                run = self._run_for(self.sizes, run, args, kwargs)
            return run(self, *args, **kwargs)
        except NetworkError:
            raise
        except Exception as error:
            if other := self._other_inputs(args, kwargs):
                raise NetworkError(other) from error
            raise

    def _refuse_hooks(self) -> None:
        """Raise an error for hooks that were registered after the preparation, and would not see what they should."""
        for name, module in self._merged.items():
            if any(key not in self._known_hooks for _, key in users_hooks(module)):
                raise NetworkError(
                    f"A hook was registered on {name!r}, which was merged into one graph with other layers when the "
                    "network was prepared for quantization: the hook would not be called, or would see the output of "
                    "several layers at once. Use mode='eager', which calls every module and its hooks, or return from "
                    "forward what the hook collects."
                )

    def _other_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Which inputs the network was traced with, if a call that failed has others; empty if it has these."""
        inputs: GraphInputs = self.__dict__["_graph_inputs"]
        return inputs.refusal(args, kwargs)

    def _inference_graph(self, call: InferenceCall) -> fx.Graph:
        return call.graph_from(self.graph, makes_container)

    def at_inference(self) -> GraphNetwork:
        """A network of the call without the inputs of the loss, on the same layers."""
        assert self.inference_call is not None
        network = GraphNetwork(fx.GraphModule(self, self._inference_graph(self.inference_call))).eval()
        network.give_sizes(self.sizes, None)
        return network

    def _run_of(self, call: InferenceCall) -> Callable[..., Any]:
        if self.__dict__["_run_at_inference"] is None:
            self.__dict__["_run_at_inference"] = self._compile(self._inference_graph(call), call)
        run: Callable[..., Any] = self.__dict__["_run_at_inference"]
        return run

    def takes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the graph itself runs for a call, and not one of another form; see `forward` for errors."""
        self._evaluate()
        self._refuse_changed_attributes()
        inputs: GraphInputs = self.__dict__["_graph_inputs"]
        if inputs.others(args, kwargs):
            return False
        kwargs = inputs.omitted(args, kwargs) | kwargs
        if self.inference_call is not None and self.inference_call.is_made_by(args, kwargs):
            return False
        return self.sizes is None or not self.sizes.others(args, kwargs)

    def watch_attributes(self, attributes: ReadAttributes) -> None:
        """Refuse calls from now on if one of these attributes has changed."""
        attributes.watch(self, self._quantization.float_network)
        self.__dict__["attributes"] = attributes

    def _refuse_changed_attributes(self) -> None:
        if self.attributes is not None:
            self.attributes.refuse_changes(self, self._quantization.float_network)

    def give_sizes(self, sizes: GivenSizes | None, other_sizes: OtherSizes | None) -> None:
        """Set the supported input sizes, and the function that makes graphs for other sizes, if there is one."""
        self.__dict__["sizes"] = sizes
        self.__dict__["_other_sizes"] = other_sizes

    def _run_for(
        self, sizes: GivenSizes, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[..., Any]:
        others = sizes.others(args, kwargs)
        if not others:
            return run
        make = self.__dict__.get("_other_sizes")
        if make is None:
            raise NetworkError(sizes.refusal(others))
        made: dict[Any, _Made] = self.__dict__["_made_for"]
        key = sizes.key(args, kwargs)
        # The order is that of the last uses.
        made[key] = made.pop(key) if key in made else self._make_for(make, args, kwargs)
        while len(made) > MOST_SIZES:
            self._warn_of_sizes()
            self._drop(made.pop(next(iter(made))))
        return made[key].run

    def _warn_of_sizes(self) -> None:
        """Warn at the first call of this, because a graph is dropped that may be needed again."""
        if not self.__dict__["_warned_of_sizes"]:
            self.__dict__["_warned_of_sizes"] = True
            warnings.warn(
                f"The network was called with inputs of more than {MOST_SIZES} sizes besides that of its example. "
                "Each needs a graph, of which those that were used last are kept. Calls with many different sizes are "
                "slow, because a graph that was dropped is made again: use fewer sizes, for example multiples of 32, "
                "or mode='eager', which needs no graphs.",
                stacklevel=2,
            )

    def _make_for(self, make: OtherSizes, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Made:
        before = set(self._buffers)
        run = make(self, args, kwargs)
        return _Made(run, frozenset(self._buffers.keys() - before))

    def _drop(self, made: _Made) -> None:
        """Remove the constants of a graph for another size."""
        for name in made.constants:
            self._buffers.pop(name, None)
            self._non_persistent_buffers_set.discard(name)

    def train(self, mode: bool = True) -> GraphNetwork:
        """Set the flags as the original network would, which may keep some of its parts in evaluation."""
        super().train(mode)
        state: Any = self._modules.get("_quantization")
        if state is not None and overrides_train(state.float_network):
            state.float_network.train(mode)
            set_training_flags(self, training_flags(state.float_network))
        self._evaluate()
        return self

    def keep_evaluated(self, names: Iterable[str]) -> None:
        """Keep layers in evaluation from now on, since the network's own forward would put them there."""
        own = dict(self.named_modules(remove_duplicate=False))
        self.evaluated = tuple(name for name in names if name in own)  # others were merged, as a ReLU is

    def _evaluate(self) -> None:
        """Put the layers in evaluation that the network's own forward would."""
        for name in self.evaluated:
            self.get_submodule(name).training = False

    def __getattr__(self, name: str) -> Any:
        """Fall back on the float network's own attributes and methods."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            state = self.__dict__.get("_modules", {}).get("_quantization")
            if state is None or name.startswith("__"):
                raise
            return _borrow(self, state.float_network, name)

    def __getstate__(self) -> dict[str, Any]:
        """Everything except what is made again: compiled functions, and graphs for other sizes with their constants."""
        made = ("_run", "_run_at_inference", "_made_for", "_warned_of_sizes", "_graph_inputs", "_compiled_call_impl")
        state = {name: value for name, value in self.__dict__.items() if name not in made}
        constants = {name for made_for in self.__dict__["_made_for"].values() for name in made_for.constants}
        state["_buffers"] = {name: value for name, value in self._buffers.items() if name not in constants}
        return hold_graphs(state)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(release_graphs(state))  # type: ignore[no-untyped-call]
        self.set_graph(self.__dict__["graph"])


class GraphPart(KeepsExtraState):
    """Holds the layers of a submodule whose ``forward`` was merged into the network's graph."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raise an error that says what to do instead."""
        raise NetworkError(
            "This part of the network was merged into one graph when it was prepared for quantization, and cannot be "
            "called by itself. Call the whole network, give module='<the part that is called>' to the callback, or "
            "use mode='eager', in which every submodule stays callable."
        )


def refuse_call(*args: Any, **kwargs: Any) -> Any:
    """Replaces the ``forward`` of a module that was merged into the graph."""
    return GraphPart().forward(*args, **kwargs)


def compile_graph(graph: fx.Graph) -> Callable[..., Any]:
    """Compile a graph to a Python function whose first argument is the module that holds its layers."""
    code = graph.python_code(root_module="self")
    scope = dict(code.globals)
    exec(compile(code.src, "<graph of the prepared network>", "exec"), scope)
    function: Callable[..., Any] = scope["forward"]
    return function


def _borrow(network: nn.Module, original: nn.Module, name: str) -> Any:
    if not hasattr(original, name):
        raise AttributeError(f"{type(original).__name__!r} object has no attribute {name!r}")
    value = getattr(original, name)
    if isinstance(value, types.MethodType) and value.__self__ is original:
        return types.MethodType(value.__func__, network)
    if isinstance(value, (nn.Module, Tensor, torch.nn.Parameter)):
        raise NetworkError(
            f"{type(original).__name__}.{name} is not part of the prepared network, because its forward does not use "
            "it. Use it on the float network, or use mode='eager', which keeps all attributes."
        )
    return value
