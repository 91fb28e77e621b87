"""Checks a bundle to the last byte."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelora.errors import EdgeLoraError
from edgelora.manifest import NAME, read_manifest, sha256_file
from edgelora.model import load


@dataclass(frozen=True)
class Check:
    """One thing that was looked at and found right."""

    what: str
    detail: str


def verify(bundle: Path) -> Iterator[Check]:
    """Yields each check as it passes; raises EdgeLoraError at the first that fails.

    Manifest and its digest, the SHA-256 of every file, no file that the manifest does not name,
    every adapter bound to the base's fingerprint (flavor ort: its adapters name none), and one
    token computed with the base and with every adapter.
    """
    manifest = read_manifest(bundle)
    yield Check(NAME, "whole, digest matches")
    for name, entry in manifest["files"].items():
        if sha256_file(bundle / name) != entry["sha256"]:
            raise EdgeLoraError(
                f"{bundle / name}: SHA-256 does not match: damaged, copy the bundle again"
            )
        yield Check(name, f"sha256 {entry['sha256'][:12]}…, {entry['size']} bytes")
    _refuse_strangers(bundle, manifest["files"])
    yield Check("base", _check_bound(bundle, manifest))
    with load(bundle) as model:
        for name in [None, *model.adapters]:
            model.logits([0], adapter=name)
            yield Check(f"adapter {name}" if name else "model", "loads, one token computed")


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
