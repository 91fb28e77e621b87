"""What loading refuses: damaged and foreign files, a wrong onnxruntime, too many threads."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

import edgelora
import toy_bundle
from edgelora import native
from edgelora.errors import EdgeLoraError
from toy_bundle import CONTEXT_LENGTH, VOCAB_SIZE, write_manifest, write_toy_bundle

TOKENS = [(7 * i + 5) % 60 for i in range(CONTEXT_LENGTH)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_toy_bundle(tmp_path_factory.mktemp("toy") / "bundle")


@pytest.fixture
def copy(bundle, tmp_path):
    """A bundle of one's own to damage."""
    return shutil.copytree(bundle, tmp_path / "copy")


def refuse(bundle: Path, pattern: str) -> None:
    with pytest.raises(EdgeLoraError, match=pattern) as info:
        edgelora.load(bundle)
    assert "\n" not in str(info.value)


def test_every_flipped_byte_of_the_manifest_is_refused(copy):
    path = copy / "manifest.json"
    raw = path.read_bytes()
    for i in range(0, len(raw), 97):
        path.write_bytes(raw[:i] + bytes([raw[i] ^ 1]) + raw[i + 1 :])
        refuse(copy, "manifest.json")


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ('{"format": 1e999}', "not valid JSON"),
        ('{"format": "\xff"}', "not valid JSON"),
        ('{"format": 1, "format": 2}', 'the key "format" twice'),
        ("[" * 100_000, "nested too deeply"),
        ('{"plan": ' + "[" * 40 + "]" * 40 + "}", "nested too deeply"),
        ("[]", "no object"),
    ],
)
def test_manifest_that_is_no_json_of_ours_is_refused(copy, text, pattern):
    (copy / "manifest.json").write_bytes(text.encode("latin1"))
    refuse(copy, f"^{copy}/manifest.json: .*{pattern}")


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_truncated_manifest_is_refused(copy, size):
    path = copy / "manifest.json"
    path.write_bytes(path.read_bytes()[:size])
    refuse(copy, "not valid JSON|digest" if size >= 0 else "digest")


@pytest.mark.parametrize(
    "name", ["model.onnx", "model.onnx.data", "adapters/one/adapter.safetensors"]
)
def test_missing_file_is_refused_by_name(copy, name):
    (copy / name).unlink()
    refuse(copy, f"{name}: .*missing")


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
@pytest.mark.parametrize("change", [-1, 1])
def test_file_of_another_size_is_refused_by_name(copy, name, change):
    raw = (copy / name).read_bytes()
    (copy / name).write_bytes(raw[:-1] if change < 0 else raw + b"\0")
    refuse(copy, f"{name}: has {len(raw) + change} bytes, the manifest says {len(raw)}")


def test_folder_without_manifest_is_refused(tmp_path):
    refuse(tmp_path, r"manifest.json: .*folder of a bundle\?")


def test_newer_format_says_to_update(copy):
    path = copy / "manifest.json"
    fields = json.loads(path.read_bytes()) | {"format_version": 2}
    path.write_text(json.dumps(fields))
    refuse(copy, "made by a newer EdgeLoRA: update the runtime")


def test_graph_of_the_other_flavor_is_refused(copy):
    write_manifest(copy, flavor="ort")
    refuse(copy, "input adapter_ids is unknown; .*q_proj.lora_a is missing")


@pytest.mark.parametrize(
    "path", ["../outside", "a/../../b", "/etc/hostname", "a\\b", "C:x", "", "a//b", "./a", "a/"]
)
def test_path_that_is_not_plain_is_refused(copy, path):
    files = json.loads((copy / "manifest.json").read_bytes())["files"]
    write_manifest(copy, files=files | {path: {"size": 1, "sha256": "0" * 64}})
    refuse(copy, "not a plain path inside the bundle")


def test_link_out_of_the_bundle_is_refused(copy, tmp_path):
    outside = shutil.move(copy / "model.onnx.data", tmp_path / "outside")
    (copy / "model.onnx.data").symlink_to(outside)
    refuse(copy, "model.onnx.data: is a link out of the bundle")


def test_folder_in_place_of_a_file_is_refused(copy):
    (copy / "model.onnx").unlink()
    (copy / "model.onnx").mkdir()
    refuse(copy, "model.onnx: is not a regular file")


