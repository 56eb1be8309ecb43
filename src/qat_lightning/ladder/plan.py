"""What is quantized how, as a value that a rung changes and a file holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from qat_lightning.settings.recipe import Equalization
from qat_lightning.settings.scheme import CALIBRATION_ONLY, Scheme

PostTrainingKind = Literal["static", "dynamic", "weight_only"]


@dataclass(frozen=True)
class Plan:
    """How one int8 network is made.

    Attributes:
        mode: As for `qat_lightning.PostTrainingQuantization`, as everything down to ``sequential_mse``.
        backend: See there.
        kind: See there.
        scheme: See there.
        include: See there.
        exclude: See there.
        equalization: See there.
        smoothquant: See there.
        rotation: See there.
        bias_correction: See there.
        adaround: Iterations for each layer or block; 0 to round to the nearest.
        adaround_blocks: Whether AdaRound learns the layers of a block together.
        sequential_mse: See there.
        epochs: Of quantization-aware training; 0 for none.
        distillation: Whether it learns from the float network as well.
        file: The format of what is shipped, one of `qat_lightning.export.formats.FORMATS`; empty for the int8 network
            in PyTorch.

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
        """The same with quantization-aware training in the place of what only calibration has.

        An observer that helped calibration also finds the ranges of the training, if training has it.
        """
        scheme = self.scheme
        if scheme.activation_observer in CALIBRATION_ONLY:
            scheme = replace(scheme, activation_observer="auto")
        return replace(self.without_recipes(), scheme=scheme, epochs=epochs, distillation=distillation)

    def without_recipes(self) -> Plan:
        """The same without the recipes that need the data of a calibration."""
        return replace(self, bias_correction=False, adaround=0, adaround_blocks=False, sequential_mse=False)

    def words(self, start: Plan | None = None) -> str:
        """What it does, in a line.

        Args:
            start: Leave out what this one does as well.

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
