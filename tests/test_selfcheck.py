"""The self-check: passes on what was exported, and on nothing that was changed since."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import edgelora
import tiny
from edgelora.calibration import Beside
from edgelora.checkpoint import open_checkpoint
from edgelora.errors import EdgeLoraError
from edgelora.graph import rotary_tables
from edgelora.manifest import HEAD_FIELDS, file_entries, manifest_bytes, read_manifest
from edgelora.selfcheck import RoundedArithmetic
from edgelora.verify import verify
from test_float_oracle import ARCHITECTURES, make_adapter
from test_quantized_oracle import FORMATS

ALL_FORMATS = {**FORMATS, "float": {"format": "float"}}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": "all-linear"},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "biases": {"target_modules": ["v_proj", "up_proj"], "lora_bias": True},
    "head": {"target_modules": ["lm_head"]},
}
DROPPED = "model.layers.1.self_attn.v_proj"
Tensors = dict[str, NDArray[Any]]
Metadata = dict[str, str]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "a": make_adapter(base, folder / "a", target_modules="all-linear"),
        "b": make_adapter(base, folder / "b", target_modules="all-linear", lora_alpha=6),
    }


@pytest.fixture(scope="module")
def exported(
    base: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """A bundle with these options, exported once."""
    made: dict[str, Path] = {}

    def export(**options: Any) -> Path:
        key = repr(options)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("exported") / "bundle"
            edgelora.export(base, made[key], adapters=adapters, report=False, **options)
        return made[key]

    return export


@pytest.fixture
def bundle(exported: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported(), tmp_path / "bundle"))


def rewrite_manifest(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """With true hashes, as if nothing had happened."""
    fields = json.loads((bundle / "manifest.json").read_text())
    change(fields)
    kept = {key: value for key, value in fields.items() if key not in HEAD_FIELDS}
    (bundle / "manifest.json").write_bytes(manifest_bytes(kept | {"files": file_entries(bundle)}))


def adapter_file(bundle: Path, name: str) -> Path:
    (file,) = (bundle / "adapters" / name).iterdir()
    return file


def edit_adapter(bundle: Path, change: Callable[[Tensors, Metadata], object]) -> None:
    """Adapter a."""
    file = adapter_file(bundle, "a")
    with safe_open(file, "numpy") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(tensors, metadata)
    save_file(tensors, file, metadata)
    rewrite_manifest(bundle, lambda fields: None)


def zero_b(tensors: Tensors, metadata: Metadata) -> None:
    for name, values in tensors.items():
        if name.endswith("lora_b"):
            values[:] = 0


def drop_one_target(tensors: Tensors, metadata: Metadata) -> None:
    for factor in ("lora_a", "lora_b"):
        del tensors[f"{DROPPED}.{factor}"]
    scaling = json.loads(metadata["scaling"])
    del scaling[DROPPED]
    metadata["scaling"] = json.dumps(scaling)


def drop_one_layer(tensors: Tensors, metadata: Metadata) -> None:
    for name, values in tensors.items():
        if name.startswith("model.layers.0.") and name.endswith("lora_b"):
            values[:] = 0


def double_scaling(tensors: Tensors, metadata: Metadata) -> None:
    scaling = json.loads(metadata["scaling"])
    metadata["scaling"] = json.dumps({name: 2 * value for name, value in scaling.items()})


def selfcheck(bundle: Path, accuracy: str) -> tuple[Any, ...]:
    with edgelora.load(bundle, accuracy=accuracy, threads=1) as model:  # type: ignore[arg-type]
        return model.selfcheck()


def refuse(bundle: Path, pattern: str, *accuracies: str) -> None:
    for accuracy in accuracies or ("float", "int8"):
        with pytest.raises(EdgeLoraError, match=pattern) as info:
            selfcheck(bundle, accuracy)
        assert "\n" not in str(info.value)


def assert_passes(bundle: Path, *names: str, flavor: str = "edgelora") -> None:
    for accuracy in ("float", "int8") if flavor == "edgelora" else ("int8",):
        results = selfcheck(bundle, accuracy)
        passes = 1 if accuracy == "float" or flavor == "ort" else 2
        assert [each.adapter for each in results] == [None, *names] * passes
        assert all(each.checked and each.logits == 2 * 6 * 8 for each in results)
        assert all(each.error <= each.tolerance for each in results)
        exact = [each for each in results if each.accuracy == "float"]
        assert len(exact) == (0 if flavor == "ort" else 1 + len(names))
        assert all(each.error <= each.tolerance / 5 for each in exact)


# ---- what was exported passes ----


@pytest.mark.parametrize("kind", ALL_FORMATS)
def test_every_format_passes(exported: Callable[..., Path], kind: str) -> None:
    assert_passes(exported(**ALL_FORMATS[kind]), "a", "b")


@pytest.mark.parametrize("kind", ["int4_32", "int4_128", "float"])
def test_flavor_ort_passes(exported: Callable[..., Path], kind: str) -> None:
    bundle = exported(flavor="ort", **ALL_FORMATS[kind])
    assert_passes(bundle, "a", "b", flavor="ort")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["side", "merge"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kind_of_adapter_passes(
    architecture: str, kind: str, mode: str, tmp_path: Path
) -> None:
    base = ARCHITECTURES[architecture](tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", **KINDS[kind])
    edgelora.export(base, tmp_path / "b", adapters={"a": adapter}, mode=mode, report=False)
    names = ["a"] if mode == "side" else []
    assert_passes(tmp_path / "b", *names)


def test_short_context_passes(base: Path, tmp_path: Path) -> None:
    edgelora.export(base, tmp_path / "b", context_length=1, report=False)
    (result,) = selfcheck(tmp_path / "b", "float")
    assert result.logits == 2 * 8


def test_equal_exports_foresee_the_same(
    base: Path, adapters: dict[str, Path], exported: Callable[..., Path], tmp_path: Path
) -> None:
    edgelora.export(base, tmp_path / "b", adapters=adapters, report=False)
    mine, theirs = ((each / "selfcheck.json").read_bytes() for each in (tmp_path / "b", exported()))
    assert mine == theirs


@pytest.mark.parametrize("ours", [True, False])
def test_the_tolerance_knows_that_a_side_branch_is_in_int8(base: Path, *, ours: bool) -> None:
    """A has a scale for 32 inputs, t and B one for a row; flavor ort computes them in float."""
    rng = np.random.default_rng(0)
    x, lora_a, lora_b = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((5, 96), (6, 96), (9, 6))
    )
    beside = Beside(np.zeros((9, 96), np.float32), None, lora_a, lora_b)
    config = open_checkpoint(base).config
    rotary = rotary_tables(config, 8)
    arithmetic = RoundedArithmetic(config, 8, rotary, 32, ours=ours)
    found = arithmetic.linear(x, beside, np.zeros(0, np.float32))
    exact = in_int8(x, 32) @ lora_a.T @ lora_b.T
    if ours:
        t = in_int8(x, 32) @ in_int8(lora_a, 32).T
        rough = in_int8(t, 6) @ in_int8(lora_b, 6).T
        np.testing.assert_allclose(found, rough, rtol=1e-4, atol=1e-4)
        t_exact = in_int8(x, 32) @ lora_a.T @ in_int8(lora_b, 6).T
        assert np.abs(rough - t_exact).max() > 1e-2 and np.abs(rough - exact).max() > 1e-2
    else:
        np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-4)


def in_int8(values: NDArray[np.float32], block: int) -> NDArray[np.float32]:
    """To the nearest of 255 values up to the largest magnitude of each block of a row."""
    blocks = values.reshape(len(values), -1, block).astype(np.float64)
    steps = np.abs(blocks).max(-1, keepdims=True) / 127
    return np.asarray((np.rint(blocks / steps) * steps).reshape(values.shape), np.float32)


# ---- what was changed does not ----


@pytest.mark.parametrize("kind", ["int4_32", "nf4", "float"])
@pytest.mark.parametrize("change", [zero_b, drop_one_target, drop_one_layer, double_scaling])
def test_changed_adapter_is_found(
    exported: Callable[..., Path],
    change: Callable[[Tensors, Metadata], object],
    kind: str,
    tmp_path: Path,
) -> None:
    bundle = Path(shutil.copytree(exported(**ALL_FORMATS[kind]), tmp_path / "bundle"))
    edit_adapter(bundle, change)
    refuse(bundle, r'adapter "a" computes other logits.*float.*token [0-9]+: expected .*, found')
    with pytest.raises(EdgeLoraError, match='adapter "a" computes other logits'):
        list(verify(bundle))


@pytest.mark.parametrize("kind", KINDS)
def test_changed_factors_of_every_kind_are_found(base: Path, kind: str, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", **KINDS[kind])
    edgelora.export(base, tmp_path / "b", adapters={"a": adapter}, report=False)
    edit_adapter(tmp_path / "b", zero_b)
    refuse(tmp_path / "b", 'adapter "a" computes other logits', "float")


@pytest.mark.parametrize("name", ["row_factor", "bias"])
def test_changed_row_factors_and_biases_are_found(base: Path, name: str, tmp_path: Path) -> None:
    kind = {"row_factor": "dora", "bias": "biases"}[name]
    adapter = make_adapter(base, tmp_path / "adapter", **KINDS[kind])
    edgelora.export(base, tmp_path / "b", adapters={"a": adapter}, report=False)

    def halve_one(tensors: Tensors, metadata: Metadata) -> None:
        values = next(v for n, v in tensors.items() if n.endswith(name))
        values *= 0.5

    edit_adapter(tmp_path / "b", halve_one)
    refuse(tmp_path / "b", 'adapter "a" computes other logits', "float")


@pytest.mark.parametrize("flavor", ["edgelora", "ort"])
def test_swapped_adapters_are_found(
    exported: Callable[..., Path], flavor: str, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(exported(flavor=flavor), tmp_path / "bundle"))
    first, second = (adapter_file(bundle, name) for name in ("a", "b"))
    first.rename(tmp_path / "first")
    second.rename(first)
    (tmp_path / "first").rename(second)
    rewrite_manifest(bundle, lambda fields: None)
    accuracies = ("int8",) if flavor == "ort" else ("float", "int8")
    refuse(bundle, 'adapter "a" computes other logits', *accuracies)


def test_swapped_entries_of_the_manifest_are_found(bundle: Path) -> None:
    def swap(fields: dict[str, Any]) -> None:
        adapters = fields["adapters"]
        adapters["a"], adapters["b"] = adapters["b"], adapters["a"]

    rewrite_manifest(bundle, swap)
    refuse(bundle, 'adapter "a" computes other logits')


@pytest.mark.parametrize(
    "change", [lambda scaling: 2 * scaling, lambda scaling: 0], ids=["doubled", "zeroed"]
)
def test_flavor_ort_finds_changed_factors(
    base: Path,
    adapters: dict[str, Path],
    exported: Callable[..., Path],
    change: Callable[[int], int],
    tmp_path: Path,
) -> None:
    """B holds the scaling there."""
    other = Path(shutil.copytree(adapters["a"], tmp_path / "other"))
    tensors = load_file(other / "adapter_model.safetensors")
    changed = {n: change(1) * v if "lora_B" in n else v for n, v in tensors.items()}
    save_file(changed, other / "adapter_model.safetensors")
    edgelora.export(base, tmp_path / "o", adapters={"a": other}, flavor="ort", report=False)
    bundle = Path(shutil.copytree(exported(flavor="ort"), tmp_path / "bundle"))
    shutil.copy(adapter_file(tmp_path / "o", "a"), adapter_file(bundle, "a"))
    rewrite_manifest(bundle, lambda fields: None)
    refuse(bundle, 'adapter "a" computes other logits', "int8")


@pytest.mark.parametrize("kind", ["int4_32", "nf4", "float"])
def test_damaged_weights_are_found(
    exported: Callable[..., Path], kind: str, tmp_path: Path
) -> None:
    """64 bytes of a layer's codes, hashes set right."""
    bundle = Path(shutil.copytree(exported(**ALL_FORMATS[kind]), tmp_path / "bundle"))
    file = bundle / "model.onnx.data"
    data = bytearray(file.read_bytes())
    at = len(data) // 2 // 64 * 64
    data[at : at + 64] = bytes(data[at + 2048 : at + 2048 + 64])
    file.write_bytes(data)
    rewrite_manifest(bundle, lambda fields: None)
    refuse(bundle, "self-check: the base computes other logits", "float")


