"""How a network is quantized, as a value that a rung changes and a file stores."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from qat_lightning.settings.recipe import Equalization
from qat_lightning.settings.scheme import CALIBRATION_ONLY, Scheme

PostTrainingKind = Literal["static", "dynamic", "weight_only"]


@dataclass(frozen=True)
class Plan:
    """How one int8 network is created.

    Attributes:
        mode: As for `qat_lightning.PostTrainingQuantization`, like everything down to ``sequential_mse``.
        backend: As there.
        kind: As there.
        scheme: As there.
        include: As there.
        exclude: As there.
        equalization: As there.
        smoothquant: As there.
        rotation: As there.
        bias_correction: As there.
        adaround: Iterations for each layer or block; 0 for rounding to nearest.
        adaround_blocks: Whether AdaRound learns the layers of a block together.
        sequential_mse: As there.
        epochs: Epochs of quantization-aware training; 0 for none.
        distillation: Whether the training also learns from the float network.
        file: The shipped format, one of `qat_lightning.export.formats.FORMATS`; empty for the int8 network in PyTorch.

    Example:
        >>> Plan.from_dict(Plan(epochs=2, exclude=("net.head",)).to_dict()) == Plan(epochs=2, exclude=("net.head",))
        True
    """

    mode: str = "fx"
    backend: str = "x86"
    kind: PostTrainingKind = "static"
    scheme: Scheme = field(default_factory=Scheme)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    equalization: Equalization = "none"
    smoothquant: float | None = None
    rotation: bool = False
    bias_correction: bool = False
    adaround: int = 0
    adaround_blocks: bool = False
    sequential_mse: bool = False
    epochs: int = 0
    distillation: bool = False
    file: str = ""

    def trained(self, epochs: int, *, distillation: bool = True) -> Plan:
        """The same plan with quantization-aware training instead of recipes that need calibration.

        The observer of the calibration is also used in training, if training supports it.
        """
        scheme = self.scheme
        if scheme.activation_observer in CALIBRATION_ONLY:
            scheme = replace(scheme, activation_observer="auto")
        return replace(self.without_recipes(), scheme=scheme, epochs=epochs, distillation=distillation)

    def without_recipes(self) -> Plan:
        """The same plan without the recipes that need calibration data."""
        return replace(self, bias_correction=False, adaround=0, adaround_blocks=False, sequential_mse=False)

    def words(self, start: Plan | None = None) -> str:
        """The plan in one line.

        Args:
            start: A plan whose settings are left out.

        Example:
            >>> Plan(bias_correction=True, file="onnx").words()
            'fx x86, static, bias correction, as onnx'
            >>> Plan(bias_correction=True, file="onnx").words(Plan())
            'bias correction, as onnx'
        """
        common = () if start is None or start == self else start._parts()
        return ", ".join(part for part in self._parts() if part not in common)

    def _parts(self) -> tuple[str, ...]:
        scheme = self.scheme
        bits = f"{scheme.weight_bits}-bit weights" if scheme.weight_bits != Scheme().weight_bits else ""
        own = len(scheme.overrides or {})
        observer = scheme.activation_observer
        taught = " from the float network" if self.distillation else ""
        epochs = f"trained {self.epochs} epoch{'' if self.epochs == 1 else 's'}{taught}" if self.epochs else ""
        count = len(self.exclude)
        by_blocks = " by blocks" if self.adaround_blocks else ""
        parts = (
            f"{self.mode} {self.backend}",
            self.kind,
            bits,
            f"{own} layer{'' if own == 1 else 's'} otherwise" if own else "",
            f"observer {observer}" if observer != "auto" else "",
            f"equalization {self.equalization}" if self.equalization != "none" else "",
            f"SmoothQuant {self.smoothquant:g}" if self.smoothquant is not None else "",
            "rotation" if self.rotation else "",
            "bias correction" if self.bias_correction else "",
            "sequential MSE" if self.sequential_mse else "",
            f"AdaRound {self.adaround} iterations{by_blocks}" if self.adaround else "",
            f"{count} layer{'' if count == 1 else 's'} float" if count else "",
            epochs,
            f"as {self.file}" if self.file else "",
        )
        return tuple(part for part in parts if part)

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self) | {"include": list(self.include), "exclude": list(self.exclude)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        """Undo `to_dict`."""
        globs = {name: tuple(values[name]) for name in ("include", "exclude")}
        return cls(**{**values, **globs, "scheme": Scheme(**values["scheme"])})
