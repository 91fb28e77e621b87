"""add-adapter: what is bound, what is refused, and that the bundle is usable at every moment."""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgelora
import oracle
import tiny
from edgelora import EdgeLoraError
from edgelora.adapter import model_name
from edgelora.adding import add_adapter
from edgelora.manifest import read_manifest, report_paths, sha256_file
from killing import kill_at_every_step
from test_float_oracle import TOKENS, make_adapter, with_adapter

PLAIN = "adapters/a/adapter.safetensors"
DISK_STEPS = [(os, "fsync"), (Path, "mkdir"), (Path, "rename"), (Path, "unlink")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def one(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("one"), target_modules=["q_proj"])


@pytest.fixture(scope="module")
def two(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("two"), target_modules=["v_proj"], r=2)


@pytest.fixture(scope="module")
def exported(base: Path, one: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "bundle"
    edgelora.export(base, out, adapters={"a": one})
    return out


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def adapter_files(bundle: Path) -> list[str]:
    found = (bundle / "adapters").rglob("*")
    return sorted(str(path.relative_to(bundle)) for path in found if path.is_file())


def test_force_writes_under_a_free_name_and_removes_the_old_file(bundle: Path, two: Path) -> None:
    entry = add_adapter(bundle, "a", two, force=True).entry
    digest = sha256_file(bundle / entry["path"])
    assert entry["path"] == f"adapters/a/adapter-{digest[:8]}.safetensors"
    assert adapter_files(bundle) == [entry["path"]]
    manifest = read_manifest(bundle)
    assert manifest["adapters"]["a"] == entry
    assert manifest["files"][entry["path"]]["sha256"] == digest
    assert PLAIN not in manifest["files"]


def without_selfcheck(bundle: Path) -> dict[str, Any]:
    """The manifest but for the self-check, which notes how noisy an adapter added alone is, and for
    the report, which leaves it out.
    """
    fields = read_manifest(bundle)
    fields["adapters"]["a"].pop("report", None)
    for path in report_paths(fields).values():
        fields["files"].pop(path)
    fields.pop("report", None)
    fields["files"].pop(fields.pop("selfcheck", "selfcheck.json"))
    return fields | {"digest": ""}


def test_force_and_back_gives_the_exported_bytes(bundle: Path, one: Path, two: Path) -> None:
    exported = without_selfcheck(bundle)
    for adapter in (one, one, two, one):
        add_adapter(bundle, "a", adapter, force=True)
    assert without_selfcheck(bundle) == exported
    assert adapter_files(bundle) == [PLAIN]


def test_replaced_adapter_runs(bundle: Path, two: Path) -> None:
    with edgelora.load(bundle) as model:
        old = model.logits([5, 6], adapter="a")
    add_adapter(bundle, "a", two, force=True)
    with edgelora.load(bundle) as model:
        assert (model.logits([5, 6], adapter="a") != old).any()


@pytest.mark.parametrize("step", DISK_STEPS, ids=lambda step: str(step[1]))
def test_failure_at_any_step_leaves_the_old_or_the_new_bundle(
    step: tuple[Any, str], exported: Path, tmp_path: Path, two: Path
) -> None:
    owner, name = step
    for failing in range(1, 16):
        bundle = Path(shutil.copytree(exported, tmp_path / f"{name}{failing}"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, failing_at(failing, getattr(owner, name)))
            try:
                add_adapter(bundle, "a", two, force=True)
            except EdgeLoraError as error:
                assert str(error).startswith(str(bundle)) and "\n" not in str(error)
            else:
                assert failing > 1
                return
        targets = {entry["targets"] for entry in read_manifest(bundle)["adapters"].values()}
        assert targets == {2}
        add_adapter(bundle, "a", two, force=True)
        assert len(adapter_files(bundle)) == 1
    pytest.fail(f"{name} fails still at its call {failing}")


def failing_at(step: int, original: Callable[..., Any]) -> Callable[..., Any]:
    calls = 0

    def hooked(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step:
            raise OSError(5, os.strerror(5))
        return original(*arguments, **options)

    return hooked


def test_kill_at_any_step_leaves_the_old_or_the_new_bundle(
    bundle: Path, one: Path, two: Path
) -> None:
    definitions = """
out, old, new = map(Path, sys.argv[1:])
def call():
    adding.add_adapter(out, "a", new, force=True)
def check():
    entry = read_manifest(out)["adapters"]["a"]
    left = [path for path in (out / "adapters").rglob("*") if path.is_file()]
    assert out / entry["path"] in left and len(left) <= 2, left
    adding.add_adapter(out, "a", old, force=True)
    assert len([path for path in (out / "adapters").rglob("*") if path.is_file()]) == 1
"""
    assert kill_at_every_step(definitions, bundle, one, two) >= 8


def test_adapter_of_another_base_is_refused_in_short(
    bundle: Path, tmp_path: Path, one: Path
) -> None:
    other = tiny.tiny_llama(tmp_path / "other", seed=1)
    edgelora.export(other, tmp_path / "theirs")
    with pytest.raises(EdgeLoraError) as caught:
        add_adapter(tmp_path / "theirs", "a", bundle / PLAIN)
    ours, theirs = (
        read_manifest(folder)["base"]["fingerprint"].removeprefix("sha256:")[:12]
        for folder in (bundle, tmp_path / "theirs")
    )
    assert f"the base {ours}, but" in str(caught.value)
    assert f"holds {theirs}: add it to a bundle of its own base" in str(caught.value)


def test_bound_file_is_added_as_it_is(bundle: Path, tmp_path: Path, base: Path) -> None:
    edgelora.export(base, tmp_path / "plain")
    add_adapter(tmp_path / "plain", "b", bundle / PLAIN)
    assert sha256_file(tmp_path / "plain/adapters/b/adapter.safetensors") == sha256_file(
        bundle / PLAIN
    )


@pytest.mark.parametrize(("name", "words"), [("A", "'a' and 'A'"), ("nul", "Windows")])
def test_name_that_is_no_folder_of_its_own_is_refused(
    bundle: Path, one: Path, name: str, words: str
) -> None:
    with pytest.raises(EdgeLoraError, match=words):
        add_adapter(bundle, name, one)


def test_export_refuses_names_that_differ_in_case_only(
    base: Path, one: Path, tmp_path: Path
) -> None:
    with pytest.raises(EdgeLoraError, match="'Pirate' and 'pirate'"):
        edgelora.export(base, tmp_path / "bundle", adapters={"Pirate": one, "pirate": one})
    assert list(tmp_path.iterdir()) == []


def test_calls_at_the_same_time_lose_no_adapter(bundle: Path, one: Path, two: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(add_adapter, bundle, f"n{i}", (one, two)[i % 2]) for i in range(8)]
        for call in calls:
            call.result()
    names = set(read_manifest(bundle)["adapters"])
    assert names == {"a", *(f"n{i}" for i in range(8))}


def test_replaced_adapter_s_folder_is_a_source(bundle: Path, two: Path, tmp_path: Path) -> None:
    add_adapter(bundle, "a", two, force=True)
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    add_adapter(other, "b", bundle / "adapters" / "a")
    with edgelora.load(other) as model:
        model.load_adapter("c", bundle / "adapters" / "a")
        assert np.array_equal(model.logits([1, 2], adapter="b"), model.logits([1, 2], adapter="c"))


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("owner/model", "owner/model"),
        ("/home/somebody/models/x", "x"),
        ("C:\\models\\y", "y"),
        ("./z/", "z"),
        ("plain", "plain"),
    ],
)
def test_manifest_holds_no_path_of_the_training_machine(given: str, kept: str) -> None:
    assert model_name(given) == kept


def test_dora_needs_the_base(bundle: Path, base: Path, tmp_path: Path) -> None:
    """Bound once by an export, its file can be added anywhere."""
    dora = make_adapter(base, tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    with pytest.raises(EdgeLoraError, match=r"rows of 2 base weights.*--base"):
        add_adapter(bundle, "d", dora)
    with pytest.raises(EdgeLoraError, match=r"flavor ort.*--mode merge"):
        edgelora.export(base, tmp_path / "ort", adapters={"d": dora}, flavor="ort")
    edgelora.export(base, tmp_path / "other", adapters={"d": dora})
    add_adapter(bundle, "d", tmp_path / "other" / "adapters" / "d" / "adapter.safetensors")
    with edgelora.load(bundle) as ours, edgelora.load(tmp_path / "other") as theirs:
        logits = ours.logits([1, 2, 3], adapter="d")
        assert np.array_equal(logits, theirs.logits([1, 2, 3], adapter="d"))
        assert not np.allclose(logits, ours.logits([1, 2, 3]))


def test_biases_are_bound_as_dora_is(bundle: Path, tmp_path: Path) -> None:
    """The base's own need the base, lora_B's do not; neither is in flavor ort."""
    base = tiny.tiny_qwen2(tmp_path / "base")
    trained = make_adapter(base, tmp_path / "t", target_modules=["q_proj"], bias="all")
    own = make_adapter(base, tmp_path / "o", target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(EdgeLoraError, match=r"6 biases take the place.*--mode merge"):
        edgelora.export(base, tmp_path / "ort", adapters={"t": trained}, flavor="ort")
    with pytest.raises(EdgeLoraError, match=r"lora_B has a bias in 2 targets.*--mode merge"):
        edgelora.export(base, tmp_path / "ort", adapters={"o": own}, flavor="ort")
    edgelora.export(base, tmp_path / "qwen", adapters={"t": trained})
    edgelora.export(base, tmp_path / "plain")
    with pytest.raises(EdgeLoraError, match=r"6 biases take the place.*--base"):
        add_adapter(tmp_path / "plain", "t", trained)
    add_adapter(tmp_path / "plain", "t", tmp_path / "qwen/adapters/t/adapter.safetensors")
    add_adapter(tmp_path / "plain", "o", own)
    edgelora.export(base, tmp_path / "both", adapters={"t": trained, "o": own})
    with edgelora.load(tmp_path / "plain") as ours, edgelora.load(tmp_path / "both") as theirs:
        plain = ours.logits([1, 2, 3])
        for name in ("t", "o"):
            logits = ours.logits([1, 2, 3], adapter=name)
            assert np.array_equal(logits, theirs.logits([1, 2, 3], adapter=name))
            assert not np.allclose(logits, plain)
        assert np.array_equal(ours.logits([1, 2, 3]), plain)
    entry = read_manifest(tmp_path / "plain")["adapters"]["t"]
    assert (entry["ranks"], entry["targets"]) == ([4], 6)


def test_trained_biases_of_a_base_without_them_are_refused(base: Path, tmp_path: Path) -> None:
    qwen = tiny.tiny_qwen2(tmp_path / "qwen")
    trained = make_adapter(qwen, tmp_path / "t", target_modules=["q_proj"], bias="lora_only")
    for mode in ("side", "merge"):
        with pytest.raises(EdgeLoraError, match=r"/t: .*base does not have.*0\.self_attn\.q_proj"):
            edgelora.export(base, tmp_path / "bundle", adapters={"t": trained}, mode=mode)


def test_merge_in_flavor_ort_takes_biases(tmp_path: Path) -> None:
    """Of a base without any: lora_B's become the linears' own."""
    base = tiny.tiny_qwen3(tmp_path / "base")
    own = make_adapter(base, tmp_path / "o", target_modules="all-linear", lora_bias=True)
    options = {"mode": "merge", "flavor": "ort", "format": "float"}
    edgelora.export(base, tmp_path / "bundle", adapters={"o": own}, **options)
    with edgelora.load(tmp_path / "bundle") as model:
        ours = model.logits(TOKENS)
    oracle.assert_close(
        ours, oracle.logits(with_adapter(oracle.float_model(base), own), TOKENS), 1e-4
    )
