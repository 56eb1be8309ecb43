"""Eager mode: the user's own ``forward`` always runs, with any control flow; only layers are replaced.

One run on the example shows which BatchNorm and activation follow which layer (`chains`). In the prepared network, each
of these layers rounds in its own place (`layers`). In the converted network, the int8 kernel of a chain replaces its
first layer, and integers pass from one kernel to the next (`int8`).
"""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qat_lightning.checks import LayerCheck, WholeCheck
from qat_lightning.errors import CheckpointMismatchError, ConversionError, NetworkError, VerificationError
from qat_lightning.graph.example import Example, in_float32
from qat_lightning.graph.scopes import join
from qat_lightning.layers.kernels import choose_kernels
from qat_lightning.layers.operators import WEIGHTED
from qat_lightning.layers.qat_modules import make_batchnorm_freezable
from qat_lightning.layers.quantized_tensors import without_deprecation
from qat_lightning.layers.tables import make_tables_plain, why_float
from qat_lightning.layers.transformer import MAPS, attentions, give_layers, take_layers
from qat_lightning.modes.eager.calls import LATER, Grids, count_in
from qat_lightning.modes.eager.chains import BY_A_FUNCTION, Chain, find_chains, float_functions, kind_of
from qat_lightning.modes.eager.check import check_layers, run
from qat_lightning.modes.eager.coverage import eager_rows
from qat_lightning.modes.eager.filling import fill, int8_layers, load_rest
from qat_lightning.modes.eager.forwards import take_forwards_as_a_whole, with_calls
from qat_lightning.modes.eager.heads import HEADS
from qat_lightning.modes.eager.layers import LINKS, ChainHead, become, without_fast_paths
from qat_lightning.modes.eager.make import make_int8
from qat_lightning.modes.eager.observation import CHAIN_TYPES, HEAD_TYPES, Observation, observe
from qat_lightning.modes.eager.outputs import plain_outputs
from qat_lightning.modes.eager.run_in_training import as_in_training
from qat_lightning.modes.eager.same_values import refuse_other_values
from qat_lightning.modes.eager.tables import fill_tables, find_tables, make_integer, round_tables, rounded_tables
from qat_lightning.modes.layer_schemes import give_layers_their_grids
from qat_lightning.modes.left_float import follow_checkpoints, leave_weights_float, with_reasons
from qat_lightning.modes.other_quantization import refuse_other_quantization
from qat_lightning.modes.plain_attributes import set_attributes, take_attributes
from qat_lightning.modes.precision import refuse_mixed
from qat_lightning.modes.prepared import (
    PreparedState,
    changed_attributes,
    copy_of_modules,
    cpu_copy,
    follow_course,
    is_prepared,
    materialize_weights,
    name_float_tensors_first,
    prepared_state,
    refuse_simulated,
    remember_attributes,
)
from qat_lightning.modes.protocol import EXCLUDED, Converted, LayerCoverage
from qat_lightning.modes.qconfig import make_qconfig
from qat_lightning.modes.replaced import remember_layers
from qat_lightning.numerics.recomputation import keep_tapes
from qat_lightning.settings.engines import packing_engine
from qat_lightning.settings.recipe import Recipe

_UNSEEN = "its range was never observed: training did not call it, or the checkpoint has no range of it"


