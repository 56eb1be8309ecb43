"""Tensors that a forward creates from numbers, such as coordinates, which upstream's prepare takes for numbers."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from qat_lightning.graph.example import Example
from qat_lightning.graph.training_flags import evaluating
from qat_lightning.modes.coverage import is_float
from qat_lightning.modes.recording import example_values, run_of

_OF_NUMBERS = ("_operator", "builtins", "math")
"""Modules whose functions make numbers of numbers."""
_NO_NUMBER = 0.0
"""An argument that upstream does not take for a number: it only knows integers and nodes."""


def hide_created(graph_module: fx.GraphModule, example: Example) -> Callable[[fx.Graph], None]:
    """Give calls that create floating-point tensors an argument, from which upstream's prepare sees what they are.

    Upstream takes the result of a call for a number if its arguments are numbers, as those of ``torch.linspace`` are,
    and observes no range where it is concatenated.

    Args:
        graph_module: A trace, about to be prepared; changed in place.
        example: One call.

    Returns:
        A function that removes these arguments from the prepared graph.
    """
    graph = graph_module.graph
    made = _made_of_numbers(graph)
    created: set[str] = set()
    if made:
        with evaluating(graph_module):
            values = run_of(graph_module, graph, example_values(graph, example))
        for node in made:
            if is_float(values.get(node.name)):
                node.args = (*node.args, _NO_NUMBER)
                created.add(node.name)

    def show(prepared: fx.Graph) -> None:
        for node in prepared.nodes:
            if node.name in created:
                node.args = node.args[:-1]

    return show


def _made_of_numbers(graph: fx.Graph) -> list[fx.Node]:
    """The calls that get only numbers, sizes, or what was made of these, and may return tensors."""
    numbers: set[fx.Node] = set()
    made = []
    for node in graph.nodes:
        if _is_size(node):
            numbers.add(node)
        elif node.op in ("call_function", "call_method") and numbers.issuperset(node.all_input_nodes):
            numbers.add(node)
            if getattr(node.target, "__module__", None) not in _OF_NUMBERS:
                made.append(node)
    return made


def _is_size(node: fx.Node) -> bool:
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    return node.op == "call_method" and node.target in ("size", "dim", "numel")
