"""Modules that were given to ``torch.compile``: what they run, and running it uncompiled under the same names."""

from __future__ import annotations

from typing import Any

from torch import nn

_INSIDE = "_orig_mod"
"""Name under which ``torch.compile`` holds the module that it was given; it is part of the keys of a state_dict."""

_CALL = "_compiled_call_impl"
"""What a call of a module runs after ``module.compile()``."""


class Uncompiled(nn.Module):
    """Runs the module inside as it is, and otherwise behaves like the compiled module that it was.

    `uncompile` makes it of a compiled module. ``torch.compile`` takes it for one, and compiles the module inside.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module inside."""
        return self._orig_mod(*args, **kwargs)

    @property
    def _torchdynamo_orig_callable(self) -> nn.Module:
        """What ``torch.compile`` compiles if it is given a compiled module with the id below."""
        inside: nn.Module = self._orig_mod
        return inside

    @property
    def _torchdynamo_wrapper_id(self) -> int:
        return id(self)

    def __getattr__(self, name: str) -> Any:
        inside = self.__dict__.get("_modules", {}).get(_INSIDE)
        if inside is None or name == _INSIDE:
            return super().__getattr__(name)
        return getattr(inside, name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = name in (_INSIDE, "training") or hasattr(type(self), name)
        (super().__setattr__ if own else self._orig_mod.__setattr__)(name, value)


def _is_wrapper(module: nn.Module) -> bool:
    # By name: importing torch._dynamo, which defines the class, takes seconds.
    return type(module).__name__ == "OptimizedModule"


def uncompile(module: nn.Module) -> bool:
    """Let a module run uncompiled, if it was compiled by ``torch.compile(module)`` or ``module.compile()``.

    Modules inside are left as they are. Names, keys of the ``state_dict`` and parameters stay the same.

    Args:
        module: Changed in place.

    Returns:
        Whether it was compiled.

    Example:
        >>> linear = nn.Linear(2, 1)
        >>> linear.compile()
        >>> uncompile(linear), uncompile(linear)
        (True, False)
    """
    wrapper, call = _is_wrapper(module), module.__dict__.get(_CALL)
    if wrapper:
        training = module.training
        of_any_module = vars(nn.Module())
        module.__dict__ = {name: value for name, value in vars(module).items() if name in of_any_module}
        module.__class__ = Uncompiled
        module.training = training
    if hasattr(call, "_torchdynamo_orig_callable"):
        module.__dict__.pop(_CALL, None)
        return True
    return wrapper


def name_inside(root: nn.Module, name: str) -> str:
    """The name of what runs inside if a name leads to a compiled module, or through one.

    Args:
        root: The module that the name begins at.
        name: A dotted name.

    Returns:
        The name under which the module and its parameters are in ``root``; the same if nothing was compiled.
    """
    module, path = root, list[str]()
    for part in name.split("."):
        if not (part == _INSIDE and path[-1:] == [_INSIDE]):
            module = module.get_submodule(part)
            path.append(part)
        while _is_wrapper(module) or isinstance(module, Uncompiled):
            module = module.get_submodule(_INSIDE)
            path.append(_INSIDE)
    return ".".join(path)
