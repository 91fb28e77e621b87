"""The runtime through its Python binding, on a toy bundle of stock operators."""

import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import edgelora
import toy_bundle
from edgelora import native
from edgelora.errors import EdgeLoraError
from edgelora.generation import Sampling
from edgelora.model import Model
from toy_bundle import CONTEXT_LENGTH, EOS, NAN_TOKEN, VOCAB_SIZE, write_manifest, write_toy_bundle

TOKENS = [(7 * i + 5) % 60 for i in range(CONTEXT_LENGTH)]
TOLERANCE = 1e-4  # float32 sums in another order (chunks of other sizes), logits of magnitude 10


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_toy_bundle(tmp_path_factory.mktemp("toy") / "bundle")


@pytest.fixture(scope="module")
def model(bundle):
    with edgelora.load(bundle) as model:
        yield model


@pytest.fixture
def session(model):
    with model.session() as session:
        yield session


@pytest.fixture
def copy(bundle, tmp_path):
    """A bundle of one's own to damage."""
    return shutil.copytree(bundle, tmp_path / "copy")


# ---- computing ----


def test_info_repeats_the_manifest(model):
    assert model.info.vocab_size == VOCAB_SIZE
    assert model.info.context_length == CONTEXT_LENGTH
    assert model.info.eos_token_ids == (EOS,)
    assert model.info.kv_cache_bytes == 2 * 2 * 16 * 4
    assert model.info.threads >= 1
    assert model.adapters == ["one", "two"]


def test_logits_equal_a_stock_onnxruntime_session_without_cache(model, bundle):
    onnxruntime = pytest.importorskip("onnxruntime")
    stock = onnxruntime.InferenceSession(bundle / "model.onnx")
    n = 40
    empty = np.zeros((1, toy_bundle.KV_HEADS, 0, toy_bundle.HEAD_DIM), np.float32)
    feeds = {
        "input_ids": np.array([TOKENS[:n]]),
        "attention_mask": np.ones((1, n), np.int64),
        "adapter_ids": np.zeros(1, np.int64),
        "logits_to_keep": np.arange(n),
        "past_key_values.0.key": empty,
        "past_key_values.0.value": empty,
    }
    expected = stock.run(["logits"], feeds)[0][0]
    np.testing.assert_allclose(model.logits(TOKENS[:n]), expected, rtol=0, atol=TOLERANCE)


def test_prefill_in_chunks_equals_logits_of_one_token_at_a_time(model):
    with model.session() as whole, model.session() as single:
        together = whole.logits(TOKENS)
        alone = np.concatenate([single.logits([token]) for token in TOKENS])
    np.testing.assert_allclose(together, alone, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("split", [1, 511, 512, 513, 1024, 1025])
def test_prefill_twice_equals_prefill_once(model, session, split):
    with model.session() as other:
        other.prefill(TOKENS)
        session.prefill(TOKENS[:split])
        session.prefill(TOKENS[split:])
        assert session.position == CONTEXT_LENGTH
        np.testing.assert_allclose(session.last_logits, other.last_logits, rtol=0, atol=TOLERANCE)


def test_decode_equals_greedy_choice_of_logits(model, session):
    session.prefill(TOKENS[:10])
    new = session.decode(20, ignore_eos=True)
    logits = model.logits(TOKENS[:10] + new)
    assert new == logits[9:-1].argmax(axis=1).tolist()


def test_decode_in_pieces_equals_decode_at_once(model, session):
    session.prefill(TOKENS[:10])
    pieces = [token for n in (1, 2, 0, 5, 1) for token in session.decode(n, ignore_eos=True)]
    with model.session() as other:
        other.prefill(TOKENS[:10])
        assert other.decode(9, ignore_eos=True) == pieces
        assert other.position == session.position == 19


def test_prefill_after_decode_follows_the_last_delivered_token(model, session):
    session.prefill(TOKENS[:10])
    new = session.decode(5, ignore_eos=True)
    session.prefill(TOKENS[20:25])
    with model.session() as other:
        other.prefill(TOKENS[:10] + new + TOKENS[20:25])
        np.testing.assert_allclose(session.last_logits, other.last_logits, rtol=0, atol=TOLERANCE)


def test_last_logits_are_absent_until_they_belong_to_the_last_position(session):
    assert session.last_logits is None
    session.prefill(TOKENS[:4])
    assert session.last_logits is not None
    session.decode(1, ignore_eos=True)
    assert session.last_logits is None
    session.rewind(4)
    session.prefill(TOKENS[4:5])
    assert session.last_logits is not None


# ---- rewind, limits, errors ----


def test_rewind_forgets_what_follows(model, session):
    session.prefill(TOKENS[:30])
    session.rewind(10)
    assert session.position == 10
    session.prefill(TOKENS[50:60])
    expected = model.logits(TOKENS[:10] + TOKENS[50:60])[-1]
    np.testing.assert_allclose(session.last_logits, expected, rtol=0, atol=TOLERANCE)


def test_decode_after_rewind_goes_on_from_there(model, session):
    session.prefill(TOKENS[:30])
    session.rewind(10)
    with model.session() as other:
        other.prefill(TOKENS[:10])
        assert session.decode(8) == other.decode(8)


def test_rewind_beyond_the_position_is_refused(session):
    session.prefill(TOKENS[:3])
    with pytest.raises(EdgeLoraError, match=r"position 4.*holds 3"):
        session.rewind(4)
    assert session.position == 3


def test_prefill_beyond_the_context_is_refused_and_changes_nothing(session):
    session.prefill(TOKENS[:1000])
    before = session.last_logits
    with pytest.raises(EdgeLoraError, match=r"room for 1100 tokens, 1000 are in it, 101 more do"):
        session.prefill(TOKENS[:101])
    assert session.position == 1000
    np.testing.assert_array_equal(session.last_logits, before)


def test_decode_ends_when_the_context_is_full(model):
    with model.session(context_length=16) as session:
        session.prefill(TOKENS[:10])
        tokens, finish = session.generate(20, Sampling(ignore_eos=True))
        assert (len(tokens), finish, session.position) == (6, "context", 16)
        assert session.generate(20) == ([], "context")


@pytest.mark.parametrize("length", [-1, CONTEXT_LENGTH + 1])
def test_context_length_out_of_range_is_refused(model, length):
    with pytest.raises(EdgeLoraError, match=f"context_length is {length}"):
        model.session(context_length=length)


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE, 2**31 - 1, 2**40])
def test_token_outside_the_vocabulary_is_refused_by_name(session, token):
    session.prefill(TOKENS[:2])
    with pytest.raises(EdgeLoraError, match=rf"token .*{token}"):
        session.prefill([1, 2, token])
    assert session.position == 2


