"""A PEFT LoRA folder as `Adapter`: scaling resolved, factors oriented, nothing left unaccounted."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgelora.adapter.biases import bias_targets, is_trained_bias, read_biases
from edgelora.adapter.branches import Branch, Pairs, check_targets, pair_factors, read_branch
from edgelora.adapter.ledger import LedgerEntry, refusals
from edgelora.adapter.name import model_name, valid_adapter_name, valid_adapter_names
from edgelora.adapter.replaced import (
    Replaced,
    Rows,
    is_replaced,
    is_saved,
    read_replaced,
    tokens_of,
)
from edgelora.adapter.settings import Settings, read_settings
from edgelora.adapter.targets import check_patterns
from edgelora.adapter.tensors import Factor, StoredTensor, parse_safetensors, unique_object
from edgelora.errors import EdgeLoraError

__all__ = [
    "CONFIG",
    "PARTS",
    "WEIGHTS",
    "Adapter",
    "Branch",
    "LedgerEntry",
    "PeftFolder",
    "Replaced",
    "Rows",
    "adapter_ledger",
    "adapter_of",
    "base_key",
    "compare_base_name",
    "is_saved",
    "model_name",
    "read_adapter",
    "read_folder",
    "refuse_parts",
    "refuse_replaced",
    "tokens_of",
    "valid_adapter_name",
    "valid_adapter_names",
]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"

Targets = Mapping[str, tuple[int, int]]  # module path → (out_features, in_features)


@dataclass(frozen=True, eq=False)
class Adapter:
    """One named LoRA set, as trained; nothing of PEFT's configuration is left to interpret."""

    source: str  # the folder's name
    base_model_name_or_path: str | None
    branches: Mapping[str, Branch]  # by target, sorted
    fingerprint: str  # of the source folder, "sha256:" + 64 hex
    ledger: tuple[LedgerEntry, ...] = ()
    replaced: Replaced = field(default_factory=Replaced)


