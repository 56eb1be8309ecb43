"""The recipe: all settings by which a network is prepared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from qat_lightning.errors import CheckpointMismatchError, CombinationError, ConfigurationError
from qat_lightning.settings.backends import Backend, get_backend
from qat_lightning.settings.engines import LARGEST_EXACT_WEIGHT, detour
from qat_lightning.settings.modes import traits_of
from qat_lightning.settings.overrides import lineage, matches
from qat_lightning.settings.quantizers import QuantizerSource, backend_and_source
from qat_lightning.settings.runtimes import Runtime, check_runtime
from qat_lightning.settings.scheme import CALIBRATION_ONLY, Scheme

FORMAT = 1

Equalization = Literal["none", "exact", "replace_relu6"]
"""Whether weight ranges of neighbouring layers are equalized: see `qat_lightning.recipes.equalization`."""

BatchNormHandling = Literal["fused", "fold"]
"""``"fused"``: BatchNorm trains, and rounded weights include it. ``"fold"``: it is folded before training."""

FAMILIES = (
    "attention",
    "twins",
    "linear",
    "transposed",
    "convolutions",
    "subpixel",
    "tables",
    "products",
    "sums",
    "dynamic_tables",
    "bounds",
    "identities",
)
"""What earlier releases left float, so that their checkpoints have no ranges for it: attention; functions under names
that upstream does not know; products with a weight, as linear layers; transposed convolutions in mode fx; in mode pt2e
convolutions of sequences without a ReLU, and those with padding given by name; transposed convolutions in modes eager
and pt2e; the tables of embeddings, of static networks (``"tables"``) and of dynamic ones; in mode fx products of shapes
that are broadcast, and products by other names. For the last three, they did something else instead: they rounded sums
that only float ops read, in modes fx and pt2e (``"sums"``); in mode fx they rounded limits of clamps that are tensors
(``"bounds"``), and mistook whatever leaves the example unchanged for dropout (``"identities"``)."""

Adapters = Literal["merged", "float"]
"""How low-rank adapters (LoRA) are treated: merged into the rounded weights, or float beside them."""

Kind = Literal["qat", "static", "dynamic", "weight_only"]
"""How a network is quantized: trained with fake-quantization, calibrated, with ranges computed for each input, or with
integer weights only."""


@dataclass(frozen=True)
class Recipe:
    """Mode, backend, scheme and choice of layers: all settings that `prepare` needs.

    Args:
        mode: ``"eager"``, ``"fx"``, ``"pt2e"`` or ``"parts"``.
        backend: A name in `qat_lightning.settings.backends.BACKENDS`; in mode pt2e also a PT2E quantizer in one of the
            forms of `qat_lightning.settings.quantizers.FORMS`, which is replaced by its path.
        scheme: Bits and granularity.
        include: Globs of module names; empty for all.
        exclude: Globs of module names that stay float, with all their submodules.

        kind: ``"qat"``, ``"static"``, ``"dynamic"`` or ``"weight_only"``.
        trained: Whether a network of kind ``"dynamic"`` or ``"weight_only"`` trains with fake-quantization; ``"qat"``
            always does.
        equalization: ``"none"``, ``"exact"`` or ``"replace_relu6"``.
        batchnorm: ``"fused"`` or ``"fold"``.
        smoothquant: Migration strength of SmoothQuant, from 0 (activations stay as they are) to 1; None to leave it
            out.
        rotation: Whether channels are rotated, which spreads outliers over all of them.
        adapters: ``"merged"`` or ``"float"``.
        runtime: None for the fastest, or ``"plain"`` for oneDNN's ops on plain tensors; not compared, since it does not
            affect training.
        left_float: Names of layers that turned out to have no int8 form, each with the reason; not a setting, and not
            compared.
        families: Which of `FAMILIES` are quantized: all, except when a checkpoint of an earlier release is resumed; not
            a setting, and not compared.
        quantizer: Where the quantizer of a custom backend comes from; derived from ``backend``.

    Raises:
        ConfigurationError: The mode does not support the backend, a glob is not a string, or the scheme has
            settings that this kind does not support.

    Example:
        >>> recipe = Recipe("fx", "x86", exclude=("head*",))
        >>> recipe.selects("head.fc"), recipe.selects("stem.conv")
        (False, True)
    """

    mode: str
    backend: str
    scheme: Scheme = field(default_factory=Scheme)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    kind: Kind = "qat"
    equalization: Equalization = "none"
    batchnorm: BatchNormHandling = "fused"
    trained: bool = False
    left_float: tuple[tuple[str, str], ...] = ()
    families: tuple[str, ...] = FAMILIES
    smoothquant: float | None = None
    adapters: Adapters = "merged"
    rotation: bool = False
    quantizer: QuantizerSource | None = None
    runtime: Runtime | None = None

    def __post_init__(self) -> None:
        """Check the pair of mode and backend, the globs, and the scheme."""
        if self.quantizer is None or self.quantizer.path != self.backend:
            backend, source = backend_and_source(self.backend)
            object.__setattr__(self, "backend", backend)
            object.__setattr__(self, "quantizer", source)
        get_backend(self.backend, self.mode)
        for name, possible in (
            ("kind", Kind),
            ("equalization", Equalization),
            ("batchnorm", BatchNormHandling),
            ("adapters", Adapters),
        ):
            value: Any = getattr(self, name)
            if not isinstance(value, str) or value not in get_args(possible):
                raise ConfigurationError(f"{name}={value!r} is unknown: use one of {', '.join(get_args(possible))}.")
        check_smoothquant(self.smoothquant, self.kind)
        if not isinstance(self.rotation, bool):
            raise ConfigurationError(f"rotation={self.rotation!r} is not valid: use True or False.")
        check_runtime(self.runtime, self.mode, self.backend, self.kind)
        self._check_scheme()
        self._check_overrides()
        for name in ("include", "exclude"):
            globs = getattr(self, name)
            if isinstance(globs, str) or not all(isinstance(glob, str) and glob for glob in globs):
                raise ConfigurationError(
                    f"{name}={globs!r} is not valid: give a list of globs of module names, like ['head.*']."
                )

    def _check_scheme(self) -> None:
        scheme = self.scheme
        if scheme.weight_granularity == "per_group" and self.kind not in ("weight_only", "dynamic"):
            raise ConfigurationError(
                "scheme.weight_granularity='per_group' needs kind='weight_only' or kind='dynamic', and this is "
                f"kind={self.kind!r}: use 'per_channel' or 'per_tensor'."
            )
        if scheme.activation_granularity == "per_token" and self.kind in ("qat", "static"):
            raise ConfigurationError(
                "scheme.activation_granularity='per_token' computes ranges in each call, which needs kind='dynamic', "
                f"and this is kind={self.kind!r}: use kind='dynamic', or 'per_tensor'."
            )
        if self.quantizer is not None and scheme.activation_bits == 16:
            raise ConfigurationError(
                f"scheme.activation_bits=16 is not supported with backend={self.backend!r}, whose quantizer sets the "
                "bits of activations: leave it out, and configure the quantizer for torch.int16."
            )
        if self.kind == "qat" and scheme.activation_observer in CALIBRATION_ONLY:
            raise ConfigurationError(
                f"scheme.activation_observer={scheme.activation_observer!r} takes too long for every step of a "
                "training, and is for calibration (PostTrainingQuantization): use 'histogram_mse', 'percentile', "
                "'moving_average' or 'min_max' to train."
            )
        if self.kind != "qat" and scheme.learned:
            raise ConfigurationError(
                f"scheme.learned_step={scheme.learned_step!r} needs fixed activation ranges and training: use "
                "QuantizationAwareTraining with kind='static', its default, or learned_step='none'."
            )

    def _check_overrides(self) -> None:
        """Check each override as if all layers had it, and what only overrides can get wrong."""
        for pattern, scheme in self.scheme.own():
            try:
                replace(self, scheme=scheme)
                self._check_override(scheme)
            except ConfigurationError as error:
                raise type(error)(f"In scheme.overrides[{pattern!r}]: {error}") from error

    def _check_override(self, own: Scheme) -> None:
        whole = self.scheme
        finer = own.weight_bits > whole.weight_bits or own.activation_bits > whole.activation_bits
        if self.target.own_grids and finer:
            raise ConfigurationError(
                f"backend={self.backend!r} defines its own grids, and overrides can only make them coarser than the "
                "scheme: give the scheme more bits, and overrides fewer."
            )
        if self.mode == "pt2e" and own.weight_granularity == "per_channel" != whole.weight_granularity:
            raise ConfigurationError(
                "in mode='pt2e' the quantizer decides which channels have scales: use "
                "scheme.weight_granularity='per_channel', and 'per_tensor' in overrides."
            )

    def of(self, name: str) -> Recipe:
        """The recipe of one layer: with its own scheme, and no overrides.

        Args:
            name: Name of the layer in the LightningModule.

        Example:
            >>> Recipe("fx", "x86", Scheme(overrides={"net.head": {"weight_bits": 4}})).of("net.head").weight_limits
            (-7, 7)
        """
        return replace(self, scheme=self.scheme.of(name)) if self.scheme.overrides else self

    @property
    def each(self) -> tuple[Recipe, ...]:
        """The recipe itself, and one for each scheme in ``scheme.overrides``."""
        return self, *(replace(self, scheme=scheme) for _, scheme in self.scheme.own())

    @property
    def simulated(self) -> str:
        """Why no kernel of the backend can run this scheme; empty if one can.

        Always empty for dynamic and weight-only networks, whose activations are not on the scheme's grid.

        Example:
            >>> Recipe("fx", "x86", Scheme(activation_bits=4)).simulated
            'int8 kernels support activations of 8 bits, and these have 4'
        """
        if self.kind not in ("qat", "static"):
            return ""
        for pattern, scheme in self.scheme.own():
            reason = replace(self, scheme=scheme).simulated
            if reason:
                return f"{reason} (scheme.overrides[{pattern!r}])"
        if self.scheme.activation_bits < 8:
            return f"int8 kernels support activations of 8 bits, and these have {self.scheme.activation_bits}"
        if self.scheme.activation_bits not in self.target.activation_bits:
            return f"the kernels of backend {self.target.name!r} support activations of 8 bits, and these have 16"
        if not self.scheme.weight_symmetric:
            return f"the int8 kernels of backend {self.target.name!r} support symmetric weights only"
        return ""

    @property
    def by_token_or_group(self) -> bool:
        """Whether grids are per token or per group: without a kernel in PyTorch, they run in layers of our own."""
        scheme = self.scheme
        return self.kind == "dynamic" and (
            scheme.activation_granularity == "per_token" or scheme.weight_granularity == "per_group"
        )

    @property
    def activation_observer(self) -> str:
        """The observer of activations: ``"auto"`` resolved, and in training histograms of single batches."""
        name, trains = self.scheme.activation_observer, self.kind == "qat"
        if name == "auto":
            return "moving_average" if trains else "histogram_mse"
        return _OF_BATCHES.get(name, name) if trains else name

    @property
    def activation_limits(self) -> tuple[int, int]:
        """Smallest and largest integer of an activation: the backend's, or those of fewer bits."""
        low, _ = self.target.activation_limits
        bits = self.scheme.activation_bits
        return (0, 2**bits - 1) if low == 0 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    @property
    def weight_limits(self) -> tuple[int, int]:
        """Smallest and largest integer of a weight."""
        if self.scheme.weight_symmetric:
            return -self.weight_quant_max, self.weight_quant_max
        half = 2 ** (self.scheme.weight_bits - 1)
        return -half, half - 1

    @property
    def detour(self) -> str:
        """How this CPU computes what the backend's kernels would, if they overflow on it; empty otherwise."""
        packs = traits_of(self.mode).packs and self.runtime is None
        fits = not self.scheme.overrides and self.weight_quant_max <= LARGEST_EXACT_WEIGHT
        return "" if fits or self.kind == "weight_only" else detour(self.target.engine, packs=packs)

    @property
    def target(self) -> Backend:
        """The row of the backend."""
        return get_backend(self.backend, self.mode)

    @property
    def weight_quant_max(self) -> int:
        """The largest integer of a symmetric weight; the smallest is its negative."""
        return min(self.scheme.weight_quant_max, self.target.weight_limit)

    def selects(self, name: str) -> bool:
        """Whether the module ``name`` is to be quantized.

        True if it or a parent is included, none of them is excluded, and the scheme's overrides do not leave it float.
        """
        if any(left in lineage(name) for left, _ in self.left_float) or self.scheme.leaves_float(name):
            return False
        return self.chooses(name)

    def chooses(self, name: str) -> bool:
        """Whether ``include`` and ``exclude`` select a module."""
        if any(matches(glob, name) for glob in self.exclude):
            return False
        return not self.include or any(matches(glob, name) for glob in self.include)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {
            "format": FORMAT,
            "mode": self.mode,
            "backend": self.backend,
            "scheme": self.scheme.to_dict(),
            "include": list(self.include),
            "exclude": list(self.exclude),
            "kind": self.kind,
            "equalization": self.equalization,
            "batchnorm": self.batchnorm,
            "trained": self.trained,
            "smoothquant": self.smoothquant,
            "rotation": self.rotation,
            "adapters": self.adapters,
            "left_float": [list(pair) for pair in self.left_float],
            "families": list(self.families),
            "runtime": self.runtime,
            "quantizer": None if self.quantizer is None else self.quantizer.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Inverse of `to_dict`."""
        if values.get("format") != FORMAT:
            raise CheckpointMismatchError(
                f"This file has format {values.get('format')!r}; this release of qat-lightning reads format {FORMAT}."
            )
        return cls(
            mode=values["mode"],
            backend=values["backend"],
            scheme=Scheme(**values["scheme"]),
            include=tuple(values["include"]),
            exclude=tuple(values["exclude"]),
            kind=values.get("kind", "qat"),
            equalization=values.get("equalization", "none"),
            batchnorm=values.get("batchnorm", "fused"),
            trained=bool(values.get("trained", False)),
            adapters=values.get("adapters", "merged"),
            left_float=tuple((str(name), str(why)) for name, why in values.get("left_float", ())),
            families=tuple(str(name) for name in values.get("families", ())),
            smoothquant=values.get("smoothquant"),
            rotation=bool(values.get("rotation", False)),
            runtime=values.get("runtime"),
            quantizer=QuantizerSource.from_dict(values["quantizer"]) if values.get("quantizer") else None,
        )

    def differences(self, other: Recipe) -> list[str]:
        """The fields in which two recipes differ, with both values."""
        ours = _differences(self, other, leave_out=("scheme", "left_float", "families", "runtime"))
        return [*ours, *_differences(self.scheme, other.scheme, "scheme.")]


_OF_BATCHES = {"histogram_mse": "batch_mse", "percentile": "batch_percentile"}
"""The sources of ranges that training uses in place of a histogram of all batches."""


def _differences(one: Any, other: Any, prefix: str = "", *, leave_out: Sequence[str] = ()) -> list[str]:
    return [
        f"{prefix}{f.name}: {getattr(one, f.name)!r} here, {getattr(other, f.name)!r} there"
        for f in fields(one)
        if f.name not in leave_out and getattr(one, f.name) != getattr(other, f.name)
    ]


def check_smoothquant(value: Any, kind: str = "qat") -> None:
    """Reject a value that is not a migration strength of SmoothQuant, and a kind that does not use it.

    Raises:
        ConfigurationError: It is neither None nor a number from 0 to 1.
        CombinationError: Activations stay float in this kind.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (number and 0 <= value <= 1):
        raise ConfigurationError(
            f"smoothquant={value!r} is not valid: give a number from 0 (all stays in the activations) to 1 (all "
            "goes into the weights), such as 0.5, or None to leave it out."
        )
    if value is not None and kind == "weight_only":
        raise CombinationError(
            f"smoothquant={value!r} makes activations easier to quantize, and kind='weight_only' leaves them float: "
            "use smoothquant=None, or kind='dynamic' or 'static'."
        )


def check_globs(recipe: Recipe, names: Sequence[str]) -> None:
    """Reject a glob that matches no module: with a typing error, a layer would be quantized that should stay float.

    Raises:
        ConfigurationError: A glob matches nothing; the message lists names that exist.
    """
    for kind in ("include", "exclude"):
        for glob in getattr(recipe, kind):
            if not any(matches(glob, name) for name in names):
                some = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
                meant = next((name for name in names if fnmatchcase(name, f"*.{glob}")), None)
                hint = f" Did you mean {meant!r}?" if meant else ""
                raise ConfigurationError(f"{kind}={glob!r} matches no module: the network has {some}.{hint}")