def test_empty_prompt_is_refused(session):
    with pytest.raises(EdgeLoraError, match="empty: 0 tokens, at least 1"):
        session.prefill([])


def test_decode_before_prefill_is_refused(session):
    with pytest.raises(EdgeLoraError, match="prefill first"):
        session.decode(1)


def test_nan_logits_are_an_error(session):
    session.prefill([1, NAN_TOKEN])
    with pytest.raises(EdgeLoraError, match="not numbers"):
        session.decode(1)
    session.rewind(1)
    assert len(session.decode(1, ignore_eos=True)) == 1


def test_closed_session_and_model_say_so(bundle):
    model = edgelora.load(bundle)
    session = model.session()
    session.close()
    session.close()
    with pytest.raises(EdgeLoraError, match="session is closed"):
        session.prefill([1])
    model.close()
    with pytest.raises(EdgeLoraError, match="model is closed"):
        model.session()


def test_session_outlives_its_model(bundle):
    model = edgelora.load(bundle)
    session = model.session()
    expected = model.logits(TOKENS[:5])
    model.close()
    np.testing.assert_array_equal(session.logits(TOKENS[:5]), expected)
    session.close()


def test_dropped_objects_are_freed_in_any_order(bundle):
    for _ in range(3):
        model = edgelora.load(bundle)
        session = model.session(adapter="one")
        session.prefill([1])
        del model
        gc.collect()
        session.prefill([2])
        del session
        gc.collect()


# ---- cancel ----


def test_cancel_ends_decode_and_keeps_the_delivered_tokens(model, session):
    session.prefill(TOKENS[:5])
    taken = []

    def on_token(token):
        taken.append(token)
        if len(taken) == 3:
            session.cancel()
        return True

    with pytest.raises(EdgeLoraError, match="cancelled"):
        session.generate(50, Sampling(ignore_eos=True), on_token=on_token)
    assert session.position == 8
    with model.session() as other:
        other.prefill(TOKENS[:5])
        assert taken + session.decode(4, ignore_eos=True) == other.decode(7, ignore_eos=True)


def test_cancel_from_another_thread_ends_prefill_and_changes_nothing(session):
    session.prefill(TOKENS[:50])
    before, cancelled = session.last_logits, 0
    for _ in range(50):
        canceller = threading.Timer(0.0005, session.cancel)
        canceller.start()
        try:
            session.prefill(TOKENS[50:])
            session.rewind(50)
        except EdgeLoraError as error:
            assert str(error) == "cancelled"
            cancelled += 1
            assert session.position == 50
        canceller.join()
    assert cancelled > 0
    session.rewind(49)
    session.prefill(TOKENS[49:50])
    np.testing.assert_allclose(session.last_logits, before, rtol=0, atol=TOLERANCE)


