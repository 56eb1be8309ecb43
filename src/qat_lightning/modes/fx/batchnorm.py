"""Modules that act as a BatchNorm but have another class: traced through, and replaced by a plain layer in the graph.

So they can be frozen and folded like any BatchNorm. Their parameters and buffers keep their names; other computations
of their ``forward``, such as an activation, follow separately.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qat_lightning.graph.example import Example
from qat_lightning.graph.training_flags import evaluating
from qat_lightning.layers.batchnorm import is_batchnorm
from qat_lightning.layers.qat_modules import FunctionalBatchNorm
from qat_lightning.modes.fx.calls import drop_unread
from qat_lightning.modes.fx.tracer import Traced
from qat_lightning.modes.fx.train_and_eval import replace_node, set_module
from qat_lightning.modes.verify import Recorder, example_values

_PLAIN: dict[int, type[_BatchNorm]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}
"""By the number of dimensions of the input."""

_TENSORS = ("weight", "bias", "running_mean", "running_var")


def name_batchnorms(training: Traced, evaluation: Traced, network: nn.Module, example: Example) -> None:
    """Replace each ``F.batch_norm`` of a graph whose flags are the module's by a layer.

    The layer is a plain BatchNorm in place of the module that holds the tensors, if these have the usual names;
    otherwise a module that gets the tensors as arguments, which can be frozen but not folded.

    Args:
        training: The trace in training; changed in place.
        evaluation: The trace in evaluation, with corresponding nodes.
        network: The float network.
        example: One call.
    """
    root = training.graph_module
    pairs = zip(root.graph.nodes, evaluation.graph_module.graph.nodes, strict=True)
    calls = [(node, other) for node, other in pairs if node.target is F.batch_norm]
    ranks = _Ranks(evaluation.graph_module, network, example)
    layers: dict[str, nn.Module] = {}
    for node, other in calls:
        arguments, in_evaluation = _arguments(node), _arguments(other)
        flags = arguments["training"], in_evaluation["training"]
        path = _holder(in_evaluation, network) or None  # the network itself cannot be a layer of its graph
        if flags == (True, True) or (path is None and flags[0] == flags[1]):
            continue  # the same function in training and evaluation
        given = (arguments["input"],)
        if path is None:
            path = f"_functional_batchnorm_{len(layers)}"
            layers[path] = FunctionalBatchNorm(arguments["momentum"], arguments["eps"])
            given = (*given, *(arguments[name] for name in _TENSORS), *_counter(node, arguments, training, network))
        elif path not in layers:
            layers[path] = _plain(network.get_submodule(path), arguments, functools.partial(ranks.of_input, other))
            _remember(layers[path], fixed=flags == (False, False), counts=path in training.counted)
        set_module(root, path, layers[path])
        replace_node(training, node, path, given)
    _drop_assertions(training, set(layers))
    drop_unread(root.graph)


def _counter(node: fx.Node, arguments: dict[str, Any], traced: Traced, network: nn.Module) -> tuple[fx.Node, ...]:
    """The counter of the module whose ``running_mean`` is read, if that module counted a batch."""
    owner = str(getattr(arguments["running_mean"], "target", "")).rpartition(".")[0]
    if owner not in traced.counted:
        return ()
    counter = network.get_submodule(owner)._buffers["num_batches_tracked"]
    traced.graph_module.get_submodule(owner).register_buffer("num_batches_tracked", counter)
    with traced.graph_module.graph.inserting_before(node):
        return (traced.graph_module.graph.get_attr(f"{owner}.num_batches_tracked".removeprefix(".")),)


def _remember(layer: Any, *, fixed: bool, counts: bool) -> None:
    layer.fixed, layer.counts = fixed, counts


def plain_frozen(network: nn.Module) -> dict[str, nn.Module]:
    """A plain layer for each module that always normalizes with statistics in its buffers.

    An example is torchvision's ``FrozenBatchNorm2d``. Such modules are recognized by calling them.

    Returns:
        The layers, by the path of the module.
    """
    return {path: layer for path, module in network.named_modules() if (layer := _as_frozen(module)) is not None}


@torch.no_grad()
def _as_frozen(module: nn.Module) -> nn.Module | None:
    tensors = [module._buffers.get(name) for name in _TENSORS]
    if is_batchnorm(module) or any(tensor is None or tensor.ndim != 1 for tensor in tensors):
        return None
    eps = getattr(module, "eps", None)
    if any(True for _ in module.parameters()) or any(True for _ in module.children()) or not isinstance(eps, float):
        return None
    weight, bias, mean, variance = (tensor.detach().float().cpu() for tensor in tensors if tensor is not None)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, len(mean), 3, 3, generator=generator)
    wanted = F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)
    for train in (True, False):
        tried = copy.deepcopy(module).cpu().float().train(train)
        try:
            got = tried(x.clone())
        except Exception:  # noqa: BLE001 - a module that fails on this input is not a frozen BatchNorm
            return None
        if not isinstance(got, Tensor) or got.shape != x.shape or not torch.allclose(got, wanted, atol=1e-4, rtol=1e-3):
            return None
    layer = _plain(module, {"eps": eps, "momentum": 0.0}, lambda: 4)
    _remember(layer, fixed=True, counts=False)
    return layer


@contextmanager
def as_upstream_wants(graph_module: fx.GraphModule) -> Iterator[None]:
    """Make upstream's fusion accept BatchNorms with any parameters, because our folded layers do."""
    layers = [module for module in graph_module.modules() if is_batchnorm(module)]
    before = [(layer.affine, layer.track_running_stats) for layer in layers]
    for layer in layers:
        layer.affine = layer.track_running_stats = True
    try:
        yield
    finally:
        for layer, (affine, tracking) in zip(layers, before, strict=True):
            layer.affine, layer.track_running_stats = affine, tracking


