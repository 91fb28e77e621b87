"""`edgelora inspect` and `edgelora verify`."""

import json
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from edgelora.cli.group import err, out
from edgelora.errors import EdgeLoraError
from edgelora.manifest import NAME, read_manifest
from edgelora.verify import verify as run_verify

Rows = list[tuple[str, str, str]]  # item, what becomes of it, why


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True)
def inspect(path: Path, *, as_json: bool) -> None:
    """Says what is in a bundle, an adapter or a base, and what would be refused and why.

    \b
    Example:  edgelora inspect adapters/pirate
    """
    if not path.exists():
        raise EdgeLoraError(f"{path}: no such file or folder")
    if (path / NAME).is_file():
        _show_bundle(path, read_manifest(path), as_json=as_json)
    elif (path / "adapter_config.json").is_file():
        _show_rows(_adapter_rows(path), as_json=as_json)
    else:
        _show_rows(_base_rows(path), as_json=as_json)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True)
def verify(bundle: Path, *, as_json: bool) -> None:
    """Checks every byte: digests, fingerprints, and one token of the base and of each adapter.

    Exit code 1 and one line saying what is wrong otherwise.

    \b
    Example:  edgelora verify smollm2
    """
    checks = []
    for check in run_verify(bundle):
        checks.append({"what": check.what, "detail": check.detail})
        if not as_json:
            out.print(f"ok  {check.what:44}{check.detail}", markup=False)
    if as_json:
        out.print_json(json.dumps(checks))


def _show_bundle(path: Path, manifest: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        out.print_json(json.dumps(manifest))
        return
    model, plan = manifest["model"], manifest["plan"]
    out.print(f"{path}: bundle, flavor {manifest['flavor']}", markup=False)
    out.print(f"base       {manifest['base']['name']}  {manifest['base']['fingerprint']}")
    out.print(
        f"model      {model['architecture']}, {model['num_hidden_layers']} layers, "
        f"hidden {model['hidden_size']}, "
        f"vocabulary {model['vocab_size']}, context {model['context_length']}"
    )
    out.print(f"weights    {plan['format']}, block size {plan['block_size']}, mode {plan['mode']}")
    for kind in ("adapters", "merged"):
        for name, entry in manifest[kind].items():
            ranks = "/".join(map(str, entry["ranks"]))
            scalings = "/".join(f"{scaling:g}" for scaling in entry["scalings"])
            out.print(
                f"{kind.removesuffix('s'):11}{name}: rank {ranks}, scaling {scalings}, "
                f"{entry['targets']} targets",
                markup=False,
            )
    for name, entry in manifest["files"].items():
        out.print(f"file       {name}  {entry['size'] / 1e6:.1f} MB", markup=False)


def _adapter_rows(path: Path) -> Rows:
    from edgelora.adapter import adapter_ledger

    return [(entry.item, entry.verdict, entry.reason) for entry in adapter_ledger(path, None)]


def _base_rows(path: Path) -> Rows:
    from edgelora.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path)
    return [
        (
            name,
            checkpoint.stored_as(name) or "quantized at export",
            "×".join(map(str, checkpoint.shape(name))),
        )
        for name in checkpoint.names()
    ]


def _show_rows(rows: Rows, *, as_json: bool) -> None:
    if as_json:
        out.print_json(
            json.dumps([dict(zip(("item", "verdict", "reason"), row, strict=True)) for row in rows])
        )
        return
    table = Table(box=None, show_header=False)
    for row in rows:
        table.add_row(*row)
    out.print(table)
    refused = sum(row[1] == "refused" for row in rows)
    if refused:
        err.print(f"{refused} refused: edgelora export would not take this", markup=False)
