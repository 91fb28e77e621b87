"""Bundles of flavor `ort` in our runtime: adapters, what is refused, damaged files, commands."""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import edgelora
import oracle
import tiny
from edgelora import EdgeLoraError, native
from edgelora.manifest import HEAD_FIELDS, file_entries, manifest_bytes
from test_cli import fails, ok
from test_flavors import export_ort
from test_float_oracle import TOKENS, make_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def bundle(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_ort(base, tmp_path_factory.mktemp("ort"))


def test_switched_adapter_computes_all_positions_anew(bundle: Path) -> None:
    with edgelora.load(bundle) as model, model.session(adapter="a") as session:
        for name in ("a", None, "b", "a"):
            session.adapter = name
            session.prefill(TOKENS[:1])
            seen = TOKENS[:1] * session.position
            expected = model.logits(seen, adapter=name)[-1]
            assert session.timings.prefill_tokens == session.position
            assert session.last_logits is not None
            oracle.assert_close(session.last_logits, expected, 1e-5)


def test_sessions_run_at_once_with_their_own_adapters(bundle: Path) -> None:
    names = [None, "a", "b", "a"]
    with edgelora.load(bundle) as model:
        expected = [model.logits(TOKENS, adapter=name) for name in names]
        with ThreadPoolExecutor(len(names)) as pool:
            for _ in range(5):
                found = list(pool.map(lambda name: model.logits(TOKENS, adapter=name), names))
                for ours, alone in zip(found, expected, strict=True):
                    oracle.assert_close(ours, alone, 1e-5)


def test_unloaded_adapter_is_not_found_until_loaded_again(bundle: Path) -> None:
    with edgelora.load(bundle) as model, model.session(adapter="a") as session:
        session.prefill(TOKENS)
        model.unload_adapter("a")
        with pytest.raises(EdgeLoraError, match="unknown or unloaded"):
            session.decode(1)
        session.adapter = "a"
        assert len(session.decode(1, ignore_eos=True)) == 1


def test_only_one_adapter_with_weight_1_is_taken(bundle: Path) -> None:
    with edgelora.load(bundle) as model:
        expected = model.logits(TOKENS, adapter="a")
        assert np.array_equal(model.logits(TOKENS, adapter={"a": 1.0}), expected)
        for weights in ({"a": 0.5}, {"a": 0.5, "b": 0.5}, {"a": 1.0, "b": 1.0}):
            with pytest.raises(EdgeLoraError, match="one adapter at a time with weight 1"):
                model.logits(TOKENS, adapter=weights)


def test_what_flavor_ort_lacks_is_refused_in_one_line(bundle: Path) -> None:
    with pytest.raises(EdgeLoraError, match="one accuracy only"):
        edgelora.load(bundle, accuracy="float")
    file = bundle / "adapters" / "a" / "adapter.onnx_adapter"
    with edgelora.load(bundle) as model, pytest.raises(EdgeLoraError, match="name no base"):
        model.load_adapter("c", file)


def test_handles_of_the_other_flavor_are_refused(base: Path, bundle: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "a", target_modules="all-linear")
    edgelora.export(base, tmp_path / "own", adapters={"a": adapter})
    with edgelora.load(bundle) as stock, edgelora.load(tmp_path / "own") as own:
        for model, other in ((stock, own), (own, stock)):
            handle = other.adapter_handle("a")
            with model.session() as session, pytest.raises(EdgeLoraError, match="another flavor"):
                set_handle(session, handle)


def set_handle(session: edgelora.Session, handle: int) -> None:
    """As Session.set_adapter, which knows its own model's handles only."""
    library = session._library
    status = library.edgelora_session_set_adapter(session._pointer, handle, False)
    native.check(library, status)


def test_damaged_adapter_is_an_error_or_harmless(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    whole = (copy / "adapters" / "b" / "adapter.onnx_adapter").read_bytes()
    paths = {}
    for i, data in enumerate(damaged(whole)):
        paths[str(i)] = {"path": f"adapters/{i}/adapter.onnx_adapter"}
        (copy / "adapters" / str(i)).mkdir()
        (copy / paths[str(i)]["path"]).write_bytes(data)
    index_anew(copy, adapters=paths)
    refused = 0
    with edgelora.load(copy) as model:
        for name in model.adapters:
            try:
                model.logits(TOKENS[:1], adapter=name)
            except EdgeLoraError as error:
                assert "adapter.onnx_adapter: " in str(error)
                assert "SHA-256" not in str(error)
                refused += 1
    assert refused > 300


def index_anew(bundle: Path, **changes: Any) -> None:
    """A manifest with the files' true sizes and hashes, so that only their contents are wrong."""
    path = bundle / "manifest.json"
    fields = json.loads(path.read_bytes()) | {"files": file_entries(bundle)} | changes
    path.write_bytes(manifest_bytes({key: fields[key] for key in fields if key not in HEAD_FIELDS}))


def damaged(whole: bytes) -> Iterator[bytes]:
    """Cut short, and with bytes changed: all of the head, some of the rest."""
    for size in (*range(1, 64), len(whole) // 2, len(whole) - 1):
        yield whole[:size]
    generator = np.random.default_rng(0)
    for position in (*range(256), *generator.integers(256, len(whole), 256)):
        for value in (0x00, 0x7F, 0xFF):
            changed = bytearray(whole)
            changed[position] = value
            if changed != whole:
                yield bytes(changed)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.layers.0.self_attn.q_proj.lora_a": None}, "lacks one of its factors"),
        ({"model.layers.9.side.lora_a": (4, 4)}, "no linear of the base"),
        ({"model.layers.0.self_attn.q_proj.lora_a": (3, 4)}, "do not fit"),
        ({"model.layers.0.self_attn.q_proj.lora_a": (4,)}, "no matrix"),
        ({"model.layers.0.self_attn.q_proj.lora_a": np.nan}, "NaN or infinity"),
        ({"model.layers.0.self_attn.q_proj.lora_a": np.float16}, "not float32"),
        (None, "changes no targets"),
    ],
    ids=str,
)
def test_adapter_that_does_not_fit_is_refused(
    bundle: Path, change: Any, said: str, tmp_path: Path
) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    file = copy / "adapters" / "b" / "adapter.onnx_adapter"
    stored = onnxruntime.AdapterFormat.read_adapter(str(file))
    arrays = {name: value.numpy().copy() for name, value in stored.get_parameters().items()}
    arrays = {} if change is None else changed_arrays(arrays, change)
    stored.set_parameters(
        {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    )
    stored.export_adapter(str(file))
    index_anew(copy)
    with edgelora.load(copy) as model, pytest.raises(EdgeLoraError, match=said) as info:
        model.logits([0], adapter="b")
    assert "\n" not in str(info.value)


def changed_arrays(arrays: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """None leaves an array out; a shape, a type or a value takes the place of its own."""
    ((name, new),) = change.items()
    old = arrays.pop(name, np.zeros(1, np.float32))
    if isinstance(new, tuple):
        arrays[name] = np.zeros(new, np.float32)
    elif isinstance(new, type):
        arrays[name] = old.astype(new)
    elif new is not None:
        arrays[name] = np.full_like(old, new)
    return arrays


def test_commands_work_on_an_ort_bundle(bundle: Path) -> None:
    assert "adapter b" in ok("verify", bundle)
    run = ("run", bundle, "--prompt", "x", "--max-tokens", 3, "--json")
    said = json.loads(ok(*run, "--adapter", "a"))
    assert said["adapter"] == {"a": 1.0} and len(said["token_ids"]) <= 3
    assert "weight 1" in fails(*run, "--adapter", "a:0.5")
    arguments = ("--prompt-tokens", 4, "--new-tokens", 2, "--repeats", 1, "--json")
    assert json.loads(ok("bench", bundle, "--adapter", "b", *arguments))["isa"] == "onnxruntime"
    assert "b> " in ok("chat", bundle, "--max-tokens", 2, text="/adapter b\nhello\n/quit\n")