def test_cancel_without_a_call_has_no_effect(session):
    session.cancel()
    session.prefill(TOKENS[:5])
    assert session.position == 5


def test_ctrl_c_ends_a_long_call_and_leaves_the_session_usable(bundle):
    code = f"""
import _thread, threading, edgelora
from edgelora.generation import Sampling
with edgelora.load({str(bundle)!r}) as model, model.session() as session:
    session.prefill([5])
    threading.Timer(0.05, _thread.interrupt_main).start()
    try:
        while True:
            session.rewind(1)
            session.decode(1000, ignore_eos=True)
    except KeyboardInterrupt:
        session.prefill([6])
        print("usable")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("usable\n", "")


def test_error_in_callback_ends_decode_and_is_raised(session):
    session.prefill(TOKENS[:5])

    def on_token(token):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        session.generate(50, on_token=on_token)
    assert session.position == 6


# ---- adapters: the toy adds the handle to the hidden state ----


def test_switching_the_adapter_computes_the_history_anew(model, session):
    session.prefill(TOKENS[:20])
    session.adapter = "one"
    assert session.adapter == "one"
    session.prefill(TOKENS[20:25])
    assert session.timings.prefill_tokens == 25
    expected = model.logits(TOKENS[:25], adapter="one")[-1]
    np.testing.assert_allclose(session.last_logits, expected, rtol=0, atol=TOLERANCE)


def test_decode_right_after_a_switch_computes_the_history_anew(model, session):
    session.prefill(TOKENS[:20])
    session.adapter = "two"
    with model.session(adapter="two") as other:
        other.prefill(TOKENS[:20])
        assert session.decode(6) == other.decode(6)


def test_keep_cache_computes_only_what_follows(model, session):
    session.prefill(TOKENS[:20])
    session.set_adapter("one", keep_cache=True)
    session.prefill(TOKENS[20:25])
    assert session.timings.prefill_tokens == 5
    expected = model.logits(TOKENS[:25], adapter="one")[-1]
    assert np.abs(session.last_logits - expected).max() > 100 * TOLERANCE


def test_switching_there_and_back_before_a_step_computes_nothing(session):
    session.prefill(TOKENS[:20])
    before = session.last_logits
    session.adapter = "one"
    assert session.last_logits is None
    session.adapter = None
    np.testing.assert_array_equal(session.last_logits, before)
    session.prefill(TOKENS[20:21])
    assert session.timings.prefill_tokens == 1


def test_switching_back_after_a_step_computes_the_history_anew(session):
    session.prefill(TOKENS[:20])
    session.adapter = "one"
    session.prefill(TOKENS[20:21])
    session.adapter = None
    session.prefill(TOKENS[21:22])
    assert session.timings.prefill_tokens == 22


def test_a_prefill_that_fails_after_a_switch_keeps_the_switch_due(model, session):
    session.prefill(TOKENS[:20])
    session.adapter = "one"
    with pytest.raises(EdgeLoraError):
        session.prefill([VOCAB_SIZE])
    session.prefill(TOKENS[20:21])
    expected = model.logits(TOKENS[:21], adapter="one")[-1]
    np.testing.assert_allclose(session.last_logits, expected, rtol=0, atol=TOLERANCE)


def test_unloaded_adapter_fails_the_next_step_until_another_is_set(bundle):
    with edgelora.load(bundle) as model, model.session(adapter="one") as session:
        session.prefill(TOKENS[:5])
        model.unload_adapter("one")
        with pytest.raises(EdgeLoraError, match="unknown or unloaded"):
            session.decode(1)
        session.adapter = None
        assert len(session.decode(1, ignore_eos=True)) == 1


def test_unknown_adapter_is_refused_and_the_known_are_named(model, session):
    with pytest.raises(EdgeLoraError, match=r"no adapter 'three'.*one, two"):
        session.adapter = "three"
    assert session.adapter is None


def test_weighted_sum_is_an_adapter_of_its_own(model):
    with model.session(adapter={"one": 0.7, "two": 0.3}) as session:
        session.prefill(TOKENS[:5])
        assert session.adapter == {"one": 0.7, "two": 0.3}
        session.adapter = {"one": 0.5, "two": 0.5}
        session.prefill(TOKENS[5:6])
        assert session.timings.prefill_tokens == 6
    with pytest.raises(EdgeLoraError, match="name at least one"):
        model.session(adapter={})


def test_adapter_from_outside_is_loaded_by_file_or_folder(bundle, tmp_path):
    (tmp_path / "adapter.safetensors").write_bytes(toy_bundle.adapter_bytes("extra"))
    with edgelora.load(bundle) as model:
        model.load_adapter("extra", tmp_path)
        assert model.adapters == ["one", "two", "extra"]
        model.logits([1], adapter="extra")
        with pytest.raises(EdgeLoraError, match="taken"):
            model.load_adapter("one", tmp_path)
        model.unload_adapter("extra")
        assert model.adapters == ["one", "two"]


def test_adapter_of_another_base_is_refused(model, tmp_path):
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(toy_bundle.adapter_bytes("extra", fingerprint="sha256:" + "cd" * 32))
    with pytest.raises(EdgeLoraError, match="base"):
        model.load_adapter("extra", path)
    assert model.adapters == ["one", "two"]


@pytest.fixture
def foreign_handle(copy):
    """Of an adapter that another model, of another base, has loaded."""
    fingerprint = "sha256:" + "cd" * 32
    path = copy / "adapters/one/adapter.safetensors"
    path.write_bytes(toy_bundle.adapter_bytes("one", fingerprint=fingerprint))
    write_manifest(copy, base={"name": "other", "fingerprint": fingerprint})
    with edgelora.load(copy) as other:
        yield other.adapter_handle("one")


BOTH_BASES = "(?=.*sha256:cdcdcdcdcdcd…)(?=.*sha256:abababababab…)"


def test_handle_of_another_base_is_refused(session, foreign_handle):
    library = session._library
    assert library.edgelora_session_set_adapter(session._pointer, foreign_handle, False) == 1
    with pytest.raises(EdgeLoraError, match=BOTH_BASES):
        native.check(library, 1)
    session.prefill(TOKENS[:1])


def test_sum_over_two_bases_is_refused(model, foreign_handle):
    handles = (ctypes.c_int64 * 2)(model.adapter_handle("one"), foreign_handle)
    weights, out = (ctypes.c_float * 2)(0.5, 0.5), ctypes.c_int64()
    compose = model.library.edgelora_adapter_compose
    assert compose(handles, weights, 2, ctypes.byref(out)) == 1
    with pytest.raises(EdgeLoraError, match=BOTH_BASES):
        native.check(model.library, 1)


# ---- loading ----


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


def test_damaged_graph_is_refused_with_onnxruntimes_reason(copy):
    size = (copy / "model.onnx").stat().st_size
    (copy / "model.onnx").write_bytes(bytes([255]) * size)
    write_manifest(copy)
    refuse(copy, f"^{copy}/model.onnx: onnxruntime: .*; copy or export the bundle again")


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


# ---- the C API itself ----


@pytest.fixture(scope="module")
def library():
    return native.open_library(native.library_path())


def test_null_pointers_are_refused_by_name(library):
    none = ctypes.c_void_p()
    assert library.edgelora_model_load(None, None, ctypes.byref(none)) == 1
    assert library.edgelora_last_error() == b"bundle is null"
    assert library.edgelora_session_prefill(None, None, 0) == 1
    assert library.edgelora_last_error() == b"session is null"
    library.edgelora_model_free(None)
    library.edgelora_session_free(None)
    library.edgelora_session_cancel(None)


def test_option_struct_of_another_size_is_refused(library, bundle):
    options = native.options(native.ModelOptions, library.edgelora_model_options_init)
    for size in (0, options.size - 8, options.size + 8):
        options.size = size
        pointer = native.ModelPointer()
        status = library.edgelora_model_load(
            str(bundle).encode(), ctypes.byref(options), ctypes.byref(pointer)
        )
        assert (status, pointer.value) == (1, None)
        assert f"size is {size}".encode() in library.edgelora_last_error()


def test_messages_belong_to_their_thread(library):
    assert library.edgelora_adapter_unload(0) == 3
    seen = []
    thread = threading.Thread(target=lambda: seen.append(library.edgelora_last_error()))
    thread.start()
    thread.join()
    assert seen == [b""]
    assert b"handle 0" in library.edgelora_last_error()


def test_struct_declarations_equal_the_header(library, model):
    """The library refuses another size, so each accepted struct has the size of the header's."""
    assert isinstance(model, Model)
    for kind, init in [
        (native.ModelOptions, library.edgelora_model_options_init),
        (native.SessionOptions, library.edgelora_session_options_init),
        (native.Sampling, library.edgelora_sampling_init),
    ]:
        assert native.options(kind, init).size == ctypes.sizeof(kind)
