"""A PEFT folder as `Adapter`: scaling resolved, factors oriented, nothing left unaccounted."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgelora.adapter.branches import Branch
from edgelora.adapter.copies import misfit
from edgelora.adapter.copies import module_of as copied_module
from edgelora.adapter.families import family_of, is_adapter_hub, refuse_adapter_hub
from edgelora.adapter.fields import is_ranges
from edgelora.adapter.judged import Judged, Targets
from edgelora.adapter.ledger import LedgerEntry, refusals
from edgelora.adapter.name import model_name, valid_adapter_name, valid_adapter_names
from edgelora.adapter.prefix import Prefix, PrefixFit, SoftPrompt
from edgelora.adapter.replaced import (
    Replaced,
    Rows,
    is_saved,
    tokens_of,
)
from edgelora.adapter.settings import INVOCATION
from edgelora.adapter.tensors import StoredTensor, parse_safetensors, unique_object
from edgelora.errors import EdgeLoraError

__all__ = [
    "CONFIG",
    "PARTS",
    "WEIGHTS",
    "Adapter",
    "Branch",
    "LedgerEntry",
    "PeftFolder",
    "Prefix",
    "PrefixFit",
    "Replaced",
    "Rows",
    "SoftPrompt",
    "adapter_ledger",
    "adapter_of",
    "base_key",
    "check_invocation",
    "compare_base_name",
    "copied_module",
    "doubts",
    "is_adapter_hub",
    "is_saved",
    "layer_ranges",
    "misfit",
    "model_name",
    "read_adapter",
    "read_folder",
    "refuse_copies",
    "refuse_input_factors",
    "refuse_invocation",
    "refuse_parts",
    "refuse_prefix",
    "refuse_ranges",
    "refuse_replaced",
    "tokens_of",
    "valid_adapter_name",
    "valid_adapter_names",
    "warning_about",
]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"


@dataclass(frozen=True, eq=False)
class Adapter:
    """One named adapter, as trained; nothing of PEFT's configuration is left to interpret."""

    source: str  # the folder's name
    base_model_name_or_path: str | None
    branches: Mapping[str, Branch]  # by target, sorted
    fingerprint: str  # of the source folder, "sha256:" + 64 hex
    ledger: tuple[LedgerEntry, ...] = ()
    replaced: Replaced = field(default_factory=Replaced)
    invocation: tuple[int, ...] = ()  # token ids from which on it acts (aLoRA); empty: everywhere
    prefix: Prefix | SoftPrompt | None = None  # then there are no branches
    bias: str = "none"  # "none", "all" or "lora_only": whose biases were trained
    copies: Mapping[str, StoredTensor] = field(default_factory=dict)  # of base weights, unchecked


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
    path, (branches, replaced, ledger, prefix, copies) = folder.path, _judge(folder, targets)
    if problems := refusals(ledger):
        raise EdgeLoraError(f"{path}: {problems}")
    base = folder.config.get("base_model_name_or_path")
    name, entries = path.resolve().name, tuple(ledger)
    invocation = tuple(folder.config.get(INVOCATION) or ())
    fingerprint, bias = folder.fingerprint, folder.config.get("bias") or "none"
    acts = (replaced, invocation, prefix, bias)
    return Adapter(name, base, branches, fingerprint, entries, *acts, copies)


def _judge(folder: PeftFolder, targets: Targets | None) -> Judged:
    family = family_of(folder.config, folder.path)
    known = family.own_targets(folder.config, folder.tensors) if targets is None else targets
    return family.judge(folder.config, folder.tensors, known)


PARTS = {
    "magnitude": "DoRA scales the rows of {} base weights",
    "trained_bias": "{} biases take the place of the base's",
    "bias": "lora_B has a bias in {} targets",
    "output_factor": "(IA)³ multiplies the outputs of {} linears",
    "input_factor": "(IA)³ multiplies the inputs of {} linears",
}


def refuse_parts(adapter: Adapter, path: Path, parts: Iterable[str], why: str) -> None:
    """Raises EdgeLoraError if the adapter has any of these PARTS, which cannot be here."""
    for part in parts:
        count = sum(getattr(branch, part) is not None for branch in adapter.branches.values())
        if count:
            raise EdgeLoraError(f"{path}: {PARTS[part].format(count)}: {why}")


def refuse_input_factors(adapter: Adapter, path: Path) -> None:
    """Raises EdgeLoraError if the adapter multiplies inputs, as no side branch can."""
    names = [target for target, b in adapter.branches.items() if b.input_factor is not None]
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise EdgeLoraError(
            f"{path}: feedforward_modules: (IA)³ multiplies the inputs of {names[0]}{more}, which "
            "no side branch can (but for down_proj, by way of up_proj): export a bundle of its own "
            "with --mode merge"
        )


