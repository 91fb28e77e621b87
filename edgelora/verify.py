"""Checks a bundle to the last byte."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelora.errors import EdgeLoraError
from edgelora.manifest import NAME, check_content, read_manifest, selfcheck_path
from edgelora.model import Model, SelfcheckResult, load


@dataclass(frozen=True)
class Check:
    """One thing that was looked at and found right."""

    what: str
    detail: str


def verify(bundle: Path) -> Iterator[Check]:
    """Yields each check as it passes; raises EdgeLoraError at the first that fails.

    Manifest and its digest, the SHA-256 of every file, no file that the manifest does not name,
    every adapter bound to the base's fingerprint (flavor ort: its adapters name none), and the
    self-check of the base and of every adapter, in float (not flavor ort) and in int8.
    """
    manifest = read_manifest(bundle)
    yield Check(NAME, "whole, digest matches")
    for name, entry in manifest["files"].items():
        check_content(bundle, manifest, name)
        yield Check(name, f"sha256 {entry['sha256'][:12]}…, {entry['size']} bytes")
    _refuse_strangers(bundle, manifest["files"])
    yield Check("base", _check_bound(bundle, manifest))
    if untold := [n for n, each in manifest["adapters"].items() if each.get("report") is False]:
        yield Check("report", f"tells nothing of {', '.join(untold)}, added without the base")
    with load(bundle) as model:
        expected = selfcheck_path(manifest)
        if expected not in manifest["files"]:
            for name in [None, *model.adapters]:
                yield _compute_one(model, name, f"exported without {expected}")
            return
        results = model.selfcheck()
        yield from (_passed(each) for each in results if each.checked)
        for name in dict.fromkeys(each.adapter for each in results if not each.checked):
            yield _compute_one(model, name, "added without, by an older edgelora")


def _passed(result: SelfcheckResult) -> Check:
    error, tolerance = result.error, result.tolerance
    return Check(
        f"{_named(result.adapter)} in {result.accuracy}",
        f"self-check: {result.logits} logits off by {error:.2g}, {tolerance:.2g} allowed",
    )


def _compute_one(model: Model, name: str | None, why: str) -> Check:
    """Of what no logits are known."""
    model.logits([0], adapter=name)
    return Check(_named(name), f"not self-checked: {why}; loads, one token computed")


def _named(adapter: str | None) -> str:
    return f"adapter {adapter}" if adapter else "model"


def _check_bound(bundle: Path, manifest: dict[str, Any]) -> str:
    """The base's fingerprint, and the adapters that name it."""
    fingerprint = str(manifest["base"]["fingerprint"])
    if manifest["flavor"] != "edgelora" or not manifest["adapters"]:
        return fingerprint
    for name, entry in manifest["adapters"].items():
        file = bundle / entry["path"]
        named = _base_fingerprint(file)
        if named != fingerprint:
            raise EdgeLoraError(
                f"{file}: adapter {name!r} is bound to the base {named}, the bundle holds "
                f"{fingerprint}: add it again with edgelora add-adapter --force"
            )
    return f"{fingerprint}, adapters bound to it: {', '.join(manifest['adapters'])}"


def _base_fingerprint(file: Path) -> str:
    """`base_fingerprint` of a safetensors file's metadata."""
    try:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")  # bytes of the header
            header = opened.read(min(size, file.stat().st_size))
        return str(json.loads(header)["__metadata__"]["base_fingerprint"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise EdgeLoraError(
            f"{file}: names no base ({error}): add it again with edgelora add-adapter --force"
        ) from error


def _refuse_strangers(bundle: Path, named: Iterable[str]) -> None:
    found = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if not path.is_dir()}
    strangers = sorted(found - set(named) - {NAME})
    if strangers:
        raise EdgeLoraError(
            f"{bundle}: files that {NAME} does not name: {', '.join(strangers)}: remove them"
        )