class EagerMode:
    """`Mode` for ``mode="eager"``."""

    def prepare(self, network: nn.Module, example: Example, recipe: Recipe, *, prefix: str = "") -> nn.Module:
        """Insert fake-quant into the layers of ``network``, which stays the same object; see `Mode.prepare`."""
        refuse_other_quantization(network)
        refuse_mixed(network, example)
        keep_tapes()
        make_tables_plain(network)  # of an earlier preparation
        float_network = copy_of_modules(network)
        opened = attentions(network, lambda name: "attention" in recipe.families and recipe.selects(join(prefix, name)))
        for attention in opened:
            give_layers(attention)
        try:
            heads = CHAIN_TYPES if "subpixel" in recipe.families else HEAD_TYPES
            observation = observe(network, example, heads=heads)
            return self._prepare(network, float_network, observation, example, recipe, prefix)
        except Exception:
            if not is_prepared(network):
                for attention in opened:
                    take_layers(attention)
            raise

    def _prepare(
        self,
        network: nn.Module,
        float_network: nn.Module,
        observation: Observation,
        example: Example,
        recipe: Recipe,
        prefix: str,
    ) -> nn.Module:
        chains, reasons = find_chains(network, observation, recipe, prefix)
        if recipe.kind == "qat":
            chains = as_in_training(chains, network, example, recipe, prefix, heads=observation.heads)
        tables, float_tables = find_tables(network, observation, chains, recipe, prefix)
        reasons |= float_tables
        if not tables and not any(chain.reached for chain in chains):
            reasons |= {chain.name: "the example does not call it" for chain in chains}
            why = "; ".join(f"{name or 'itself'}: {reason}" for name, reason in list(reasons.items())[:12])
            functions = ", or mode='fx', which quantizes functions too" if BY_A_FUNCTION in reasons.values() else ""
            raise NetworkError(
                f"There is nothing to quantize in {type(network).__name__}: "
                f"{why or 'it has no convolution and no linear layer'}. Check include and exclude, give "
                f"example_inputs= for which forward calls such a layer, or use another module={functions}."
            )
        without_fast_paths(network)
        make_batchnorm_freezable(network)
        modules = _modules(network)
        chains = with_calls(chains, observation, modules)
        for chain in chains:
            _make_head(modules, chain, recipe)
        for chain in chains:
            if chain.grid_of is not None:
                modules[chain.name].__dict__["grid_of"] = (modules[chain.grid_of],)
        round_tables(network, tables, recipe)
        plan = {
            "chains": [chain.to_dict() for chain in chains],
            "float": reasons,
            "functions": float_functions(observation),
            "prefix": prefix,
            "tables": [[name, type(float_network.get_submodule(name)).__name__] for name in tables],
        }
        network._quantization = PreparedState(self, recipe, float_network, prefix=prefix, plan=plan)
        give_layers_their_grids(network)
        materialize_weights(network)
        follow_course(network)
        name_float_tensors_first(network)
        remember_attributes(network)
        take_forwards_as_a_whole(network, observation)
        follow_checkpoints(network)
        remember_layers(network)
        refuse_other_values(network, example, observation.result)
        return network

    def convert(self, prepared: nn.Module, example: Example) -> Converted:
        """Put int8 kernels into a copy of the float network, and verify each; see `Mode.convert`."""
        refuse_simulated(prepared_state(prepared).recipe)
        with _quiet():
            return self._convert(prepared, in_float32(example))

    def _convert(self, prepared: nn.Module, example: Example) -> Converted:
        state = prepared_state(prepared)
        target = state.recipe.target
        heads = _heads(prepared)
        _refuse_broken(heads, state.plan, _modules(prepared))
        plan = _plan_of_seen(state.plan, heads, state.left_float)
        if state.plan["chains"] and not plan["chains"] and not state.left_float:
            raise ConversionError(
                f"No range was ever observed in {type(state.float_network).__name__}: train at least one step on "
                "finite values before converting."
            )
        plan["attributes"] = changed_attributes(prepared)
        network = copy.deepcopy(state.float_network).float()
        set_attributes(network, plan["attributes"])
        network = self.skeleton(network, plan, state.recipe)
        with packing_engine(target.engine):
            for layer in int8_layers(network).values():
                fill(layer, heads[layer.chain.name])
            choose_kernels(network, target.engine)
            load_rest(network, prepared)
            tables = fill_tables(network, prepared, [name for name, _ in plan["tables"]])
            checks, whole = check_layers(prepared, network, heads, int8_layers(network), example, target)
            checks = [*tables, *checks]
        notes = [*_notes(plan, checks), *_in_words(whole)]
        rows = with_reasons(_coverage(state, plan), state.left_float)
        selects = functools.partial(_selects, state)
        rows, operations = eager_rows(rows, state.float_network, plan, example, selects)
        return Converted(network, rows, checks, notes, operations, whole)

    def coverage(self, prepared: nn.Module, example: Example) -> list[LayerCoverage]:
        """See `Mode.coverage`."""
        state = prepared_state(prepared)
        rows = with_reasons(_coverage(state, state.plan), state.left_float)
        selects = functools.partial(_selects, state)
        rows, operations = eager_rows(rows, state.float_network, state.plan, example, selects)
        return [*rows, *operations]

    def parts(self, prepared: nn.Module) -> list[str]:
        """See `Mode.parts`."""
        return [*(name for name, head in _heads(prepared).items() if not head.left_float), *rounded_tables(prepared)]

    def leave_float(self, prepared: nn.Module, names: Collection[str], example: Example | None) -> None:
        """See `Mode.leave_float`."""
        if example is not None:
            _give_own_input_range(prepared, _heads(prepared).keys() & set(names), example)
        leave_weights_float(prepared, names)

    def skeleton(self, network: nn.Module, plan: Mapping[str, Any], recipe: Recipe) -> nn.Module:
        """Give a float network the structure of the int8 one, to load an int8 ``state_dict`` into.

        Args:
            network: The float network, newly created by its code; changed in place.
            plan: ``quantization_plan`` of the int8 network: plain values only.
            recipe: The recipe it was prepared with.

        Returns:
            ``network``, its weights and grids not yet set. Loading packs weights for the current engine, so load inside
            `qat_lightning.settings.engines.packing_engine`.

        Raises:
            CheckpointMismatchError: The network does not have these layers.
        """
        take_attributes(network, plan.get("attributes", {}))
        without_fast_paths(network)
        inside = [values["name"] for values in plan["chains"]]
        opened = attentions(network, lambda name: any(chain.startswith(f"{name}." if name else "") for chain in inside))
        for attention in opened:
            give_layers(attention)
        modules = _modules(network)
        dtype = torch.quint8 if recipe.target.activation_dtype is torch.uint8 else torch.qint8
        with packing_engine(recipe.target.engine), _quiet():
            for values in plan["chains"]:
                chain = Chain(**values)
                missing = [name for name in (chain.name, *chain.links) if name not in modules]
                if missing or kind_of(modules[chain.name]) != chain.kind:
                    also = f" and modules at {missing}" if missing else ""
                    raise _other_network(network, f"a {chain.kind} at {chain.name!r}{also}")
                make_int8(modules, chain, dtype)
        for name, kind in plan.get("tables", ()):
            if type(modules.get(name)).__name__ != kind or why_float(modules[name]):
                raise _other_network(network, f"an {kind} at {name!r}")
            make_integer(modules[name], recipe.of(join(plan.get("prefix", ""), name)))
        for attention in opened:
            attention.drop_parameters()
        for parameter in network.parameters():
            parameter.requires_grad_(False)
        network.register_forward_hook(plain_outputs)
        count_in(network)
        network.__dict__["quantization_plan"] = dict(plan)
        return network.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress upstream's warning on every use of quantized tensors; the pinned range of torch versions covers it."""
    with warnings.catch_warnings(), without_deprecation():
        warnings.filterwarnings("ignore", message=".*torch\\.ao\\.quantization.*", category=DeprecationWarning)
        yield