def refuse_prefix(adapter: Adapter, path: Path, why: str) -> None:
    """Raises EdgeLoraError if the adapter stands before the text, which cannot be here."""
    if adapter.prefix is not None:
        raise EdgeLoraError(f"{path}: {adapter.prefix.positions} virtual tokens: {why}")


def refuse_replaced(adapter: Adapter, path: Path, vocab_size: int | None = None) -> None:
    """Raises EdgeLoraError if the adapter replaces tensors of the base, as no side branch can;
    vocab_size: the base's, if it is known.
    """
    rows = adapter.replaced.token_rows
    if vocab_size is not None and rows > vocab_size:
        raise EdgeLoraError(
            f"{path}: modules_to_save: a grown vocabulary of {rows} tokens, the base has "
            f"{vocab_size}: merge only, since all adapters of a bundle share embedding, lm_head "
            "and tokenizer: export a bundle of its own with --mode merge"
        )
    if adapter.replaced.embedding is not None:
        raise EdgeLoraError(
            f"{path}: lora_embedding_A, lora_embedding_B: the token embedding's factors are merge "
            "only: export a bundle of its own with --mode merge"
        )
    names = [*adapter.replaced.tensors, *adapter.replaced.rows]
    if names:
        kind = "modules_to_save" if adapter.replaced.tensors else "trainable_token_indices"
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise EdgeLoraError(
            f"{path}: {kind}: {names[0]}{more} cannot be replaced beside the base: export a bundle "
            "of its own with --mode merge"
        )


def refuse_copies(adapter: Adapter, path: Path, why: str) -> None:
    """Raises EdgeLoraError for copies of base weights, which cannot be compared here."""
    if adapter.copies:
        names = ", ".join(adapter.copies)
        raise EdgeLoraError(f"{path}: {names}: a copy of base weights: {why}")


def refuse_invocation(adapter: Adapter, path: Path, why: str) -> None:
    """Raises EdgeLoraError for activated LoRA, which cannot be here."""
    if adapter.invocation:
        raise EdgeLoraError(f"{path}: {INVOCATION}: {why}")


def check_invocation(adapter: Adapter, path: Path, vocab_size: int) -> None:
    """Raises EdgeLoraError for tokens that no text of the base has."""
    if beyond := [str(token) for token in adapter.invocation if token >= vocab_size]:
        raise EdgeLoraError(
            f"{path}: {INVOCATION}: {', '.join(beyond)}: not below vocab_size {vocab_size}: use "
            "the base it was trained on"
        )


def layer_ranges(path: Path) -> tuple[tuple[int, int], ...]:
    """layer_replication of a PEFT folder: ranges of the base's layers, one after another, that are
    the layers it was trained on; none for the base as it is. What is no such list is left to
    `read_adapter`, and so is a folder that cannot be read.
    """
    if not (path / CONFIG).is_file():
        return ()
    ranges = _parse_config(_read(path, CONFIG), path / CONFIG).get("layer_replication")
    return tuple((first, end) for first, end in ranges) if ranges and is_ranges(ranges) else ()


def refuse_ranges(path: Path, why: str) -> None:
    """Raises EdgeLoraError if the adapter was trained on repeated layers."""
    if layer_ranges(path):
        raise EdgeLoraError(f"{path}: layer_replication: {why}")


def adapter_ledger(path: Path, targets: Targets | None) -> tuple[LedgerEntry, ...]:
    """What becomes of every field and tensor; without `targets`, all modules in the file are taken.

    Raises EdgeLoraError only if the files cannot be read at all.
    """
    return tuple(_judge(read_folder(path), targets).ledger)


def warning_about(adapter: Adapter, checkpoint_name: str) -> str | None:
    """What of it is doubtful, and whether it names another base; None if nothing."""
    other = compare_base_name(adapter, checkpoint_name)
    return "; ".join([*doubts(adapter), *([other] if other else [])]) or None


def doubts(adapter: Adapter) -> list[str]:
    """A line for each doubtful entry of its ledger."""
    found = (entry for entry in adapter.ledger if entry.verdict == "doubtful")
    return [f"adapter {adapter.source}: {each.item}: {each.reason}" for each in found]


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


def read_folder(path: Path) -> PeftFolder:
    if not path.is_dir():
        raise EdgeLoraError(
            f"{path}: no such folder; give the folder that PEFT's save_pretrained wrote"
        )
    refuse_adapter_hub(path)
    config_bytes = _read(path, CONFIG)
    config = _parse_config(config_bytes, path / CONFIG)
    family_of(config, path)
    if not (path / WEIGHTS).is_file() and (path / PICKLE).is_file():
        raise EdgeLoraError(
            f"{path / PICKLE}: pickle files can run code and are not read; save it as safetensors"
        )
    weight_bytes = _read(path, WEIGHTS)
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
