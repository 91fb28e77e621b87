"""The self-check of an adapter that add-adapter brings, computed from the bundle alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgelora
from edgelora.adding import add_adapter
from edgelora.errors import EdgeLoraError
from edgelora.manifest import read_manifest
from edgelora.verify import verify
from killing import kill_at_every_step
from test_float_oracle import ARCHITECTURES, make_adapter
from test_selfcheck import ALL_FORMATS, double_scaling, edit_adapter, refuse, selfcheck

SETTINGS = {"target_modules": "all-linear", "lora_bias": True}
VARIETIES = {
    **{("llama", name): options for name, options in ALL_FORMATS.items()},
    **{(name, "int4"): {} for name in ARCHITECTURES if name != "llama"},
    ("llama", "best"): {"quality": "best"},
}


def expectations(bundle: Path) -> dict[str | None, dict[str, Any]]:
    name = read_manifest(bundle).get("selfcheck", "selfcheck.json")
    fields = json.loads((bundle / name).read_text())
    return {each["adapter"]: each for each in fields["expected"]}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A base and an adapter of it, by architecture."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in made:
            base = ARCHITECTURES[name](tmp_path_factory.mktemp("base"))
            made[name] = base, make_adapter(base, tmp_path_factory.mktemp("b"), **SETTINGS)
        return made[name]

    return make


@pytest.fixture
def bundle(bases: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> Path:
    base, adapter = bases("llama")
    edgelora.export(base, tmp_path / "bundle", adapters={"a": adapter}, report=False)
    return tmp_path / "bundle"


@pytest.mark.parametrize(("architecture", "kind"), VARIETIES, ids=map("-".join, VARIETIES))
def test_it_is_what_an_export_with_the_adapter_expects(
    bases: Callable[[str], tuple[Path, Path]], tmp_path: Path, architecture: str, kind: str
) -> None:
    base, adapter = bases(architecture)
    options: dict[str, Any] = {"report": False, **VARIETIES[architecture, kind]}
    if "quality" in options:
        text = tmp_path / "text.txt"
        text.write_text("some words of a text " * 1000)
        options["calibration"] = text
    edgelora.export(base, tmp_path / "both", adapters={"b": adapter}, **options)
    edgelora.export(base, tmp_path / "added", **options)
    add_adapter(tmp_path / "added", "b", adapter)
    both, added = (expectations(tmp_path / name) for name in ("both", "added"))
    for name in (None, "b"):
        for key in ("tokens", "logits", "float_tolerance"):
            assert np.allclose(both[name][key], added[name][key], rtol=0, atol=2e-5), (name, key)
    assert added["b"]["int8_tolerance"] >= added[None]["int8_tolerance"]
    whats = {check.what: check.detail for check in verify(tmp_path / "added")}
    assert whats["adapter b in float"].startswith("self-check: ")
    assert whats["adapter b in int8"].startswith("self-check: ")


def test_the_others_keep_what_the_export_wrote(
    bases: Callable[[str], tuple[Path, Path]], bundle: Path
) -> None:
    before = expectations(bundle)
    add_adapter(bundle, "b", bases("llama")[1])
    after = expectations(bundle)
    assert after.keys() == {None, "a", "b"}
    assert {name: after[name] for name in before} == before
    assert not (bundle / "selfcheck.json").exists()
    assert {each.adapter for each in selfcheck(bundle, "float") if each.checked} == {None, "a", "b"}


def test_a_replaced_adapter_has_new_expectations(
    bases: Callable[[str], tuple[Path, Path]], bundle: Path, tmp_path: Path
) -> None:
    before = expectations(bundle)["a"]
    other = make_adapter(bases("llama")[0], tmp_path / "other", target_modules=["v_proj"])
    add_adapter(bundle, "a", other, force=True)
    assert expectations(bundle)["a"]["logits"] != before["logits"]
    assert all(each.checked for each in selfcheck(bundle, "int8"))


def test_a_bound_file_is_checked_too(bundle: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    add_adapter(other, "again", bundle / "adapters" / "a")
    found = expectations(other)
    assert found["again"]["logits"] == found["a"]["logits"]


def test_an_added_adapter_that_was_changed_is_found(
    bases: Callable[[str], tuple[Path, Path]], bundle: Path
) -> None:
    add_adapter(bundle, "a", bases("llama")[1], force=True)
    edit_adapter(bundle, double_scaling)
    refuse(bundle, 'adapter "a" computes other logits', "int8")


def test_weights_that_are_not_the_export_s_are_no_reference(
    bases: Callable[[str], tuple[Path, Path]], bundle: Path
) -> None:
    """What they give would be written down as right."""
    with (bundle / "model.onnx.data").open("r+b") as file:
        file.seek(4096)
        file.write(bytes(4096))
    before = (bundle / "manifest.json").read_bytes()
    with pytest.raises(EdgeLoraError, match="the base computes other logits than at export"):
        add_adapter(bundle, "b", bases("llama")[1])
    assert (bundle / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("name", ["model.onnx", "selfcheck.json"])
def test_a_damaged_file_that_is_read_for_it_is_named(
    bases: Callable[[str], tuple[Path, Path]], bundle: Path, name: str
) -> None:
    """In its size: that is all that reading the manifest looks at."""
    with (bundle / name).open("r+b") as file:
        file.write(b"\xff{}")
    with pytest.raises(EdgeLoraError, match=rf"/{name}: SHA-256 does not match: damaged"):
        add_adapter(bundle, "b", bases("llama")[1])


def test_kill_at_any_step_leaves_a_bundle_that_checks_itself(
    bases: Callable[[str], tuple[Path, Path]], bundle: Path
) -> None:
    definitions = """
out, new = map(Path, sys.argv[1:])
def call():
    adding.add_adapter(out, "b", new, force=True)
def check():
    manifest = read_manifest(out)
    name = manifest.get("selfcheck", "selfcheck.json")
    import json
    expected = json.loads((out / name).read_text())["expected"]
    known = {each["adapter"] for each in expected}
    assert known == {None, *manifest["adapters"]}, known
"""
    assert kill_at_every_step(definitions, bundle, bases("llama")[1]) >= 8
    assert all(each.checked for each in selfcheck(bundle, "float"))
