"""Lightning callbacks: life cycle only; the quantization itself is in `qat_lightning.modes`."""
