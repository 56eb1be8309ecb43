"""The API that both quantizing callbacks share, for users and for other callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from typing_extensions import Self

from qat_lightning.callbacks.parts.float_weights import FloatWeights
from qat_lightning.callbacks.parts.int8_networks import Int8Networks
from qat_lightning.callbacks.parts.network import Slot
from qat_lightning.callbacks.parts.networks import Networks, Part, one_or_all
from qat_lightning.callbacks.parts.settings import QuantizationSettings, Setting
from qat_lightning.callbacks.parts.variant_source import VariantSource
from qat_lightning.callbacks.parts.variant_switch import VariantSwitch
from qat_lightning.errors import ConfigurationError
from qat_lightning.rehearsal.rehearse import OnFault
from qat_lightning.settings.recipe import Adapters, BatchNormHandling, Equalization
from qat_lightning.settings.runtimes import Runtime
from qat_lightning.settings.schedule import Phase
from qat_lightning.settings.scheme import Scheme


class QuantizationCallback(Callback):
    """The public API that `QuantizationAwareTraining` and `PostTrainingQuantization` share.

    It implements none of Lightning's hooks; each subclass does.

    Args:
        networks: The settings and the networks.
        source: Provides the variants.
        floats: The float weights to compare with.
    """

    mode = Setting[str]("_networks")
    backend = Setting[Any]("_networks")
    module = Setting[Any]("_networks")
    scheme = Setting[Scheme]("_networks")
    include = Setting[tuple[str, ...]]("_networks")
    exclude = Setting[tuple[str, ...]]("_networks")
    equalization = Setting[Equalization]("_networks")
    batchnorm = Setting[BatchNormHandling]("_networks")
    smoothquant = Setting["float | None"]("_networks")
    rotation = Setting[bool]("_networks")
    runtime = Setting[Runtime | None]("_networks")
    adapters = Setting[Adapters]("_networks")
    rehearse = Setting[bool]("_networks")
    on_fault = Setting[OnFault]("_networks")
    convert_on_fit_end = Setting[bool]("_networks")

    def __init__(self, networks: Networks, source: VariantSource, floats: FloatWeights) -> None:
        self._networks = networks
        self._source = source
        self._floats = floats
        self._int8 = Int8Networks(networks, source)
        self._switch = VariantSwitch(networks, self._int8, source)

    @classmethod
    def of(cls, trainer: Trainer, partner: Callback) -> Self:
        """Return the Trainer's callback of this class, for another callback that needs it.

        Raises:
            ConfigurationError: The Trainer has none, or several.
        """
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        found = [callback for callback in callbacks if isinstance(callback, cls)]
        if len(found) != 1:
            name, wanted = type(partner).__name__, cls.__name__
            if cls is QuantizationCallback:
                wanted = "QuantizationAwareTraining or PostTrainingQuantization"
            raise ConfigurationError(
                f"{name} needs exactly one {wanted}, and the Trainer has {len(found)}: "
                f"callbacks=[{wanted.split()[0]}(...), {name}(...)]."
            )
        return found[0]

    @property
    def settings(self) -> QuantizationSettings:
        """The settings of the callback, with the recipe made from them."""
        return self._networks.settings

    # The prepared networks

    @property
    def prepared(self) -> Any:
        """The prepared network, a dict by name for several, or None before there is one."""
        return one_or_all(self._networks.prepared)

    @property
    def prepared_networks(self) -> dict[str, nn.Module]:
        """The prepared networks by name; empty before there are any."""
        return dict(self._networks.prepared)

    @property
    def coverage(self) -> Any:
        """What conversion will make int8, and why the rest stays float: a list of `LayerCoverage` rows.

        Computed from the prepared network; a dict of lists for several networks, None before there is one. Names are
        relative to the LightningModule, as ``exclude`` takes them. The result of conversion is in
        ``quantized.coverage`` (layers) and ``quantized.operations``, with names relative to the network.
        """
        return one_or_all({name: self._networks.coverage(name) for name in self._networks.prepared})

    @property
    def example_inputs_(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call that the (first) network was prepared with: positional and keyword inputs, on the CPU."""
        return self._networks.first_call

    @property
    def phase(self) -> Phase:
        """What is enabled now: fake-quantization, observers, BatchNorm freezing."""
        return self._networks.phase

    @property
    def chosen_modes(self) -> dict[str, str]:
        """The mode of each network, as chosen by ``mode="auto"``; empty before the choice."""
        return self._networks.modes

    def parts(self) -> dict[str, Part]:
        """The prepared networks with slots and examples, by name; empty before preparation."""
        return self._networks.parts()

    def whole(self, *, everywhere: bool = True) -> AbstractContextManager[None]:
        """Within the block, the prepared networks are whole copies on the CPU where a strategy shards them.

        With a sharding strategy this is a collective operation, as is everything that needs whole weights: `coverage`,
        `convert`, `network`, `present_float`, `comparable`.

        Args:
            everywhere: Whether all processes get the copies; otherwise only the first does.
        """
        return self._networks.whole(everywhere=everywhere)

    @property
    def slots(self) -> dict[str, Slot]:
        """The slots of the networks by name; empty before the fit has begun."""
        return dict(self._networks.slots)

    # The int8 networks

    @property
    def quantized(self) -> Any:
        """The int8 network of the current weights, a dict by name for several, or None while there can be none.

        Reading it compares the weights with those that were converted, and converts them if they are others: keep the
        network for many calls. Within a fit it is there as soon as ``variants`` has ``"int8"``; with sharded parameters
        only when the fit has ended, or `convert` was called in every process.
        """
        return self._int8.quantized

    @property
    def made_from(self) -> str:
        """Description of the weights that `quantized` holds."""
        return self._int8.made_from

    @property
    def conversion(self) -> int:
        """The number of the conversion that `quantized` is from; no two conversions of a process have the same."""
        return self._int8.conversion

    def why_not(self, variant: str) -> str:
        """Why there is no such variant, in a sentence."""
        return self._switch.why_not(variant)

    def convert(self, exclude: Sequence[str] = ()) -> Any:
        """Convert the current weights and ranges to int8.

        A fit, a test, `quantized` and `save` do this automatically, also where weights were changed by hand. Call it to
        leave more layers of a trained network float.

        Args:
            exclude: Globs of module names, relative to the LightningModule, that stay float from now on, in the
                prepared network too.

        Returns:
            `quantized`.

        Raises:
            ConversionError: There is nothing to convert yet, or conversion fails even with all layers float.
            ConfigurationError: A glob matches no int8 layer.

        Example:
            After a fit::

                qat.convert(exclude=["net.head"]).save("model.int8")
        """
        return self._int8.convert(exclude)

    def save(self, path: str | Path) -> None:
        """Write the int8 network to a file that `qat_lightning.load_quantized` reads.

        Raises:
            ConversionError: There can be no int8 network yet, or there are several (save each of ``quantized``).
        """
        self._int8.save(path)

    # The variants

    @property
    def observe_stages(self) -> tuple[str, ...]:
        """The stages in which ranges move until they freeze."""
        return self._switch.observe_stages

    @observe_stages.setter
    def observe_stages(self, stages: tuple[str, ...]) -> None:
        self._switch.observe_stages = stages

    @property
    def fidelity(self) -> dict[str, float]:
        """Agreement of int8 with fake-quant (or float, where there is no fake-quant) in its last test."""
        return self._switch.fidelity

    @fidelity.setter
    def fidelity(self, fidelity: dict[str, float]) -> None:
        self._switch.fidelity = fidelity

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants that can be evaluated now."""
        return self._switch.variants

    @property
    def chosen_variant(self) -> str | None:
        """The variant that `use_variant` chose; None for the default."""
        return self._switch.chosen

    def use_variant(self, name: str | None) -> None:
        """Choose what ``validate``, ``test`` and ``predict`` run.

        Args:
            name: ``"float"``, ``"fake_quant"``, ``"int8"``, or None for the default: fake-quant in ``validate``,
                int8 in ``test`` and ``predict``.

        Raises:
            ConfigurationError: The name is unknown, or there is no such variant, with the reason.
        """
        self._switch.choose(name)

    def make_int8(self, trainer: Trainer) -> bool:
        """Create the int8 networks in every process, unless they exist.

        Returns:
            Whether they exist; if not, a warning gives the reason.
        """
        return self._int8.convert_or_say(trainer, to_run=False)

    def network(self, name: str) -> nn.Module:
        """A variant as a plain module on the CPU, in evaluation mode, to measure or export it.

        Raises:
            ConfigurationError: There is no such variant.
        """
        return self._switch.network(name)

    def running(self, network: nn.Module) -> AbstractContextManager[None]:
        """Within the block, ``test`` and ``predict`` run another network, on the CPU, in place of the only one."""
        return self._switch.running(network)

    def float_weights(self, name: str) -> dict[str, Tensor] | None:
        """The weights of a network's ``"float"`` variant, on the CPU; None if there is none."""
        return self._floats.weights.get(name)

    def present_float(self, slot: str) -> nn.Module:
        """Return the float network with the weights that int8 was converted from, on the CPU, in evaluation mode."""
        return self._source.present_float(slot)

    def comparable(self, slot: str) -> nn.Module:
        """Return the reference for a slot's int8 network: fake-quant if it exists, on the CPU, in evaluation mode."""
        return self._source.comparable(slot)
