"""First import of torchao, with which our FakeQuantizes are registered.

Suppresses its warning about CUDA extensions, which a CPU machine does not need.
"""

from qat_lightning.numerics.derived import DerivedFakeQuantize
from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.terminal import errors_only

with errors_only("torchao", "torch.utils._pytree"):
    from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase

FakeQuantizeBase.register(FakeQuantize)
FakeQuantizeBase.register(DerivedFakeQuantize)
