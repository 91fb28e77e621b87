"""Where the commands print."""

from collections.abc import Sequence

from rich.console import Console

# Texts of users and files are printed as they are: "[x]" is no markup, ":x:" no emoji.
out = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
err = Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)


def show_error(line: str) -> None:
    """One line on standard error, whatever is in it."""
    err.print("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line))


def show_columns(rows: Sequence[Sequence[str]]) -> None:
    """Aligned, neither cut nor wrapped: a pipe has no width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
        out.print("  ".join(cells).rstrip())