def test_adapter_that_computes_nan_is_found(bundle: Path) -> None:
    def overflow(tensors: Tensors, metadata: Metadata) -> None:
        double = json.loads(metadata["scaling"])
        metadata["scaling"] = json.dumps(dict.fromkeys(double, 1e38))

    edit_adapter(bundle, overflow)
    for accuracy in ("float", "int8"):
        with pytest.raises(
            EdgeLoraError, match=r'adapter "a" computes other logits.*found (-?nan|-?inf|.*e)'
        ):
            selfcheck(bundle, accuracy)


def test_model_itself_is_checked_after_its_exact_twin(bundle: Path) -> None:
    """An int8 tolerance that no int8 meets: float passes, the model does not."""
    file = bundle / "selfcheck.json"
    fields = json.loads(file.read_text())
    for each in fields["expected"]:
        each["int8_tolerance"] = 1e-6
    file.write_text(json.dumps(fields))
    rewrite_manifest(bundle, lambda fields: None)
    assert len(selfcheck(bundle, "float")) == 3
    refuse(bundle, "the base computes other logits.*accuracy int8", "int8")


@pytest.mark.parametrize("change", [zero_b, double_scaling])
def test_int8_alone_finds_gross_changes(
    bundle: Path, change: Callable[[Tensors, Metadata], object]
) -> None:
    file = bundle / "selfcheck.json"
    fields = json.loads(file.read_text())
    for each in fields["expected"]:
        each["float_tolerance"] = 1e6
    file.write_text(json.dumps(fields))
    edit_adapter(bundle, change)
    refuse(bundle, 'adapter "a" computes other logits.*accuracy int8', "int8")