def give_parameters(network: nn.Module) -> None:
    """Give BatchNorms without gamma and beta these parameters, which int8 kernels need."""
    for module in network.modules():
        if not is_batchnorm(module) or (variance := module.running_var) is None:
            continue
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            given = module._buffers.pop(name, None)
            if module._parameters.get(name) is None:
                held = torch.full_like(variance, value) if given is None else given
                module._parameters[name] = nn.Parameter(held, requires_grad=False)


def _arguments(node: fx.Node) -> dict[str, Any]:
    bound = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments


def _holder(arguments: dict[str, Any], network: nn.Module) -> str | None:
    """The path of the module that holds all tensors of a call under their usual names; None if there is none."""
    owners = set()
    for name in _TENSORS:
        node = arguments[name]
        if node is None and name in ("weight", "bias"):
            continue
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        owner, _, leaf = str(node.target).rpartition(".")
        if leaf != name:
            return None
        owners.add(owner)
    path = owners.pop() if len(owners) == 1 else ""
    if not path:
        return None
    holder: Any = network.get_submodule(path)
    # If the call omits the weight, a plain layer would use it.
    left_out = any(arguments[name] is None and getattr(holder, name, None) is not None for name in ("weight", "bias"))
    return None if left_out else path


def _plain(holder: nn.Module, arguments: dict[str, Any], rank: Callable[[], int]) -> nn.Module:
    """A plain BatchNorm with the tensors, and the children, of ``holder``."""
    cls: Any = next((k for k in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) if isinstance(holder, k)), None)
    source: Any = holder
    momentum = None if getattr(holder, "momentum", 0) is None else arguments["momentum"]
    layer: Any = (cls or _PLAIN[rank()])(0, eps=arguments["eps"], momentum=momentum, affine=False)
    layer.num_features = source.running_mean.numel()
    for table in ("_parameters", "_buffers", "_modules"):
        layer.__dict__[table] = dict(holder.__dict__[table])
    layer._non_persistent_buffers_set = set(holder._non_persistent_buffers_set)
    for name in ("weight", "bias"):
        if name not in layer._buffers:
            layer._parameters.setdefault(name, None)
    layer._buffers.setdefault("num_batches_tracked", None)
    layer.affine = getattr(holder, "weight", None) is not None
    # Without a counter of its own, loading would require one.
    layer.track_running_stats = layer.num_batches_tracked is not None
    layer.training = holder.training
    plain: nn.Module = layer
    return plain


class _Ranks:
    """The number of dimensions of tensors on the example, computed on first use."""

    def __init__(self, evaluation: fx.GraphModule, network: nn.Module, example: Example) -> None:
        self._of: dict[str, int] = {}
        self._asked = evaluation, network, example

    def of_input(self, node: fx.Node) -> int:
        """Number of dimensions of the input of a call of ``F.batch_norm`` in evaluation."""
        if not self._of:
            self._record(*self._asked)
        return self._of[_arguments(node)["input"].name]

    @torch.no_grad()
    def _record(self, evaluation: fx.GraphModule, network: nn.Module, example: Example) -> None:
        with evaluating(network, evaluation), torch.random.fork_rng(devices=[]):
            values = Recorder(evaluation, evaluation.graph)
            values.run(*copy.deepcopy(example_values(evaluation.graph, example)))
        self._of = {name: value.ndim for name, value in values.values.items() if isinstance(value, Tensor)}


def _drop_assertions(traced: Traced, paths: set[str]) -> None:
    """Drop a BatchNorm's assertions about its input's shape, which prevent fusion; its replacement checks the shape."""
    graph = traced.graph_module.graph
    for node in list(graph.nodes):
        if node.target is torch._assert and traced.scopes.get(node.name, ("",))[0] in paths:
            graph.erase_node(node)
