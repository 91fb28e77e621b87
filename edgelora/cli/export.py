"""`edgelora export` and `edgelora add-adapter`.

The converter is imported when a command runs: help must work where it is not installed.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from edgelora.cli.console import err, out
from edgelora.cli.parameters import NamedPath, json_option, unique
from edgelora.cli.progress import stages
from edgelora.plan import (
    BLOCK_SIZES,
    EMBEDDING_FORMATS,
    FLAVORS,
    FORMATS,
    MERGE_BASES,
    MODES,
    QUALITIES,
    ExportOptions,
    Plan,
)

if TYPE_CHECKING:
    from edgelora.exporter import ExportReport

MEGABYTE = 1e6


@click.command()
@click.argument("base", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="BUNDLE",
    help="Folder to make.",
)
@click.option("--adapter", "adapters", type=NamedPath(), multiple=True, help="PEFT folder; repeat.")
@click.option(
    "--mode",
    type=click.Choice(MODES),
    default="side",
    show_default=True,
    help="Adapters beside the base, switched at run time, or one merged into it; auto measures.",
)
@click.option(
    "--merge-base",
    type=click.Choice(MERGE_BASES),
    help="Merge into the float base, or the base as NF4 rounds it (QLoRA).  [default: float]",
)
@click.option(
    "--format",
    "weight_format",
    type=click.Choice(FORMATS),
    help="Of the linears.  [default: int4, or the base's own]",
)
@click.option(
    "--block-size",
    type=click.Choice([str(size) for size in BLOCK_SIZES]),
    help="Weights that share a scale.  [default: the plan's, see --dry-run]",
)
@click.option("--zero-points", is_flag=True, help="int4 with zero points.")
@click.option(
    "--embedding-format",
    type=click.Choice(EMBEDDING_FORMATS),
    help="Of the embedding, and of lm_head if it is not given.  [default: the plan's]",
)
@click.option(
    "--head-format",
    type=click.Choice(EMBEDDING_FORMATS),
    help="Of lm_head.  [default: the plan's]",
)
@click.option(
    "--quality",
    type=click.Choice(QUALITIES),
    default="fast",
    show_default=True,
    help="balanced: rounding errors make up for each other on a text, takes minutes; best: and "
    "what 4 bits hurt most is int8.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Plain text of the kind that the model will read and write.",
)
@click.option(
    "--flavor",
    type=click.Choice(FLAVORS),
    default="edgelora",
    show_default=True,
    help="Our operators, or stock ones of ONNX Runtime.",
)
@click.option(
    "--context-length",
    type=click.IntRange(1),
    help="Positions of the kv_cache.  [default: the base's, up to 8192]",
)
@click.option(
    "--device", metavar="ID", help="Shape the plan for a device (see `edgelora devices`)."
)
@click.option(
    "--report/--no-report",
    default=True,
    show_default=True,
    help="Measure what is lost, for report.json and report.html.",
)
@click.option(
    "--report-text",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Plain text to measure on.  [default: a built-in one]",
)
@click.option("--dry-run", is_flag=True, help="Print the plan with its reasons and stop.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@json_option
def export(
    base: Path,
    output: Path,
    adapters: tuple[tuple[str, Path], ...],
    weight_format: str | None,
    block_size: str | None,
    *,
    dry_run: bool,
    force: bool,
    as_json: bool,
    **choices: Any,
) -> None:
    """Converts BASE (a Hugging Face folder, a bitsandbytes 4-bit folder or a GGUF file) and its
    adapters into a bundle.

    \b
    Example:
      edgelora export SmolLM2-135M-Instruct.Q4_1.gguf -o smollm2 \\
          --adapter pirate=adapters/pirate --adapter json=adapters/json
    """
    size = int(block_size) if block_size else None
    options = {"format": weight_format, "block_size": size, **choices}
    folders = unique(adapters, "--adapter")
    if dry_run:
        from edgelora.request import prepare

        with stages() as progress:
            request = prepare(base, folders, ExportOptions(**options), progress)
        _show_plan(request.plan, as_json=as_json)
        return
    show_export(base, output, folders, as_json=as_json, force=force, **options)


def show_export(
    base: Path, output: Path, adapters: Mapping[str, Path], *, as_json: bool = False, **options: Any
) -> None:
    """Runs the export under a progress bar and prints what it did."""
    from edgelora.exporter import export as run_export

    with stages() as progress:
        report = run_export(base, output, adapters=adapters, progress=progress, **options)
    _show_report(report, as_json=as_json)
    if not as_json:
        for name in ("mode", "merge_base"):
            if options.get(name) == "auto":
                out.print(f"{name} {getattr(report.plan, name)}: {report.plan.reasons[name]}")


def _show_plan(plan: Plan, *, as_json: bool) -> None:
    fields = asdict(plan)
    reasons = fields.pop("reasons")
    if as_json:
        out.print_json(json.dumps(fields | {"reasons": reasons}))
        return
    for name, value in fields.items():
        line = Text(f"{name:18}{value!s:10}")
        out.print(line.append(f"  {reasons[name]}", style="dim") if name in reasons else line)


def _show_report(report: "ExportReport", *, as_json: bool) -> None:
    for warning in report.warnings:
        err.print(f"warning: {warning}")
    if as_json:
        fields = asdict(report) | {"bundle": str(report.bundle)}
        out.print_json(json.dumps(fields))
        return
    before, after = report.source_bytes / MEGABYTE, report.bundle_bytes / MEGABYTE
    out.print(
        f"{report.bundle}: {before:.1f} MB → {after:.1f} MB, "
        f"{report.bits_per_weight:.2f} bits a weight, {report.plan.format}, {report.seconds:.1f} s"
    )
    if report.mean_kl:
        losses = (f"{name or 'base'} {loss:.4f}" for name, loss in report.mean_kl.items())
        out.print(f"mean KL from the float model: {', '.join(losses)}; more in report.html")


@click.command("add-adapter")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("adapter", type=NamedPath())
@click.option("--force", is_flag=True, help="Replace the adapter of that name.")
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    metavar="BASE",
    help="The bundle's base: for DoRA, trained biases, soft prompts, and the report's figures.",
)
@click.option(
    "--report-text",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The text of the bundle's report.  [default: the built-in one]",
)
def add_adapter(
    bundle: Path,
    adapter: tuple[str, Path],
    *,
    force: bool,
    base: Path | None,
    report_text: Path | None,
) -> None:
    """Binds one more adapter (a PEFT folder, or an adapter.safetensors of the same base) to BUNDLE.

    \b
    Example:  edgelora add-adapter smollm2 formal=adapters/formal
    """
    from edgelora.adding import add_adapter as bind_adapter

    if report_text is not None and base is None:
        raise click.UsageError("--report-text needs --base")
    added = bind_adapter(bundle, *adapter, force=force, base=base, report_text=report_text)
    if added.warning:
        err.print(f"warning: {added.warning}")
    out.print(
        f"{bundle}: {adapter[0]} added, {added.entry['targets']} targets, "
        f"{added.size / MEGABYTE:.1f} MB",
    )
    if added.mean_kl is not None:
        out.print(f"mean KL from the float model: {added.mean_kl:.4f}; more in the report")
    if added.entry.get("report") is False:
        out.print(f"the report tells nothing of {adapter[0]}: --base BASE --force measures it")