# ---- what nothing is known of ----


def forget(bundle: Path, adapter: str) -> None:
    """As an edgelora that wrote no expectations for what it added left it."""
    rewrite_manifest(bundle, lambda fields: fields["adapters"][adapter].pop("selfcheck"))
    file = bundle / read_manifest(bundle).get("selfcheck", "selfcheck.json")
    fields = json.loads(file.read_text())
    fields["expected"] = [each for each in fields["expected"] if each["adapter"] != adapter]
    file.write_text(json.dumps(fields))
    rewrite_manifest(bundle, lambda fields: None)


def test_adapter_without_expectations_is_said_to_be_unchecked(bundle: Path) -> None:
    forget(bundle, "b")
    results = {each.adapter: each.checked for each in selfcheck(bundle, "int8")}
    assert results == {None: True, "a": True, "b": False}
    (said,) = [check.detail for check in verify(bundle) if check.what == "adapter b"]
    assert said.startswith("not self-checked: added without, by an older edgelora")


def test_bundle_without_expectations_says_so(bundle: Path) -> None:
    (bundle / "selfcheck.json").unlink()
    rewrite_manifest(bundle, lambda fields: None)
    refuse(bundle, "has no selfcheck.json; export the bundle again")
    said = [check.detail for check in verify(bundle) if "self-check" in check.detail]
    assert len(said) == 3 and all("not self-checked: exported without" in s for s in said)


