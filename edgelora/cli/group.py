"""The command group, its error boundary, and what the commands share in parsing."""

import importlib
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from edgelora.errors import EdgeLoraError

COMMANDS = {  # command → module of edgelora.cli that defines it
    "add-adapter": "export",
    "bench": "bench",
    "chat": "run",
    "completion": "completion",
    "demo": "demo",
    "devices": "devices",
    "export": "export",
    "inspect": "inspect",
    "run": "run",
    "verify": "inspect",
}

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class LazyGroup(click.Group):
    """Imports a command's module only when it is used: `run` must not need what `export` needs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"edgelora.cli.{COMMANDS[cmd_name]}")
        command = getattr(module, cmd_name.replace("-", "_"))
        assert isinstance(command, click.Command)
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="edgelora")
def cli() -> None:
    """Fine-tuned language models on small devices.

    \b
    edgelora export SmolLM2.gguf -o bundle --adapter pirate=adapters/pirate
    edgelora run bundle --prompt "What is the sea?" --adapter pirate
    """


def main() -> None:
    """Entry point: exit code 0 done, 1 bad input or a failed check (one line), 2 usage."""
    try:
        cli.main(standalone_mode=False)
    except EdgeLoraError as error:
        _fail(f"error: {error}", 1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted", 130)
    except ModuleNotFoundError as error:
        _fail(f"error: this command needs {error.name}: pip install 'edgelora[export]'", 1)
    except BrokenPipeError:
        sys.exit(141)


def _fail(line: str, code: int) -> None:
    err.print(line, markup=False)
    sys.exit(code)


class NamedPath(click.ParamType[tuple[str, Path]]):
    """NAME=PATH."""

    name = "name=path"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Path]:
        name, sign, path = str(value).partition("=")
        if not (name and sign and path):
            self.fail(f"{value!r} is not NAME=PATH", param, ctx)
        return name, Path(path)


class WeightedName(click.ParamType[tuple[str, float]]):
    """NAME or NAME:WEIGHT."""

    name = "name[:weight]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, float]:
        name, _, weight = str(value).partition(":")
        try:
            return name, float(weight or 1.0)
        except ValueError:
            self.fail(f"{value!r}: the weight is not a number", param, ctx)


def unique(pairs: tuple[tuple[str, Any], ...], option: str) -> dict[str, Any]:
    """The pairs as a dict; a name given twice is a usage error."""
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise click.UsageError(f"{option} {', '.join(twice)} given twice")
    return dict(pairs)
