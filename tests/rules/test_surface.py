"""The commands and options that people rely on. A change is a decision: docs/cli.md and the changelog change too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from shoal.cli.app import app
from shoal.cli.main import load_commands

SURFACE = {
    "shoal": "--version --install-completion --show-completion",
    "shoal quickstart": "--seed --honest --tokens --files --runs --json",
    "shoal up": "--nodes --speeds --threads --json",
    "shoal down": "--json",
    "shoal train": "[JOB.YAML] --hub --runs --resume --replace --detach --dry-run --budget --bought --ledger "
    "--prompt --listen --fields --json",
    "shoal attach": "RUN --hub --listen --json",
    "shoal plan": "JOB.YAML --hub --deadline --json",
    "shoal jobs": "",
    "shoal jobs list": "--runs --json",
    "shoal jobs show": "RUN --json",
    "shoal jobs fund": "RUN AMOUNT --ledger --json",
    "shoal jobs cancel": "RUN --ledger --json",
    "shoal report": "RUN --json",
    "shoal replay": "RUN --round -r --node -n --threads --device --script --hub --listen --json",
    "shoal serve": "MODEL --name --http --api-keys --threads --device --hub --here --listen --sessions "
    "--guess --no-guess --draft --engine-model --engines-only --token-time --budget --ledger --data "
    "--json",
    "shoal chat": "[MODEL] [QUESTION] --url --system --temperature --max-tokens --seed --key-file --hub --here --json",
    "shoal receipts": "[DIR] --json",
    "shoal hub": "--listen --http --data --name --public --json",
    "shoal node": "",
    "shoal node start": "--hub --name --max-speed --threads --device --processes --listen --storage --memory --price "
    "--currency --account --ledger --notice --drive --serve-free --country --region --data "
    "--engine --engine-model --engine-key --engine-only --json",
    "shoal node stop": "--data --json",
    "shoal node earnings": "--data --ledger --json",
    "shoal account": "",
    "shoal account create": "--ledger --json",
    "shoal account balance": "--ledger --json",
    "shoal account deposit": "AMOUNT --ledger --json",
    "shoal account withdraw": "AMOUNT --to --number --ledger --json",
    "shoal account bond": "AMOUNT [NODE] --notice --data --ledger --json",
    "shoal account unbond": "BOND --ledger --json",
    "shoal account slash": "HOLD_A HOLD_B --ledger --json",
    "shoal account statement": "--limit --ledger --json",
    "shoal account export": "FILE --ledger --json",
    "shoal account verify": "[FILE] --ledger --json",
    "shoal ledger": "",
    "shoal ledger start": "--listen --currency --database --fee --mint-max --public --data --json",
    "shoal ledger deposit": "ACCOUNT AMOUNT --reference --data --json",
    "shoal offers": "--hub --device --device-name --memory --flops --memory-rate --bandwidth --latency --country "
    "--without-country --region --without-region --tier --reputation --notice --max-price --currency --idle --nodes "
    "--together --within --sort --limit --json",
    "shoal market": "",
    "shoal market run": "--listen --every --public --ledger --data --json",
    "shoal market sell": "--hour --price --class --account --auction --ledger --hub --data --json",
    "shoal market buy": "--class --hour --price --blocks --auction --ledger --json",
    "shoal market resell": "--hour --price --class --blocks --auction --json",
    "shoal market show": "[NUMBER] --save --auction --json",
    "shoal market mine": "--last --auction --ledger --hub --data --json",
    "shoal market compare": "BATCH_A BATCH_B --json",
    "shoal market verify": "BATCH --order --json",
}
HIDDEN = {
    "shoal serve": {"--with-parent"},
    "shoal hub": {"--with-parent"},
    "shoal ledger start": {"--with-parent"},
    "shoal market run": {"--with-parent"},
    "shoal node start": {"--with-parent", "--dishonest"},
}
"""For the processes that Shoal starts itself, and for trying its defences."""


def commands() -> Iterator[tuple[str, Any]]:
    load_commands()

    def below(command: Any, path: str) -> Iterator[tuple[str, Any]]:
        yield path, command
        for name in getattr(command, "commands", {}):
            yield from below(command.commands[name], f"{path} {name}")

    return below(get_command(app), "shoal")


def words(parameter: Any) -> list[str]:
    """What is written for a parameter: its flags, or its metavar."""
    if parameter.param_type_name == "argument":
        return [parameter.metavar if parameter.required else f"[{parameter.metavar}]"]
    return [*parameter.opts, *parameter.secondary_opts]


def test_commands_and_options_are_those_that_were_decided() -> None:
    found = {
        path: " ".join(word for one in command.params if not getattr(one, "hidden", False) for word in words(one))
        for path, command in commands()
    }
    assert found == SURFACE


def test_what_is_hidden_is_hidden_for_a_reason() -> None:
    found = {
        path: {word for one in command.params if getattr(one, "hidden", False) for word in words(one)}
        for path, command in commands()
    }
    assert {path: names for path, names in found.items() if names} == HIDDEN


def test_every_command_that_prints_data_has_json() -> None:
    groups = {"shoal", "shoal jobs", "shoal node", "shoal account", "shoal ledger", "shoal market"}
    assert [path for path, options in SURFACE.items() if path not in groups and "--json" not in options.split()] == []


def test_every_command_and_option_says_what_it_is() -> None:
    mute = [path for path, command in commands() if not command.help]
    mute += [
        f"{path} {one.name}"
        for path, command in commands()
        for one in command.params
        if not getattr(one, "hidden", False) and not one.help
    ]
    assert mute == []


@pytest.mark.parametrize("path", SURFACE)
def test_help_shows_no_value_for_what_takes_none(path: str) -> None:
    load_commands()
    shown = CliRunner().invoke(app, [*path.split()[1:], "--help"]).output
    assert "--help" in shown and "bool" not in shown.lower()
