"""The command ``qat-lightning``, also as ``python -m qat_lightning``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from typing import Any

GROUP = "quantization"
COMMANDS = {
    "compare": "compare runs: mean over seeds, Pareto front, which run to ship",
    "sensitivity": "rank layers by the accuracy that quantizing them costs",
    "configs": "list what the packaged Hydra group offers",
}


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; each imports only what it needs.

    Args:
        words: The command line; by default that of the process.

    Returns:
        The exit status of the command; 2 for an unknown one.
    """
    options, rest = _split(sys.argv[1:] if words is None else list(words))
    command = _parser().parse_args(options).command
    if command == "compare":
        from qat_lightning.compare.__main__ import main as compare

        return compare(rest)
    if command == "sensitivity":
        from qat_lightning.sensitivity.__main__ import main as sensitivity

        return sensitivity(rest)
    _parser_of_configs().parse_args(rest)
    return _print_configs()


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """Split the command line into the command's own words and those of the subcommand that it names."""
    place = next((number for number, word in enumerate(words, 1) if word in COMMANDS), len(words))
    return words[:place], words[place:]


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:12} {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="qat-lightning",
        description=f"commands:\n{listed}\n\nqat-lightning COMMAND --help shows the options of one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=version("qat-lightning"))
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    return parser


def _parser_of_configs() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog="qat-lightning configs", description=COMMANDS["configs"])


def packaged(name: str) -> dict[str, Any]:
    """The settings of an option of the packaged group, with those that it inherits.

    Args:
        name: The option, such as ``"fx_x86"``.

    Returns:
        The settings as Hydra composes them.

    Example:
        >>> packaged("fx_qnnpack")["backend"], packaged("fx_qnnpack")["_target_"]
        ('qnnpack', 'qat_lightning.QuantizationAwareTraining')
    """
    import yaml

    settings: dict[str, Any] = yaml.safe_load((files("qat_lightning.conf") / GROUP / f"{name}.yaml").read_text())
    inherited = [word for word in settings.pop("defaults", []) if word != "_self_"]
    merged: dict[str, Any] = {}
    for word in inherited:
        merged |= packaged(word)
    return merged | settings


def _print_configs() -> int:
    from qat_lightning.terminal import LiteralTable, console

    table = LiteralTable("option", "callback", "mode", "backend", box=None)
    for path in sorted((files("qat_lightning.conf") / GROUP).iterdir(), key=lambda path: path.name):
        if path.name.endswith(".yaml"):
            name = path.name.removesuffix(".yaml")
            settings = packaged(name)
            table.add_row(name, settings["_target_"].rpartition(".")[2], settings["mode"], settings["backend"])
    console().print(table)
    console().print(
        "\nIn the config of your app:   hydra.searchpath: [pkg://qat_lightning.conf]"
        f"\nOn its command line:         +{GROUP}=fx_x86 {GROUP}.start=0.3"
        f"\nAll settings:                +{GROUP}=qat --cfg job",
        highlight=False,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
