"""The float model of a bundle: its base, opened again and recognised, with the same adapters."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.adapter import Adapter, read_adapter
from edgelora.adapter_file import read_adapter_file
from edgelora.binding import bound
from edgelora.changed_base import changed_base
from edgelora.checkpoint import Checkpoint, merged_fingerprint, open_checkpoint, read_tokenizer
from edgelora.checkpoint.fingerprint import base_fingerprint
from edgelora.errors import EdgeLoraError
from edgelora.evaluation import EvaluationText, Subject, Variant, Walk
from edgelora.layout import targets
from edgelora.plan import ExportOptions, make_plan
from edgelora.repeated_base import repeated

Float32 = NDArray[np.float32]


@dataclass
class Reference:
    """Nothing is rounded; merged: the adapter in the bundle's weights, which "no adapter" means."""

    subject: Subject
    merged: str | None
    _walk: Walk | None = field(default=None, init=False)

    def run(self, text: EvaluationText, progress: Callable[[int, int], None]) -> None:
        """All of the text, through everything but lm_head. Raises EdgeLoraError."""
        names = [None, *self.subject.bound] if self.merged is None else [self.merged]
        self._walk = Walk(
            self.subject, text, [Variant(name, "side") for name in names], progress=progress
        )
        self._walk.run()

    def logits(self, adapter: str | None, window: int) -> Float32:
        """Of the scored tokens of a window, [tokens, vocab_size]."""
        assert self._walk is not None
        text = self._walk.text
        positions = text.windows.shape[1]
        tokens = window * positions + np.arange(text.first_scored, positions - 1)
        return self._walk.logits(Variant(adapter or self.merged, "side"), tokens)


def open_reference(
    bundle: Path, manifest: Mapping[str, Any], base: Path, folders: Mapping[str, Path]
) -> Reference:
    """folders: PEFT folders of adapters that the bundle's own files do not tell.

    Raises EdgeLoraError unless base and adapters are those of the bundle.
    """
    checkpoint = open_base(bundle, manifest, base)
    shapes = targets(checkpoint.config)
    given = {name: read_adapter(path, shapes) for name, path in folders.items()}
    _check_adapters(bundle, manifest, folders, given)
    merged = list(manifest["merged"])
    check_base(bundle, manifest, checkpoint, [given[name].fingerprint for name in merged])
    for name in merged:
        checkpoint = changed_base(checkpoint, given[name], folders[name])
    read = {
        name: _stored(bundle / entry["path"], shapes)
        for name, entry in manifest["adapters"].items()
        if name not in given
    }
    adapters = {name: bound(each, checkpoint) for name, each in given.items()} | read
    plan = make_plan(checkpoint.config, ExportOptions(format="float"))
    return Reference(Subject(checkpoint, plan, bound=adapters), merged[0] if merged else None)


def open_base(bundle: Path, manifest: Mapping[str, Any], base: Path) -> Checkpoint:
    """With its layers as the bundle repeats them. Raises EdgeLoraError for one of fewer layers."""
    checkpoint, layers = open_checkpoint(base), manifest["base"].get("layers", [])
    count = checkpoint.config.num_hidden_layers
    if layers and max(layers) >= count:
        raise EdgeLoraError(
            f"{checkpoint.path}: it has {count} layers, {bundle} was made from one of at least "
            f"{max(layers) + 1}: give that base"
        )
    return repeated(checkpoint, layers)


def _stored(file: Path, shapes: Mapping[str, tuple[int, int]]) -> Adapter:
    stored = read_adapter_file(file, shapes)
    return Adapter(
        stored.name, None, stored.branches, stored.base_fingerprint, prefix=stored.prefix
    )


def _check_adapters(
    bundle: Path,
    manifest: Mapping[str, Any],
    folders: Mapping[str, Path],
    given: Mapping[str, Adapter],
) -> None:
    entries = manifest["adapters"] | manifest["merged"]
    for name, adapter in given.items():
        if name not in entries:
            names = ", ".join(entries) or "none"
            raise EdgeLoraError(f"{bundle}: no adapter {name!r} (it has: {names})")
        source = entries[name]["source"]
        if source is not None and source != adapter.fingerprint:
            raise EdgeLoraError(
                f"{folders[name]}: its fingerprint is {adapter.fingerprint}, {bundle} was given "
                f"{source} as {name!r}: give that folder"
            )
    needed = entries if manifest["flavor"] == "ort" else manifest["merged"]
    if missing := [name for name in needed if name not in given]:
        options = " ".join(f"--adapter {name}=PATH" for name in missing)
        raise EdgeLoraError(f"{bundle}: give the PEFT folders of its adapters: {options}")


def check_base(
    bundle: Path, manifest: Mapping[str, Any], checkpoint: Checkpoint, merged: Sequence[str] = ()
) -> None:
    """Raises EdgeLoraError unless it is the bundle's; merged: the adapters' fingerprints."""
    found = base_fingerprint(checkpoint, read_tokenizer(checkpoint.path))
    for fingerprint in merged:
        found = merged_fingerprint(found, fingerprint)
    wanted, name = manifest["base"]["fingerprint"], manifest["base"]["name"]
    if found != wanted:
        raise EdgeLoraError(
            f"{checkpoint.path}: its fingerprint is {found}, {bundle} was made from {name} with "
            f"{wanted}: give that base"
        )
