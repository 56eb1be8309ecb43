"""First import of torchao, with which our FakeQuantizes are registered.

Suppresses its warning about CUDA extensions, which a CPU machine does not need.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from qat_lightning.numerics.derived import DerivedFakeQuantize
from qat_lightning.numerics.fake_quantize import FakeQuantize


@contextmanager
def _errors_only(*names: str) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


with _errors_only("torchao", "torch.utils._pytree"):
    from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase

FakeQuantizeBase.register(FakeQuantize)
FakeQuantizeBase.register(DerivedFakeQuantize)
