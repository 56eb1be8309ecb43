"""The settings of a quantizing callback, as one frozen value from which the recipe is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar, get_args

from qat_lightning.callbacks.parts.arguments import check_flag, check_names, check_word
from qat_lightning.errors import ConfigurationError
from qat_lightning.graph.example import from_user
from qat_lightning.rehearsal.rehearse import OnFault
from qat_lightning.settings.backends import get_backend, require
from qat_lightning.settings.quantizers import backend_and_source
from qat_lightning.settings.recipe import Adapters, BatchNormHandling, Equalization, Kind, Recipe
from qat_lightning.settings.runtimes import Runtime
from qat_lightning.settings.scheme import Scheme

Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class QuantizationSettings:
    """The arguments that both quantizing callbacks have; see `QuantizationAwareTraining`.

    Args:
        mode: The mode, or ``"auto"``.
        backend: The target: a name, or a PT2E quantizer in any of `qat_lightning.settings.quantizers.FORMS`.
        kind: What is quantized: ``"static"``, ``"dynamic"`` or ``"weight_only"``.
        module: Which networks.
        example_inputs: One call of the network.
        scheme: Bits and granularity; None for the default.
        include: Globs of modules to quantize; None for all.
        exclude: Globs of modules that stay float; None for none.
        equalization: Whether weight ranges are equalized before preparation.
        batchnorm: ``"fused"`` or ``"fold"``.
        rehearse: Whether to try the whole path to the int8 file on a copy before training.
        on_fault: What to do with layers that cannot be int8.
        convert_on_fit_end: Whether to create an int8 network.
        smoothquant: Share of activation outliers that moves into the weights before preparation; None for off.
        rotation: Whether channels are rotated before preparation.
        runtime: What runs the int8 network; None for the fastest.
        trained: Whether a network of kind ``"dynamic"`` or ``"weight_only"`` is trained for these grids.
        adapters: How to treat low-rank adapters.

    Attributes:
        scheme: As given, or the default; like ``include`` and ``exclude`` it is part of the recipe.
        backend: As given; a class or function is replaced by its dotted path.
        recipe: The recipe for preparation; with ``mode="auto"``, for the first mode that the backend supports.

    Raises:
        ConfigurationError: A setting, or a combination of mode and backend, is not supported.

    Example:
        >>> settings = QuantizationSettings("auto", "x86", exclude=["head"])
        >>> settings.recipe_for("pt2e").exclude
        ('head',)
    """

    mode: str
    backend: Any
    kind: Kind = "qat"
    module: str | list[str] | None = None
    example_inputs: Any = None
    scheme: Scheme | None = None
    include: Sequence[str] | None = None
    exclude: Sequence[str] | None = None
    equalization: Equalization = "none"
    batchnorm: BatchNormHandling = "fused"
    rehearse: bool = True
    on_fault: OnFault = "leave_float"
    convert_on_fit_end: bool = True
    trained: bool = False
    smoothquant: float | None = None
    adapters: Adapters = "merged"
    rotation: bool = False
    runtime: Runtime | None = None
    recipe: Recipe = field(init=False)

    def __post_init__(self) -> None:
        """Check everything that can be checked without a network."""
        check_word("mode", self.mode)
        backend, source = backend_and_source(self.backend)
        check_word("backend", backend)
        target = get_backend(backend, self.mode)
        require(target)
        # Which names exist is known only at the fit.
        if self.module is not None and not isinstance(self.module, str):
            check_names("module", self.module, example="['encoder', 'head']")
        scheme = self.scheme if self.scheme is not None else Scheme()
        if not isinstance(scheme, Scheme):
            raise ConfigurationError(f"scheme={scheme!r} is not valid: give a qat_lightning.Scheme.")
        include = check_names("include", self.include, example="['head.*']")
        exclude = check_names("exclude", self.exclude, example="['head.*']")
        check_flag("rehearse", self.rehearse)
        if self.on_fault not in get_args(OnFault):
            raise ConfigurationError(
                f"on_fault={self.on_fault!r} is unknown: use one of {', '.join(get_args(OnFault))}."
            )
        mode = target.modes[0] if self.mode == "auto" else self.mode
        recipe = Recipe(
            mode,
            backend,
            scheme,
            include,
            exclude,
            self.kind,
            self.equalization,
            self.batchnorm,
            self.trained,
            smoothquant=self.smoothquant,
            adapters=self.adapters,
            rotation=self.rotation,
            runtime=self.runtime,
            quantizer=source,
        )
        if source is not None:
            # Imported here because importing torchao takes time that other backends need not spend.
            from qat_lightning.modes.pt2e.quantizers import own_quantizer

            own_quantizer(source)
        if self.example_inputs is not None and isinstance(self.module, (str, type(None))):
            from_user(self.example_inputs)
        check_flag("convert_on_fit_end", self.convert_on_fit_end)
        given = backend if source is None else source.shortest
        for name, value in (
            ("backend", given),
            ("scheme", scheme),
            ("include", include),
            ("exclude", exclude),
            ("recipe", recipe),
        ):
            object.__setattr__(self, name, value)

    @property
    def trains(self) -> bool:
        """Whether networks are trained for int8; otherwise they are quantized without training."""
        return self.kind == "qat" or self.trained

    def decides_like(self, mode: str, recipe: Mapping[str, Any] | None) -> bool:
        """Whether a decision from a checkpoint holds for these settings.

        Args:
            mode: The mode that it chose.
            recipe: `Recipe.to_dict` of the recipe that it was made for; None in checkpoints of earlier versions.
        """
        if self.mode not in ("auto", mode) or mode not in self.recipe.target.modes:
            return False
        return recipe is None or not self.recipe_for(mode).differences(Recipe.from_dict(recipe))

    def recipe_for(self, mode: str) -> Recipe:
        """Return the recipe for one mode, which ``mode="auto"`` leaves open.

        Raises:
            ConfigurationError: The backend does not support the mode.
        """
        return self.recipe if mode == self.recipe.mode else replace(self.recipe, mode=mode)


class Setting(Generic[Value]):
    """A callback attribute that is a field of a frozen dataclass; setting it replaces and re-validates that dataclass.

    Args:
        holder: The callback's attribute whose ``settings`` is the frozen dataclass.
    """

    def __init__(self, holder: str) -> None:
        self.holder = holder
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, callback: Any, owner: type | None = None) -> Value:
        if callback is None:
            return self  # type: ignore[return-value]
        value: Value = getattr(getattr(callback, self.holder).settings, self.name)
        return value

    def __set__(self, callback: Any, value: Value) -> None:
        holder = getattr(callback, self.holder)
        holder.settings = replace(holder.settings, **{self.name: value})
