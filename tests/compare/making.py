"""Runs for comparisons, created by hand."""

from typing import Any

from qat_lightning.compare import Run


def qat(mode: str, seed: int = 0, acc: float = 0.97, latency: float = 2.0, size: float = 1.0, **more: Any) -> Run:
    """A run of train.py with an int8 network."""
    metrics = {
        "float/test/acc": 0.9,
        "fake_quant/test/acc": acc,
        "int8/test/acc": acc,
        "int8/test/loss": 1 - acc,
        "int8/latency_ms": latency,
        "int8/size_mb": size,
        "float/latency_ms": 4.0,
        "float/size_mb": 4.0,
        "speedup": 4.0 / latency,
        "int8/agreement": 1.0,
    }
    quantization = {"_target_": "qat_lightning.QuantizationAwareTraining", "mode": mode, "backend": "x86", "start": 0.3}
    config = configuration("qat", seed, mode={"name": mode}, quantization=quantization)
    overrides = ("method=qat", f"mode={mode}", f"seed={seed}")
    made = {"name": f"qat-{mode}", "folder": f"out/{mode}-{seed}", "config": config, "metrics": metrics}
    return Run(**{**made, "overrides": overrides, **more})


def plain(seed: int = 0, acc: float = 0.98, **more: Any) -> Run:
    """A float run of train.py."""
    metrics = {"float/test/acc": acc, "float/latency_ms": 4.0, "float/size_mb": 4.0}
    config = configuration("float", seed, mode={"name": "fx"})
    made = {"name": "float", "folder": f"out/float-{seed}", "config": config, "metrics": metrics}
    return Run(**{**made, "overrides": ("method=float", f"seed={seed}"), **more})


def configuration(method: str, seed: int, **groups: Any) -> dict[str, Any]:
    return {
        "seed": seed,
        "method": {"name": method},
        "data": {"name": "digits", "datamodule": {"seed": seed, "batch_size": 64}},
        "trainer": {"max_epochs": 6, "default_root_dir": f"out/{method}-{seed}"},
        "paths": {"output_dir": f"out/{method}-{seed}"},
        "float_checkpoint": None,
        **groups,
    }
