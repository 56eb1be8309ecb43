"""The repeated blocks of a network, such as those of a transformer."""

from __future__ import annotations

from torch import nn

from qat_lightning.errors import ConfigurationError


def repeated_blocks(network: nn.Module) -> tuple[str, ...]:
    """The names of the blocks of which a network has the most.

    They are the children of the ``nn.ModuleList`` (or ``nn.Sequential`` of two and more) with the most parameters whose
    children are all of one class and have layers in them.

    Args:
        network: A float network.

    Returns:
        Names relative to the network, in their order.

    Raises:
        ConfigurationError: There is no such list.

    Example:
        >>> blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2) for _ in range(2))
        >>> repeated_blocks(nn.ModuleDict({"blocks": blocks, "head": nn.Linear(8, 2)}))
        ('blocks.0', 'blocks.1')
    """
    lists = {name: module for name, module in network.named_modules() if _is_list_of_blocks(module)}
    if not lists:
        raise ConfigurationError(
            f"features='blocks' finds no list of repeated blocks in {type(network).__name__} (an nn.ModuleList, or an "
            "nn.Sequential, of modules of one class): name the modules to compare, features=[...]."
        )
    largest = max(lists, key=lambda name: sum(parameter.numel() for parameter in lists[name].parameters()))
    return tuple(f"{largest}.{name}" if largest else name for name, _ in lists[largest].named_children())


def _is_list_of_blocks(module: nn.Module) -> bool:
    children = list(module.children())
    least = {nn.ModuleList: 1, nn.Sequential: 2}.get(type(module))
    if least is None or len(children) < least:
        return False
    return len({type(child) for child in children}) == 1 and all(_has_layers(child) for child in children)


def _has_layers(block: nn.Module) -> bool:
    return any(True for _ in block.children()) and any(True for _ in block.parameters())