# ---- a file that was edited by hand ----


def set_at(*path: Any) -> Callable[[Any], None]:
    """The last is the value."""
    *keys, last, value = path

    def change(fields: Any) -> None:
        for key in keys:
            fields = fields[key]
        fields[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (set_at("format", "else"), "is no self-check of EdgeLoRA"),
        (set_at("format_version", 2), "made by a newer EdgeLoRA: update the runtime"),
        (set_at("format_version", "1"), "format_version is not an integer"),
        (set_at("prompts", 0, 3, 384), "prompts is 384, not in 0…383"),
        (set_at("prompts", 0, []), "prompts is not lists of 1 to"),
        (set_at("prompts", 7), "prompts is not a list"),
        (set_at("prompts", 0, 0, 1.5), "prompts is not an integer"),
        (set_at("expected", []), "does not have the base"),
        (set_at("expected", 1, "adapter", "c"), 'is "c", which the bundle does not have'),
        (set_at("expected", 1, "adapter", "b"), 'listed twice: "b"'),
        (lambda fields: fields["expected"].pop(), 'does not have adapter "b"'),
        (set_at("expected", 0, "tokens", 0, 0, 0, -1), "tokens is -1, not in 0…383"),
        (set_at("expected", 0, "tokens", 0, 5), "tokens is not a list"),
        (set_at("expected", 0, "tokens", []), "tokens is not a list of 2"),
        (set_at("expected", 0, "tokens", 0, [[1]] * 11), "not a list of the prompt's positions"),
        (set_at("expected", 0, "logits", 0, 0, 0, "x"), "logits is not a finite number"),
        (set_at("expected", 0, "logits", 0, 0, [1.5]), "logits is not a list of 8"),
        (set_at("expected", 0, "logits", 0, 0, 0, float("nan")), "not valid JSON"),
        (set_at("expected", 0, "float_tolerance", 0), "tolerance that is not above 0"),
        (set_at("expected", 0, "float_tolerance", None), "float_tolerance is not a finite number"),
        (set_at("expected", 0, 3), "expected is not an object"),
    ],
)
def test_edited_file_is_refused_in_one_line(
    bundle: Path, change: Callable[[Any], object], pattern: str
) -> None:
    file = bundle / "selfcheck.json"
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))
    rewrite_manifest(bundle, lambda fields: None)
    refuse(bundle, f"^{file}.*{pattern}", "float")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1e999}', "[" * 100])
def test_file_that_is_no_json_is_refused_in_one_line(bundle: Path, text: str) -> None:
    (bundle / "selfcheck.json").write_text(text)
    rewrite_manifest(bundle, lambda fields: None)
    refuse(bundle, "selfcheck.json: .*(not valid JSON|no object|nested too deeply)", "float")


def test_changed_expectation_fails(bundle: Path) -> None:
    file = bundle / "selfcheck.json"
    fields = json.loads(file.read_text())
    logits = np.array(fields["expected"][2]["logits"])
    logits[1, 5, 7] += 0.5
    fields["expected"][2]["logits"] = logits.tolist()
    file.write_text(json.dumps(fields))
    rewrite_manifest(bundle, lambda fields: None)
    token = fields["expected"][2]["tokens"][1][5][7]
    refuse(bundle, f'adapter "b" .*prompt 1, position 9, token {token}: expected', "float")