@pytest.mark.parametrize(
    ("key", "value", "pattern"),
    [
        ("vocab_size", 0, "vocab_size is 0, not in"),
        ("vocab_size", -1, "vocab_size is -1"),
        ("vocab_size", 2**63, "vocab_size is 9223372036854775808"),
        ("vocab_size", 61.0, "vocab_size is not an integer"),
        ("vocab_size", "61", "vocab_size is not an integer"),
        ("vocab_size", None, "vocab_size is not an integer"),
        ("num_hidden_layers", 10**9, "num_hidden_layers is 1000000000"),
        ("context_length", 2**40, "context_length is"),
        ("head_dim", True, "head_dim is not an integer"),
        ("eos_token_ids", [VOCAB_SIZE], f"eos_token_ids is {VOCAB_SIZE}"),
        ("eos_token_ids", 3, "eos_token_ids is not a list"),
        ("bos_token_id", -1, "bos_token_id is -1"),
    ],
)
def test_number_out_of_range_is_refused_by_name(copy, key, value, pattern):
    write_manifest(copy, model=toy_bundle.model_fields(**{key: value}))
    refuse(copy, f"manifest.json: model: {pattern}")


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"model": 3}, "model is not an object"),
        ({"base": {"fingerprint": "abc"}}, "fingerprint is not"),
        ({"targets": [{"name": "a", "in_features": 1}]}, "out_features is missing"),
        ({"targets": [{"name": "a", "in_features": 1, "out_features": 1}] * 2}, "listed twice"),
        ({"adapters": {"x": {"path": "adapters/x"}}}, "not among the bundle's files"),
        ({"files": {}, "adapters": {}}, '"model.onnx" is not among'),
        ({"files": {"model.onnx": {"size": -1, "sha256": "0" * 64}}}, "size is -1"),
        ({"files": {"model.onnx": {"size": 1, "sha256": "0"}}}, "not 64 hex digits"),
        ({"flavor": "vanilla"}, "unknown flavor"),
    ],
)
def test_malformed_index_is_refused_by_name(copy, changes, pattern):
    write_manifest(copy, **changes)
    refuse(copy, pattern)


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"head_dim": 32}, r"past_key_values.0.key is float32 \[\?, 2, \?, 16\], not .*32"),
        ({"num_hidden_layers": 2}, "past_key_values.1.key is missing"),
        ({"vocab_size": 62}, "logits is"),
    ],
)
def test_graph_that_does_not_fit_the_manifest_is_refused(copy, changes, pattern):
    write_manifest(copy, model=toy_bundle.model_fields(**changes))
    refuse(copy, f"model.onnx does not fit the manifest.*{pattern}")


def test_long_list_of_what_does_not_fit_is_cut(copy):
    write_manifest(copy, model=toy_bundle.model_fields(num_hidden_layers=1000))
    refuse(copy, r"(input past_key_values.\d+.\w+ is missing; ){8}and 3988 more; export")


def status_of_loading(folder: Path) -> int:
    library = native.open_library(native.library_path())
    path = str(native.onnxruntime_path()).encode()
    options = native.options(
        native.ModelOptions, library.edgelora_model_options_init, onnxruntime_path=path
    )
    pointer = native.ModelPointer()
    return library.edgelora_model_load(
        str(folder).encode(), ctypes.byref(options), ctypes.byref(pointer)
    )


def change_graph(folder: Path, change: Callable[[onnx.GraphProto], None]) -> None:
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    graph.opset_import.append(onnx.helper.make_opsetid("edgelora", 1))
    change(graph.graph)
    (folder / "model.onnx").write_bytes(graph.SerializeToString())
    write_manifest(folder)


def test_operator_that_refuses_its_weights_is_a_bad_file(copy):
    def change(graph):
        graph.node[0].CopyFrom(
            onnx.helper.make_node(
                "Embedding", ["input_ids", "embedding"], ["embedded"], "e", domain="edgelora",
                format="int5", out_features=VOCAB_SIZE,
            )
        )  # fmt: skip

    change_graph(copy, change)
    refuse(copy, 'edgelora.Embedding e: format is "int5".*; copy or export the bundle again$')
    assert status_of_loading(copy) == 2


def test_what_an_operator_refuses_keeps_its_status(copy):
    """SwiGlu wants an even width; the logits have 61."""

    def change(graph):
        graph.node[-1].output[0] = "odd"
        swiglu = onnx.helper.make_node("SwiGlu", ["odd"], ["logits"], "s", domain="edgelora")
        graph.node.append(swiglu)

    change_graph(copy, change)
    with edgelora.load(copy) as model, model.session() as session:
        tokens = (ctypes.c_int32 * 1)(5)
        assert model.library.edgelora_session_prefill(session._pointer, tokens, 1) == 1
        message = model.library.edgelora_last_error().decode()
    assert "edgelora.SwiGlu s: x is [1, 1, 61], expected an even last dimension" in message
    assert "EDGELORA_" not in message


