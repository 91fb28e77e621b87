"""`edgelora compose`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelora.cli.console import err, out
from edgelora.cli.parameters import WeightedPath, json_option, unique
from edgelora.cli.progress import late_bar
from edgelora.composition.options import MAJORITY_SIGNS, METHODS

if TYPE_CHECKING:
    from edgelora.composing import ComposeReport

MEGABYTE = 1e6


@click.command()
@click.argument(
    "adapters",
    type=WeightedPath(),
    nargs=-1,
    required=True,
    metavar="ADAPTER[:WEIGHT]...",
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="PEFT folder to make.",
)
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="cat",
    show_default=True,
    help="PEFT's combination_type; all but linear, cat and svd need edgelora[compose].",
)
@click.option(
    "--rank",
    type=click.IntRange(1),
    help="Of svd and …_svd.  [default: the largest of the adapters]",
)
@click.option(
    "--density",
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of the values that ties, dare and magnitude_prune keep.",
)
@click.option(
    "--majority-sign",
    type=click.Choice(MAJORITY_SIGNS),
    help="ties: signs counted by value or by number.  [default: total]",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**64 - 1),
    help="dare: as torch.manual_seed before PEFT.  [default: 0]",
)
@click.option("--force", is_flag=True, help="Replace an existing PEFT folder.")
@json_option
def compose(
    adapters: tuple[tuple[str, float], ...],
    output: Path,
    *,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Composes PEFT LoRA folders into one, weighted (1 if no weight is given; below 0 subtracts).

    The results are those of PEFT's add_weighted_adapter. Of the methods only cat equals the
    weighted sum of `run --adapter A:0.6 --adapter B:0.4` (its rank is the sum of the ranks), and
    svd comes as close as its rank allows; linear averages the factors A and B apart, each with the
    root of its weight.

    \b
    Example:
      edgelora compose adapters/pirate:0.6 adapters/butler:0.4 --method svd -o both
      edgelora export base -o bundle --adapter both=both
    """
    from edgelora.composing import compose as run_compose

    with late_bar("targets") as progress:
        report = run_compose(
            unique(adapters, "ADAPTER"), output, force=force, progress=progress, **options
        )
    _show(report, as_json=as_json)


def _show(report: "ComposeReport", *, as_json: bool) -> None:
    for warning in report.warnings:
        err.print(f"warning: {warning}")
    if as_json:
        out.print_json(json.dumps(asdict(report) | {"folder": str(report.folder)}))
        return
    count = len(report.adapters)
    out.print(
        f"{report.folder}: {count} adapter{'s' if count > 1 else ''}, {report.method}, "
        f"rank {report.rank}, {report.targets} targets, {report.size / MEGABYTE:.1f} MB"
    )
