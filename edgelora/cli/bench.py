"""`edgelora bench`."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from edgelora.bench import bench as run_bench
from edgelora.cli.console import out
from edgelora.cli.parameters import (
    WeightedName,
    chosen_adapter,
    json_option,
    threads_option,
    unique,
)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--adapter",
    "adapters",
    type=WeightedName(),
    multiple=True,
    help="Measure with it active; repeat for a weighted sum.",
)
@click.option(
    "--load",
    "loaded",
    multiple=True,
    help="Keep this adapter in memory, not active; repeat for more.",
)
@threads_option
@click.option(
    "--prompt-tokens",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Length of the prefill.",
)
@click.option(
    "--new-tokens",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Decoded after the first token.",
)
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Runs whose median counts.",
)
@json_option
def bench(
    bundle: Path,
    adapters: tuple[tuple[str, float], ...],
    loaded: tuple[str, ...],
    threads: int,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    *,
    as_json: bool,
) -> None:
    """Measures prefill, decode, time to first token, load, switch and memory on this machine.

    \b
    Example:  edgelora bench smollm2 --threads 2 --json
    """
    result = run_bench(
        bundle,
        adapter=chosen_adapter(unique(adapters, "--adapter")),
        loaded=loaded,
        threads=threads,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
    )
    if as_json:
        out.print_json(json.dumps(asdict(result)))
        return
    for name, value in asdict(result).items():
        out.print(f"{name:28}{value:.1f}" if isinstance(value, float) else f"{name:28}{value}")
