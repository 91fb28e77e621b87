"""What the commands share in parsing."""

import math
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from edgelora.session import Adapter

threads_option = click.option(
    "--threads", type=click.IntRange(0, 1024), default=0, help="0: one for each performance core."
)
max_tokens_option = click.option(
    "--max-tokens",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Most tokens of an answer.",
)
temperature_option = click.option(
    "--temperature", type=click.FloatRange(0), default=0.0, help="0: greedy."
)
seed_option = click.option(
    "--seed", type=click.IntRange(0, 2**64 - 1), default=0, help="Same seed, same answer."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


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
        try:
            return weighted_name(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class WeightedPath(click.ParamType[tuple[str, float]]):
    """PATH or PATH:WEIGHT; what follows the last colon is a weight unless such a path exists."""

    name = "path[:weight]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, float]:
        text = str(value)
        path, colon, weight = text.rpartition(":")
        if not colon or Path(text).exists():
            return text, 1.0
        if not path:
            self.fail(f"{text!r}: no path", param, ctx)
        try:
            return path, weighted_name(f"x:{weight}")[1]
        except ValueError as error:
            self.fail(str(error).replace("'x:", f"'{path}:", 1), param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="dir")]


def weighted_name(text: str) -> tuple[str, float]:
    """NAME or NAME:WEIGHT. Raises ValueError saying what is wrong."""
    name, colon, weight = text.partition(":")
    if not name:
        raise ValueError(f"{text!r}: no name")
    try:
        number = float(weight) if colon else 1.0
    except ValueError:
        raise ValueError(f"{text!r}: the weight is not a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{text!r}: the weight is not finite")
    return name, number


def chosen_adapter(weights: dict[str, float]) -> Adapter:
    """The base for none, a name for one with weight 1, else the sum."""
    if list(weights.values()) == [1.0]:
        return next(iter(weights))
    return weights or None


def unique(pairs: tuple[tuple[str, Any], ...], option: str) -> dict[str, Any]:
    """The pairs as a dict; a name given twice is a usage error."""
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise click.UsageError(f"{option} {', '.join(twice)} given twice")
    return dict(pairs)
