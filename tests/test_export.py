"""What an export leaves behind: the bundle whole, the same bytes each time, or nothing."""

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

import edgelora
import tiny
from edgelora import EdgeLoraError
from edgelora.adding import add_adapter
from edgelora.manifest import NAME, read_manifest
from killing import kill_at_every_step
from test_float_oracle import make_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_llama(tmp_path_factory.mktemp("base"))


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapter"), target_modules="all-linear")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", "Q4_1")


EVERY_KIND = """
import sys, edgelora
from pathlib import Path
base, gguf, adapter, out = map(Path, sys.argv[1:])
adapters = {"a": adapter}
edgelora.export(base, out / "plain")
edgelora.export(gguf, out / "gguf")
edgelora.export(gguf, out / "gguf-zero-points", zero_points=True)
edgelora.export(base, out / "side", adapters=adapters)
edgelora.export(base, out / "float", adapters=adapters, format="float")
edgelora.export(base, out / "merge", adapters=adapters, mode="merge")
edgelora.export(base, out / "nf4", format="nf4")
edgelora.export(base, out / "ort", adapters=adapters, flavor="ort")
"""


def test_same_inputs_give_the_same_bytes_at_any_thread_count_time_and_place(
    base: Path, gguf: Path, adapter: Path, tmp_path: Path
) -> None:
    results = []
    for threads, place in (("1", "here"), ("2", "there/and/deeper"), ("2", "again")):
        out = tmp_path / place
        environment = os.environ | {"OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
        command = [sys.executable, "-c", EVERY_KIND, base, gguf, adapter, out]
        subprocess.run(command, check=True, env=environment)
        results.append(digests(out))
    assert results[0] == results[1] == results[2]
    assert {name.partition("/")[0] for name in results[0]} == {
        "plain", "gguf", "gguf-zero-points", "side", "float", "merge", "nf4", "ort",
    }  # fmt: skip


@pytest.mark.parametrize("flavor", ["edgelora", "ort"])
def test_no_path_is_in_the_files(base: Path, adapter: Path, tmp_path: Path, flavor: str) -> None:
    edgelora.export(base, tmp_path / "bundle", adapters={"a": adapter}, flavor=flavor)
    for path in (tmp_path / "bundle").rglob("*"):
        for place in (tmp_path, base, adapter) if path.is_file() else ():
            kept = path.read_bytes().replace(named_base(path), b"")
            assert str(place).encode() not in kept, path


def named_base(path: Path) -> bytes:
    """What the adapter itself calls its base: it may be a path, and is not ours to change."""
    if path.name != NAME:
        return b"\0"
    entries = json.loads(path.read_text())["adapters"].values()
    return json.dumps([entry["base_model_name_or_path"] for entry in entries])[1:-1].encode()


def test_existing_folder_is_refused_without_force(base: Path, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "precious.txt").write_text("mine")
    with pytest.raises(EdgeLoraError, match=r"exists already.*--force"):
        edgelora.export(base, tmp_path / "bundle")
    with pytest.raises(EdgeLoraError, match="no bundle"):
        edgelora.export(base, tmp_path / "bundle", force=True)
    assert (tmp_path / "bundle" / "precious.txt").read_text() == "mine"


def test_force_replaces_a_bundle(base: Path, tmp_path: Path) -> None:
    edgelora.export(base, tmp_path / "bundle", format="float")
    edgelora.export(base, tmp_path / "bundle", format="int4", force=True)
    assert read_manifest(tmp_path / "bundle")["plan"]["format"] == "int4"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_failed_export_leaves_the_old_bundle_and_nothing_else(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edgelora.export(base, tmp_path / "bundle")
    before = digests(tmp_path / "bundle")

    def full_disk(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(EdgeLoraError, match=r"bundle: no space left on the device"):
        edgelora.export(base, tmp_path / "bundle", format="float", force=True)
    assert digests(tmp_path / "bundle") == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize(("mode", "use_dora"), [("merge", False), ("merge", True), ("side", True)])
def test_adapter_that_overflows_with_its_base_is_one_line_and_nothing_is_left(
    base: Path, tmp_path: Path, mode: str, *, use_dora: bool
) -> None:
    targets = {"target_modules": ["up_proj"], "use_dora": use_dora}
    file = make_adapter(base, tmp_path / "a", **targets) / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({k: v * 1e38 if "lora_" in k else v for k, v in tensors.items()}, file)
    with pytest.raises(EdgeLoraError) as caught:
        edgelora.export(base, tmp_path / "bundle", adapters={"a": tmp_path / "a"}, mode=mode)
    assert "up_proj" in str(caught.value) and "not finite" in str(caught.value)
    assert "\n" not in str(caught.value) and not (tmp_path / "bundle").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_full_device_is_one_line_and_nothing_is_left(base: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        with pytest.raises(EdgeLoraError, match="no space left"):
            edgelora.export(base, small / "bundle")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_kill_at_any_step_leaves_a_whole_bundle_or_none(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    definitions = """
base, adapter, out = map(Path, sys.argv[1:])
def call():
    edgelora.export(base, out, adapters={"a": adapter})
def check():
    left = sorted(path.name for path in out.parent.iterdir())
    assert len(left) <= 1, left
    if out.exists():
        read_manifest(out)
        shutil.rmtree(out)
"""
    assert kill_at_every_step(definitions, base, adapter, tmp_path / "bundle") > 30
    assert list(tmp_path.iterdir()) == []


KILLED_FORCE = """
base, out = map(Path, sys.argv[1:])
edgelora.export(base, out, format="float")
def call():
    edgelora.export(base, out, force=True)
"""


def test_kill_at_any_step_of_force_leaves_the_old_or_the_new_bundle(
    base: Path, tmp_path: Path
) -> None:
    definitions = """
def check():
    assert len(list(out.parent.iterdir())) <= 2
    if read_manifest(out)["plan"]["format"] != "float":
        edgelora.export(base, out, format="float", force=True)
        assert list(out.parent.iterdir()) == [out]
"""
    assert kill_at_every_step(KILLED_FORCE + definitions, base, tmp_path / "bundle") > 30


def test_kill_at_any_step_of_force_loses_nothing_where_folders_cannot_be_exchanged(
    base: Path, tmp_path: Path
) -> None:
    """The next export puts back a bundle that was set aside."""
    definitions = """
whole_folder._exchange = lambda one, other: False
def check():
    whole_folder._clear_abandoned(out)
    assert list(out.parent.iterdir()) == [out]
    if read_manifest(out)["plan"]["format"] != "float":
        edgelora.export(base, out, format="float", force=True)
"""
    assert kill_at_every_step(KILLED_FORCE + definitions, base, tmp_path / "bundle") > 30


def test_folder_of_a_running_export_is_left_alone(base: Path, tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as alive:
        running, dead = (tmp_path / f".bundle.partial-{pid}" for pid in (alive.pid, 2**22 + 1))
        running.mkdir()
        dead.mkdir()
        edgelora.export(base, tmp_path / "bundle")
        assert sorted(tmp_path.iterdir()) == [running, tmp_path / "bundle"]
        alive.kill()


def test_bundle_that_was_set_aside_is_not_replaced_without_force(
    base: Path, tmp_path: Path
) -> None:
    edgelora.export(base, tmp_path / "bundle")
    (tmp_path / "bundle").rename(tmp_path / f".bundle.old-{2**22 + 1}")
    with pytest.raises(EdgeLoraError, match="exists already"):
        edgelora.export(base, tmp_path / "bundle", format="float")
    assert read_manifest(tmp_path / "bundle")["plan"]["format"] == "int4"


@pytest.mark.parametrize(
    ("name", "words"),
    [("file/sub", "is a file"), ("b" * 260, "too long"), ("b" * 250, "too long")],
)
def test_place_that_cannot_be_made_is_named_as_it_was_given(
    base: Path, tmp_path: Path, name: str, words: str
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(EdgeLoraError) as caught:
        edgelora.export(base, tmp_path / name)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / name}: ") and words in said
    assert "partial" not in said and "\n" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_unwritable_parent_is_named_as_it_was_given(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *arguments: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(EdgeLoraError) as caught:
        edgelora.export(base, tmp_path / "bundle")
    assert str(caught.value).startswith(f"{tmp_path / 'bundle'}: Permission denied")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(EdgeLoraError, match=r"bundle: .* may not be written"):
        edgelora.export(base, tmp_path / "bundle")


def test_symlink_to_a_bundle_keeps_pointing_at_it(base: Path, tmp_path: Path) -> None:
    edgelora.export(base, tmp_path / "bundle", format="float")
    (tmp_path / "link").symlink_to(tmp_path / "bundle")
    edgelora.export(base, tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink()
    assert read_manifest(tmp_path / "bundle")["plan"]["format"] == "int4"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "link"]


def test_manifest_names_every_file(base: Path, tmp_path: Path) -> None:
    edgelora.export(base, tmp_path / "bundle")
    names = set(digests(tmp_path / "bundle")) - {NAME}
    fields = json.loads((tmp_path / "bundle" / NAME).read_text())
    assert set(fields["files"]) == names
    assert list(fields)[:3] == ["format", "format_version", "digest"]


def test_manifest_has_the_documented_fields(base: Path, adapter: Path, tmp_path: Path) -> None:
    edgelora.export(base, tmp_path / "bundle", adapters={"a": adapter})
    exported = read_manifest(tmp_path / "bundle")
    add_adapter(tmp_path / "bundle", "b", adapter, base=base)
    written = read_manifest(tmp_path / "bundle")
    text = (Path(__file__).parent.parent / "ARCHITECTURE.md").read_text()
    table = text.partition("### `manifest.json`")[2].partition("\nNo two adapters")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.MULTILINE))
    assert list(rows) == list(written)
    assert [row for row in rows if row not in ("selfcheck", "report")] == list(exported)
    inside = {key: written[key] for key in ("model", "base", "plan")}
    inside |= {"targets": written["targets"][0], "adapters": written["adapters"]["a"]}
    for key, fields in inside.items():
        assert set(fields) <= set(re.findall(r"\w+", rows[key])), key


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "int5"}, "format 'int5'"),
        ({"block_size": 48}, "block size 48"),
        ({"format": "nf4", "block_size": 32}, "nf4 has blocks of 64"),
        ({"context_length": 100_000}, "at most 256"),
        ({"mode": "merge"}, "exactly one adapter"),
        ({"device": "toaster"}, "toaster"),
    ],
)
def test_impossible_options_are_refused(
    base: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(EdgeLoraError, match=message):
        edgelora.export(base, tmp_path / "bundle", **options)
    assert not (tmp_path / "bundle").exists()


def test_name_that_is_no_text_is_refused_before_anything_is_written(
    base: Path, tmp_path: Path
) -> None:
    odd = tmp_path / os.fsdecode(b"base-\xff")
    shutil.copytree(base, odd)
    with pytest.raises(EdgeLoraError, match="not valid Unicode"):
        edgelora.export(odd, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("digest", ['"\\ud800"', '"abc"', "12", "null"])
def test_manifest_with_an_odd_digest_is_refused(base: Path, tmp_path: Path, digest: str) -> None:
    edgelora.export(base, tmp_path / "bundle")
    path = tmp_path / "bundle" / NAME
    changed = re.sub(r'"digest": "\w+"', lambda _: f'"digest": {digest}', path.read_text())
    path.write_text(changed)
    with pytest.raises(EdgeLoraError, match="digest"):
        read_manifest(tmp_path / "bundle")


WIDE: dict[str, int] = {
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "head_dim": 32,
    "num_key_value_heads": 4,
}  # fmt: skip
LINEARS, EMBEDDINGS = 7 * 128 * 128, 2 * 384 * 128  # weights; lm_head is one of the latter
INT8_BITS = 8 + 16 / 32  # blocks of 32, whatever the linears have
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # 4.127: codes, absmax codes, nested absmax
TABLES = 8 * (4 * 1024 + 7 * 4)  # bits: of four projections, and an offset for each linear


@pytest.mark.parametrize(
    ("options", "of_linears", "of_embeddings"),
    [
        ({"format": "float"}, 32, 32),
        ({}, NF4_BITS + TABLES / LINEARS, INT8_BITS),
        ({"format": "int4"}, 4 + 16 / 32, INT8_BITS),
        ({"format": "int4", "zero_points": True, "block_size": 64}, 4 + 20 / 64, INT8_BITS),
    ],
    ids=str,
)
def test_bits_a_weight_are_what_the_formats_take(
    options: dict[str, Any], of_linears: float, of_embeddings: float, tmp_path: Path
) -> None:
    base = tiny.tiny_bitsandbytes(tmp_path / "base", **WIDE)
    found = edgelora.export(base, tmp_path / "bundle", report=False, **options).bits_per_weight
    both = LINEARS * of_linears + EMBEDDINGS * of_embeddings
    assert found == pytest.approx(both / (LINEARS + EMBEDDINGS), rel=1e-12)


def test_alphas_in_doubt_are_warned_of(base: Path, tmp_path: Path) -> None:
    settings = {"target_modules": ["q_proj"], "alpha_pattern": {"0.*q_proj": 3, "q_proj": 5}}
    folder = make_adapter(base, tmp_path / "a", **settings)
    (said,) = edgelora.export(base, tmp_path / "b", adapters={"a": folder}).warnings
    assert said.startswith(
        "adapter a: alpha_pattern '0.*q_proj', 'q_proj': all match model.layers.0"
    )
    added = add_adapter(tmp_path / "b", "again", folder)
    assert added.warning is not None and added.warning.startswith(said.partition(": ")[0])
