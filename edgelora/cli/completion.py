"""`edgelora completion`: the script that makes a shell complete commands and options."""

import click
from click.shell_completion import get_completion_class

from edgelora.cli.group import cli


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Prints the completion script of a shell.

    \b
    Example:  eval "$(edgelora completion bash)"
    """
    shell_class = get_completion_class(shell)
    assert shell_class is not None
    click.echo(shell_class(cli, {}, "edgelora", "_EDGELORA_COMPLETE").source())