@dataclass(frozen=True)
class PeftFolder:
    """The two files of a PEFT folder, read but not judged."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    fingerprint: str


def read_adapter(path: Path, targets: Targets) -> Adapter:
    """Read a PEFT folder for a base whose linears (that may take an adapter) are `targets`.

    Raises EdgeLoraError: one line that names every refused field and tensor, or the file that
    cannot be read.
    """
    return adapter_of(read_folder(path), targets)


def adapter_of(folder: PeftFolder, targets: Targets | None) -> Adapter:
    """As `read_adapter`; without `targets`, all modules in the file are taken."""
    path, known = folder.path, _own_targets(folder.tensors) if targets is None else targets
    branches, replaced, ledger = _judge(folder, known)
    if problems := refusals(ledger):
        raise EdgeLoraError(f"{path}: {problems}")
    base = folder.config.get("base_model_name_or_path")
    name, entries = path.resolve().name, tuple(ledger)
    return Adapter(name, base, branches, folder.fingerprint, entries, replaced)


PARTS = {
    "magnitude": "DoRA scales the rows of {} base weights",
    "trained_bias": "{} biases take the place of the base's",
    "bias": "lora_B has a bias in {} targets",
}


def refuse_parts(adapter: Adapter, path: Path, parts: Iterable[str], why: str) -> None:
    """Raises EdgeLoraError if the adapter has any of these PARTS, which cannot be here."""
    for part in parts:
        count = sum(getattr(branch, part) is not None for branch in adapter.branches.values())
        if count:
            raise EdgeLoraError(f"{path}: {PARTS[part].format(count)}: {why}")


def refuse_replaced(adapter: Adapter, path: Path) -> None:
    """Raises EdgeLoraError if the adapter replaces tensors of the base, as no side branch can."""
    names = [*adapter.replaced.tensors, *adapter.replaced.rows]
    if names:
        kind = "modules_to_save" if adapter.replaced.tensors else "trainable_token_indices"
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise EdgeLoraError(
            f"{path}: {kind}: {names[0]}{more} cannot be replaced beside the base: export a bundle "
            "of its own with --mode merge"
        )


def adapter_ledger(path: Path, targets: Targets | None) -> tuple[LedgerEntry, ...]:
    """What becomes of every field and tensor; without `targets`, all modules in the file are taken.

    Raises EdgeLoraError only if the files cannot be read at all.
    """
    folder = read_folder(path)
    return tuple(_judge(folder, _own_targets(folder.tensors) if targets is None else targets)[2])


def compare_base_name(adapter: Adapter, checkpoint_name: str) -> str | None:
    """A warning if the adapter names another base; last path components count, case does not."""
    trained_on = adapter.base_model_name_or_path
    if not trained_on or base_key(trained_on) == base_key(checkpoint_name):
        return None
    return (
        f"adapter {adapter.source} was trained on {trained_on}, but the base is {checkpoint_name}"
    )


def base_key(name: str) -> str:
    """What two names of the same base have in common."""
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].casefold()


def _own_targets(tensors: Mapping[str, StoredTensor]) -> dict[str, tuple[int, int]]:
    """The targets that the file itself names, with the sizes of its own factors."""
    pairs, _ = pair_factors(_factors(tensors))
    biases = {target: tensors[name] for target, name in bias_targets(tensors).items()}
    alone = {target: (bias.shape[0], 0) for target, bias in biases.items() if bias.shape}
    return alone | {
        target: (tensors[pair["B"]].shape[0], tensors[pair["A"]].shape[-1])
        for target, pair in pairs.items()
        if pair.keys() >= {"A", "B"} and tensors[pair["A"]].shape and tensors[pair["B"]].shape
    }


def _factors(tensors: Iterable[str]) -> list[str]:
    return [name for name in tensors if not is_trained_bias(name)]


def _judge(
    folder: PeftFolder, targets: Targets
) -> tuple[dict[str, Branch], Replaced, list[LedgerEntry]]:
    """All branches that can be read, what is replaced, and the ledger."""
    settings, ledger = read_settings(folder.config)
    if folder.config.get("peft_type") != "LORA":
        return {}, Replaced(), ledger
    if settings is None:
        return {}, Replaced(), ledger + pair_factors(_factors(folder.tensors))[1]
    replaced, entries = read_replaced(folder.tensors, settings)
    tensors = {n: t for n, t in folder.tensors.items() if not is_replaced(n, settings)}
    pairs, refused_tensors = pair_factors(_factors(tensors))
    ledger += entries + refused_tensors
    if bad_patterns := check_patterns(settings):
        return {}, Replaced(), ledger + bad_patterns
    branches, entries = _read_branches(tensors, settings, pairs, targets)
    return branches, replaced, ledger + entries


def _read_branches(
    tensors: Mapping[str, StoredTensor], settings: Settings, pairs: Pairs, targets: Targets
) -> tuple[dict[str, Branch], list[LedgerEntry]]:
    agreed, ledger = check_targets(pairs, settings, targets)
    branches = {}
    for target in agreed:
        branch, entries = read_branch(tensors, pairs[target], settings, target, targets[target])
        ledger += entries
        if branch is not None:
            branches[target] = branch
    biases, entries = read_biases(tensors, settings, pairs, targets)
    return _with_biases(branches, biases, targets), ledger + entries


def _with_biases(
    branches: Mapping[str, Branch], biases: Mapping[str, Factor], targets: Targets
) -> dict[str, Branch]:
    """Sorted; a target that has a bias alone gets a branch of rank 0."""
    result = dict(branches)
    for target, bias in biases.items():
        rows, columns = targets[target]
        nothing = Branch(np.zeros((0, columns), np.float32), np.zeros((rows, 0), np.float32), 1.0)
        result[target] = replace(result.get(target, nothing), trained_bias=bias)
    return dict(sorted(result.items()))


def read_folder(path: Path) -> PeftFolder:
    if not path.is_dir():
        raise EdgeLoraError(
            f"{path}: no such folder; give the folder that PEFT's save_pretrained wrote"
        )
    if not (path / WEIGHTS).is_file() and (path / PICKLE).is_file():
        raise EdgeLoraError(
            f"{path / PICKLE}: pickle files can run code and are not read; save it as safetensors"
        )
    config_bytes, weight_bytes = _read(path, CONFIG), _read(path, WEIGHTS)
    config = _parse_config(config_bytes, path / CONFIG)
    tensors, _ = parse_safetensors(weight_bytes, str(path / WEIGHTS))
    return PeftFolder(path, config, tensors, _fingerprint(config_bytes, weight_bytes))


def _read(path: Path, name: str) -> bytes:
    try:
        return (path / name).read_bytes()
    except FileNotFoundError as error:
        raise EdgeLoraError(
            f"{path}: {name} is missing; give a folder that PEFT's save_pretrained wrote"
        ) from error
    except OSError as error:
        raise EdgeLoraError(f"{path / name}: cannot be read ({error.strerror})") from error


def _parse_config(data: bytes, path: Path) -> dict[str, Any]:
    try:
        config = json.loads(data, object_pairs_hook=unique_object)
    except (ValueError, RecursionError) as error:
        raise EdgeLoraError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise EdgeLoraError(f"{path}: must be a JSON object")
    name = config.get("base_model_name_or_path")
    if name is not None and not isinstance(name, str):
        raise EdgeLoraError(f"{path}: base_model_name_or_path must be a string or null")
    return config


def _fingerprint(config: bytes, weights: bytes) -> str:
    """SHA-256 over the lines `edgelora-peft 1` and, for both files, `<name> <sha256 hex>`."""
    lines = ["edgelora-peft 1", f"{CONFIG} {_sha256(config)}", f"{WEIGHTS} {_sha256(weights)}"]
    return "sha256:" + _sha256("".join(f"{line}\n" for line in lines).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
