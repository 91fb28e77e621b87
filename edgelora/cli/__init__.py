"""The `edgelora` command: parse, one library call, print. The only place that prints or exits."""

from edgelora.cli.group import cli, main

__all__ = ["cli", "main"]
