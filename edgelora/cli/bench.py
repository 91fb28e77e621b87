"""`edgelora bench`."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from edgelora.bench import bench as run_bench
from edgelora.cli.group import out


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--adapter", help="Measure with this adapter active.")
@click.option("--threads", type=int, default=0, help="0: one for each performance core.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--new-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def bench(
    bundle: Path,
    adapter: str | None,
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
        adapter=adapter,
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
