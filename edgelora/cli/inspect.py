"""`edgelora inspect` and `edgelora verify`."""

import json
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelora.cli.console import err, out, show_columns
from edgelora.cli.parameters import json_option
from edgelora.errors import EdgeLoraError
from edgelora.manifest import NAME, read_manifest
from edgelora.verify import verify as run_verify

if TYPE_CHECKING:
    from edgelora.adapter import LedgerEntry
    from edgelora.checkpoint import Checkpoint

LAYER = re.compile(r"\S*\blayers\.\d+\.\S+")
FACTOR = re.compile(r"\.(lora_[ABE]|ia3_l)(\.\w+)*$")
MATRIX = 2  # dimensions; norms and biases have one


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@json_option
def inspect(path: Path, *, as_json: bool) -> None:
    """Says what is in a bundle, an adapter or a base, and what would be refused and why.

    --json lists every tensor.

    \b
    Example:  edgelora inspect adapters/pirate
    """
    from edgelora.adapter import CONFIG, is_adapter_hub

    if not path.exists():
        raise EdgeLoraError(f"{path}: no such file or folder")
    if (path / NAME).is_file():
        _show_bundle(path, read_manifest(path), as_json=as_json)
    elif (path / CONFIG).is_file() or is_adapter_hub(path):
        _show_adapter(path, as_json=as_json)
    else:
        _show_base(path, as_json=as_json)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@json_option
def verify(bundle: Path, *, as_json: bool) -> None:
    """Checks every byte: digests, fingerprints, and that the base and each adapter compute here
    the logits that the export foresaw.

    Exit code 1 and one line saying what is wrong otherwise.

    \b
    Example:  edgelora verify smollm2
    """
    checks = []
    for check in run_verify(bundle):
        checks.append({"what": check.what, "detail": check.detail})
        if not as_json:
            out.print(f"ok  {check.what:44}{check.detail}")
    if as_json:
        out.print_json(json.dumps(checks))


def _show_bundle(path: Path, manifest: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        out.print_json(json.dumps(manifest))
        return
    model, plan = manifest["model"], manifest["plan"]
    out.print(f"{path}: bundle, flavor {manifest['flavor']}")
    out.print(f"base       {manifest['base']['name']}  {manifest['base']['fingerprint']}")
    out.print(
        f"model      {model['architecture']}, {model['num_hidden_layers']} layers, "
        f"hidden {model['hidden_size']}, "
        f"vocabulary {model['vocab_size']}, context {model['context_length']}"
    )
    out.print(f"weights    {plan['format']}, block size {plan['block_size']}, mode {plan['mode']}")
    for kind in ("adapters", "merged"):
        for name, entry in manifest[kind].items():
            label = kind.removesuffix("s")
            out.print(f"{label:11}{name}: {_content(entry)}")
    for name, entry in manifest["files"].items():
        out.print(f"file       {name}  {entry['size'] / 1e6:.1f} MB")


def _content(entry: dict[str, Any]) -> str:
    if "prefix" in entry:
        return f"a prefix of {entry['prefix']} positions"
    waits = "".join(f" {token}" for token in entry.get("invocation_tokens", []))
    after = f", from the tokens{waits} on" if waits else ""
    return f"{_factors(entry)}{entry['targets']} targets{after}"


def _factors(entry: dict[str, Any]) -> str:
    """Of an adapter's line in the manifest; (IA)³ and biases alone have none."""
    if not entry["ranks"]:
        return ""
    ranks = "/".join(map(str, entry["ranks"]))
    return f"rank {ranks}, scaling {'/'.join(f'{each:g}' for each in entry['scalings'])}, "


def _show_adapter(path: Path, *, as_json: bool) -> None:
    from edgelora.adapter import adapter_ledger

    ledger = adapter_ledger(path, None)
    if as_json:
        out.print_json(json.dumps([entry._asdict() for entry in ledger]))
        return
    show_columns(_summary(ledger))
    refused = sum(entry.verdict == "refused" for entry in ledger)
    if refused:
        err.print(f"{refused} refused: edgelora export would not take this")


def _summary(ledger: "tuple[LedgerEntry, ...]") -> list[tuple[str, str, str]]:
    """Fields as they are; what befalls the modules of a kind alike is one row: "q_proj ×30"."""
    modules: dict[tuple[str, str, str], set[str]] = {}
    for item, verdict, reason in ledger:
        module = FACTOR.sub("", item)
        in_module = module != item or LAYER.fullmatch(item)
        kind = _kind(module) if in_module else item
        modules.setdefault((kind, verdict, reason), set()).add(module)
    return [
        (f"{kind} ×{len(paths)}" if paths != {kind} else kind, verdict, reason)
        for (kind, verdict, reason), paths in modules.items()
    ]


def _kind(module: str) -> str:
    """The last part of its path; of a whole tensor the module's too: `k_proj.bias`."""
    parts = module.split(".")
    return ".".join(parts[-2:] if parts[-1] in ("weight", "bias") else parts[-1:])


def _show_base(path: Path, *, as_json: bool) -> None:
    from edgelora.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path)
    shapes = {name: checkpoint.shape(name) for name in checkpoint.names()}
    stored = {name: _stored(checkpoint, name) for name in shapes}
    if as_json:
        tensors = [
            {"name": name, "shape": shape, "stored_as": stored[name]}
            for name, shape in shapes.items()
        ]
        fields = {"name": checkpoint.name, "config": asdict(checkpoint.config), "tensors": tensors}
        out.print_json(json.dumps(fields))
        return
    config = checkpoint.config
    out.print(f"{path}: base {checkpoint.name}")
    out.print(
        f"model      {config.architecture}, {config.num_hidden_layers} layers, "
        f"hidden {config.hidden_size}, intermediate {config.intermediate_size}, "
        f"vocabulary {config.vocab_size}, context {config.max_position_embeddings}"
    )
    out.print(
        f"attention  {config.num_attention_heads} heads of {config.head_dim}, "
        f"{config.num_key_value_heads} for keys and values"
    )
    matrices = Counter(stored[name] for name, shape in shapes.items() if len(shape) == MATRIX)
    for kind, count in matrices.items():
        note = ": quantized at export" if kind == "float" else ""
        out.print(f"stored     {count} {'matrix' if count == 1 else 'matrices'} as {kind}{note}")
    rest = len(shapes) - matrices.total()
    out.print(f"stored     {rest} norms and biases as float: exported as they are")


def _stored(checkpoint: "Checkpoint", name: str) -> str:
    return checkpoint.stored_as(name) or "float"