@pytest.mark.parametrize(
    ("damaged", "reason"),
    [(b"\xff" * 1000, "is no ONNX model"), (b"\x3a\x04\x0a\x02\xff\xff", "onnxruntime: .*")],
)
def test_damaged_graph_is_refused_with_the_reason(copy, damaged, reason):
    """Bytes that are no message; a graph whose node is none."""
    (copy / "model.onnx").write_bytes(damaged)
    write_manifest(copy)
    refuse(copy, f"^{copy}/model.onnx: {reason}; copy or export the bundle again")


def flip_a_byte(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


DAMAGED = "does not have the SHA-256 in the manifest.*copy the bundle again"


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json"])
def test_flipped_byte_of_a_small_file_is_refused_by_name(copy, name):
    (copy / "tokenizer.json").write_text("{}")
    write_manifest(copy)
    flip_a_byte(copy / name)
    refuse(copy, f"^{copy}/{name}: {DAMAGED}")


def test_flipped_byte_of_an_adapter_is_refused_when_it_is_loaded(copy):
    path = copy / "adapters/one/adapter.safetensors"
    flip_a_byte(path)
    with edgelora.load(copy) as model:
        with pytest.raises(EdgeLoraError, match=f"^{path}: {DAMAGED}"):
            model.logits([1], adapter="one")
        model.logits([1], adapter="two")


def test_large_file_is_checked_by_size_alone(copy):
    """Hashing hundreds of megabytes would take longer than loading them; verify does."""
    path = copy / "large"
    path.write_bytes(bytes((16 << 20) + 1))
    write_manifest(copy)
    flip_a_byte(path)
    edgelora.load(copy).close()


def test_missing_onnxruntime_is_said(bundle, monkeypatch):
    monkeypatch.setattr(native, "onnxruntime_path", lambda: Path("/nowhere/libonnxruntime.so"))
    refuse(bundle, "cannot load onnxruntime from /nowhere/libonnxruntime.so: .*; install it")


def fake_onnxruntime(folder, source):
    """A shared library of this C source in place of onnxruntime."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    (folder / "fake.c").write_text(source)
    path = folder / "libfake.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", path, folder / "fake.c"], check=True)
    return path


REFUSING_ONNXRUNTIME = """
struct OrtApiBase {{ const void* (*get_api)(unsigned); const char* (*version)(void); }};
static const void* get_api(unsigned version) {{ return (void)version, (const void*)0; }}
static const char* version(void) {{ return "{version}"; }}
const struct OrtApiBase* OrtGetApiBase(void) {{
  static const struct OrtApiBase base = {{get_api, version}};
  return &base;
}}
"""


@pytest.mark.parametrize("version", ["1.10.0", "0.9"])
def test_onnxruntime_that_is_too_old_is_refused(bundle, tmp_path, monkeypatch, version):
    path = fake_onnxruntime(tmp_path, REFUSING_ONNXRUNTIME.format(version=version))
    monkeypatch.setattr(native, "onnxruntime_path", lambda: path)
    refuse(bundle, rf"^{path}: onnxruntime {version} is too old: 1\.\d+ or newer is needed")


def test_library_that_is_not_onnxruntime_is_refused(bundle, tmp_path, monkeypatch):
    path = fake_onnxruntime(tmp_path, "int other;")
    monkeypatch.setattr(native, "onnxruntime_path", lambda: path)
    refuse(bundle, f"cannot load onnxruntime from {path}: .*OrtGetApiBase")


MOST_THREADS = max(64, 4 * len(os.sched_getaffinity(0)))  # a container's quota may allow fewer


@pytest.mark.parametrize("threads", [-1, MOST_THREADS + 1, 2**31 - 1])
def test_threads_out_of_range_are_refused(bundle, threads):
    with pytest.raises(EdgeLoraError, match=rf"threads is {threads}, not in 0…\d+ \(.*CPUs"):
        edgelora.load(bundle, threads=threads)


def test_more_threads_than_cpus_do_not_spin(bundle):
    with edgelora.load(bundle, threads=64) as model, model.session() as session:
        assert model.info.threads == 64
        session.prefill(TOKENS[:600])
        start = time.process_time()
        time.sleep(0.1)
        assert time.process_time() - start < 0.05


def test_missing_library_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    with pytest.raises(EdgeLoraError, match=r"libedgelora.so: missing.*pip install"):
        native.library_path()


def test_import_brings_in_no_heavy_package():
    code = (
        "import sys, edgelora.model; "
        "print({'torch', 'transformers', 'onnx', 'onnxruntime'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_package_without_its_library_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "__file__", str(tmp_path / "edgelora" / "native.py"))
    with pytest.raises(EdgeLoraError, match=r"libedgelora.so: missing: .*pip install \.$"):
        native.library_path()
    (tmp_path / "pyproject.toml").touch()
    with pytest.raises(EdgeLoraError, match=r"outside of its source folder, or with -P$"):
        native.library_path()
