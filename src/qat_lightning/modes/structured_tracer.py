"""Tracing networks that return dict-likes and dataclasses: the graph creates the same objects."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from typing import Any

from torch import fx, nn
from torch.ao.quantization.fx.tracer import QuantizationTracer
from torch.fx.immutable_collections import immutable_dict

from qat_lightning.graph.structures import given_fields, is_record, make_mapping
from qat_lightning.modes.other_quantization import is_fused_float


class MakesMapping:
    """Creates an object of a subclass of dict from pairs of keys and values; used as the target of a node.

    Args:
        kind: The class.
        factory: The default factory of a defaultdict.
    """

    def __init__(self, kind: type, factory: Any = None) -> None:
        self.kind, self.factory = kind, factory
        # Code generators read these attributes of a function.
        self.__name__ = self.__qualname__ = f"make_{kind.__name__}"
        self.__module__ = __name__

    def __call__(self, items: Any) -> Any:
        """Create the object."""
        made = make_mapping(self.kind, items)
        if isinstance(made, defaultdict):
            made.default_factory = self.factory
        return made

    def __repr__(self) -> str:
        return self.__name__


class StructuredTracer(QuantizationTracer):
    """Upstream's tracer, extended: upstream turns every dict-like into a plain dictionary."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is called as a whole; fused modules of ``fuse_modules`` are traced through."""
        whole: bool = super().is_leaf_module(m, module_qualified_name)
        return whole and (not is_fused_float(m) or module_qualified_name in self.skipped_module_names)

    def create_arg(self, a: Any) -> Any:
        """The representation of ``a`` in the graph."""
        if is_record(type(a)):
            given = {name: self.create_arg(value) for name, value in given_fields(a).items()}
            return self.create_node("call_function", type(a), (), given)
        if isinstance(a, dict) and type(a) not in (dict, immutable_dict):
            pairs = [(key, self.create_arg(value)) for key, value in a.items()]
            factory = a.default_factory if isinstance(a, defaultdict) else None
            make = OrderedDict if type(a) is OrderedDict else MakesMapping(type(a), factory)
            return self.create_node("call_function", make, (pairs,), {})
        try:
            return super().create_arg(a)
        except NotImplementedError as error:
            if not str(error).startswith("argument of type"):
                raise  # raised for a value inside
            raise NotImplementedError(
                f"a graph can hold tensors, numbers and containers of them, but not a {type(a).__name__}: remove it "
                "from the inputs and outputs of forward (a cache of transformers with use_cache=False)"
            ) from error


def makes_container(node: fx.Node) -> bool:
    """Whether a node creates a container of values from other nodes."""
    target: Any = node.target
    return isinstance(target, MakesMapping) or target is OrderedDict or is_record(target)
