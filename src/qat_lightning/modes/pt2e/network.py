"""The prepared network of mode pt2e: a graph that is called like the captured network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import fx, nn

from qat_lightning.graph.inference_call import InferenceCall
from qat_lightning.graph.signature import CallSpec
from qat_lightning.layers.relu_rounding import with_relus_in_roundings
from qat_lightning.modes.graph_network import GraphNetwork, GraphPart, compile_graph, refuse_call
from qat_lightning.numerics.derived import DerivedFakeQuantize
from qat_lightning.numerics.fake_quantize import FakeQuantize

_OURS = (GraphPart, FakeQuantize, DerivedFakeQuantize)


class ExportedNetwork(GraphNetwork):
    """A captured network with fake-quant, which trains and evaluates as the float network does.

    Its submodules have the float network's classes and hold its parameters, but only those that the graph calls can be
    called.

    Args:
        root: The tree of modules; modified.
        graph: The graph to run: tensors in, a flat tuple out.
        spec: Its signature.
    """

    spec: CallSpec

    def __init__(self, root: nn.Module, graph: fx.Graph, spec: CallSpec) -> None:
        self.__dict__["spec"] = spec
        root.__dict__["graph"] = graph
        super().__init__(cast(fx.GraphModule, root))
        # The branches of torch.cond are attributes, which the op calls.
        nodes = [*graph.find_nodes(op="call_module"), *graph.find_nodes(op="get_attr")]
        called = {id(module) for node in nodes if (module := self._modules_by(str(node.target))) is not None}
        inside = {id(part) for module in self.modules() if id(module) in called for part in module.modules()}
        for name, module in self.named_modules():
            # Parametrizations are called whenever the weight that they compute is read.
            ours = (
                module is self
                or isinstance(module, (GraphPart, FakeQuantize, DerivedFakeQuantize))
                or "parametrizations" in name
            )
            if not ours and id(module) not in inside:
                # On the instance: the class stays the user's, for code that checks types of layers.
                module.__dict__["forward"] = refuse_call

    def _modules_by(self, name: str) -> nn.Module | None:
        try:
            return self.get_submodule(name)
        except AttributeError:
            return None  # a tensor

    def _other_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Nothing: the signature has checked the inputs, and the graph's are the tensors inside them."""
        return ""

    def _compile(self, graph: fx.Graph, call: InferenceCall | None = None) -> Callable[..., Any]:
        """Compile ``graph``, which takes and returns flat tensors, to a function of the captured network's inputs."""
        spec = self.spec if call is None else call.spec
        assert spec is not None
        run = compile_graph(with_relus_in_roundings(self, graph))

        def called(holder: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return spec.unflatten(run(holder, *spec.flatten(args, kwargs)))

        return called
