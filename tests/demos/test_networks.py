"""The demos' networks: shapes, and capture by the graph modes."""

from typing import Any

import pytest
import torch
from torch import nn

from qat_lightning.demos import (
    BagOfTokens,
    ClassificationModule,
    RecurrentClassifier,
    ResNet20,
    SmallMobileNet,
    SmallViT,
)
from qat_lightning.errors import ConfigurationError

NETWORKS: list[tuple[type[nn.Module], dict[str, Any], tuple[int, int]]] = [
    (SmallMobileNet, {}, (1, 8)),
    (SmallMobileNet, {"in_channels": 3, "strides": [1, 2, 2], "num_classes": 7}, (3, 32)),
    (ResNet20, {"in_channels": 1}, (1, 28)),
    (ResNet20, {}, (3, 32)),
    (SmallViT, {"in_channels": 1, "image_size": 8, "patch_size": 2}, (1, 8)),
    (SmallViT, {}, (3, 32)),
    (RecurrentClassifier, {"num_classes": 10}, (1, 8)),
    (RecurrentClassifier, {"num_classes": 7, "in_channels": 3, "cell": "gru", "bidirectional": True}, (3, 8)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("network", "settings", "shape"), NETWORKS)
def test_a_network_scores_classes_and_can_be_captured(
    network: type[nn.Module], settings: dict[str, Any], shape: tuple[int, int]
) -> None:
    net = network(**settings).eval()
    images = torch.randn(2, shape[0], shape[1], shape[1])
    scores = net(images)
    assert scores.shape == (2, settings.get("num_classes", 10))
    torch.testing.assert_close(torch.fx.symbolic_trace(net)(images), scores)
    batch = ({0: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(net, (images,), dynamic_shapes=batch, strict=True).module()
    torch.testing.assert_close(exported(images[:1]), scores[:1])


def test_a_bag_scores_classes_and_can_be_captured() -> None:
    net, tokens = BagOfTokens(num_tokens=50, num_classes=7).eval(), torch.randint(0, 50, (3, 6))
    assert net(tokens).shape == (3, 7)
    torch.testing.assert_close(torch.fx.symbolic_trace(net)(tokens), net(tokens))


def test_a_block_of_resnet20_uses_one_relu_module_twice() -> None:
    block = ResNet20().layers[0]
    uses = [node for node in torch.fx.symbolic_trace(block).graph.nodes if node.target == "relu"]
    assert len(uses) == 2


def test_every_parameter_is_optimized_once() -> None:
    module = ClassificationModule(SmallMobileNet(), num_classes=10, scheduler="constant")
    groups = module.configure_optimizers().param_groups
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(id(p) for p in module.parameters())


def test_an_unknown_scheduler_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match="cosine, constant"):
        ClassificationModule(SmallMobileNet(), num_classes=10, scheduler="step")  # type: ignore[arg-type]
