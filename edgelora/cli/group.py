"""The command group and its error boundary."""

import importlib
import io
import os
import sys

import click

from edgelora.cli.console import show_error
from edgelora.errors import EdgeLoraError

COMMANDS = {  # command → module of edgelora.cli that defines it
    "add-adapter": "export",
    "bench": "bench",
    "chat": "chat",
    "completion": "completion",
    "compose": "compose",
    "demo": "demo",
    "devices": "devices",
    "eval": "eval",
    "export": "export",
    "inspect": "inspect",
    "run": "run",
    "verify": "inspect",
}


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
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left goes nowhere
        sys.exit(141)
    except OSError as error:
        file = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        _fail(f"error: {file}{error.strerror or error}", 1)
    except MemoryError as error:
        _fail(f"error: not enough memory{f' ({error})' if str(error) else ''}", 1)


def _fail(line: str, code: int) -> None:
    show_error(line)
    sys.exit(code)