def _other_network(network: nn.Module, wanted: str) -> CheckpointMismatchError:
    return CheckpointMismatchError(
        f"{type(network).__name__} is not the network that was quantized: it should have {wanted}. Give a float "
        "network built by the same code with the same arguments."
    )


def _modules(network: nn.Module) -> dict[str, nn.Module]:
    return dict(network.named_modules(remove_duplicate=False))


def _heads(prepared: nn.Module) -> dict[str, ChainHead]:
    """The heads of all chains of a prepared network, by name."""
    heads, modules = {}, _modules(prepared)
    for values in prepared_state(prepared).plan["chains"]:
        head = modules.get(values["name"])
        if isinstance(head, ChainHead):  # otherwise, it was replaced
            heads[values["name"]] = head
    return heads


def _refuse_broken(heads: Mapping[str, ChainHead], plan: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> None:
    """Refuse chains of which a later module was replaced; the layer can be left float."""
    chains = {chain["name"]: Chain(**chain) for chain in plan["chains"]}
    broken = [
        name
        for name, head in heads.items()
        if not head.left_float and [modules.get(link) for link in chains[name].links] != list(head.links)
    ]
    if broken:
        fault = "the BatchNorm or activation after it was replaced after the network was prepared"
        checks = [LayerCheck(name, chains[name].kind, -math.inf, math.nan, fault) for name in broken]
        raise VerificationError(f"{', '.join(broken)}: {fault}. Keep it float with exclude=.", broken, checks)


@torch.no_grad()
def _give_own_input_range(prepared: nn.Module, names: Collection[str], example: Example) -> None:
    """For layers that are about to be left float, copy their output range to the inputs that used its grid so far."""
    probe = cpu_copy(prepared)
    heads, own = _heads(probe), _heads(prepared)
    leaving = {id(grids.output_fake_quant) for name in names for grids in heads[name].grids}
    for head in heads.values():
        head.taps = []
    run(probe, example)
    for name, head in heads.items():
        for tap in head.taps or ():
            if id(tap.grid) in leaving:
                own[name].grids[tap.number].input_fake_quant.widen_to(tap.grid)


def _make_head(modules: dict[str, nn.Module], chain: Chain, recipe: Recipe) -> None:
    head: Any = modules[chain.name]
    qconfig = make_qconfig(recipe)
    for name in chain.links:
        if type(modules[name]) in LINKS:
            become(modules[name], LINKS[type(modules[name])])
    become(head, HEADS[type(head)], links=tuple(modules[name] for name in chain.links), grid_of=(), taps=None)
    # The same children for any example, except for the number of calls, to which a checkpoint is adapted.
    head.weight_fake_quant = qconfig.weight()
    head.input_fake_quant = qconfig.activation()
    head.output_fake_quant = qconfig.activation()
    if chain.calls > 1:
        later = [Grids(number, qconfig.activation(), qconfig.activation()) for number in range(1, chain.calls)]
        head.add_module(LATER, nn.ModuleList(later))
    head.begin_forward(False)
    for grids in head.grids:
        if chain.activation is not None:
            grids.output_fake_quant.begins_at_zero(math.inf if chain.limit is None else chain.limit)
    for child in head.children():
        child.to(head.weight.device).train(head.training)


def _plan_of_seen(
    plan: Mapping[str, Any], heads: Mapping[str, ChainHead], left_float: Mapping[str, str]
) -> dict[str, Any]:
    """The plan without chains that are left float or whose output was never observed, and the reasons."""
    chains = [
        chain
        for chain in plan["chains"]
        if (head := heads.get(chain["name"])) and head.output_fake_quant.seen and not head.left_float
    ]
    unseen = {chain["name"]: left_float.get(chain["name"], _UNSEEN) for chain in plan["chains"] if chain not in chains}
    unseen |= {name: left_float[name] for name, _ in plan["tables"] if name in left_float}
    tables = [row for row in plan["tables"] if row[0] not in left_float]
    return {**plan, "chains": chains, "tables": tables, "float": {**plan["float"], **unseen}}


def _in_words(whole: WholeCheck | None) -> list[str]:
    if whole is None:
        return []
    return [f"On the example, the int8 network as a whole is {whole.sqnr_db:.1f} dB from fake-quant."]


def _notes(plan: Mapping[str, Any], checks: list[LayerCheck]) -> list[str]:
    notes = []
    checked = {check.name for check in checks}
    unchecked = [chain["name"] for chain in plan["chains"] if chain["name"] not in checked]
    if unchecked:
        notes.append(f"Not compared with fake-quant, because the example does not call them: {', '.join(unchecked)}.")
    if plan["functions"]:
        ran = ", ".join(f"{name} ({count})" for name, count in plan["functions"].items())
        notes.append(f"Functions stay float in mode='eager': {ran}.")
    return notes


def _coverage(state: PreparedState, plan: Mapping[str, Any]) -> list[LayerCoverage]:
    int8 = {*(chain["name"] for chain in plan["chains"]), *(name for name, _ in plan["tables"])}
    rows = []
    for name, module in state.float_network.named_modules():
        if isinstance(module, WEIGHTED):
            parts = [join(name, part) for part in MAPS] if type(module) is nn.MultiheadAttention else [name]
            missing = [part for part in parts if part not in int8]
            reason = _why_float(state, plan, missing[0], module) if missing else ""
            rows.append(LayerCoverage(name, type(module).__name__, not missing, reason))
    return rows


def _why_float(state: PreparedState, plan: Mapping[str, Any], name: str, module: nn.Module) -> str:
    if name in plan["float"]:
        return str(plan["float"][name])
    return f"{type(module).__name__} is not quantized in mode='eager'" if _selects(state, name) else EXCLUDED


def _selects(state: PreparedState, name: str) -> bool:
    return state.recipe.selects(join(state.prefix, name))
