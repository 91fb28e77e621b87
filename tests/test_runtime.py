"""The runtime through its Python binding, on a toy bundle of stock operators."""

import ctypes
import gc
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

import edgelora
import toy_bundle
from edgelora import native
from edgelora.errors import EdgeLoraError
from edgelora.generation import Sampling
from edgelora.interruption import interruptible
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
import _thread, signal, threading, edgelora
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's shell ignores it
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


def test_ctrl_c_while_a_call_starts_leaves_nothing_running(monkeypatch):
    start, cancelled = threading.Thread.start, threading.Event()

    def start_and_interrupt(thread):
        start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", start_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        interruptible(lambda: cancelled.wait(30), cancelled.set)
    for thread in threading.enumerate():
        if thread.name == "edgelora":
            thread.join(5)
            assert not thread.is_alive()


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


@pytest.mark.parametrize("path", [b"\x80" * 5000, "ä".encode() * 2500, b"a" + "ä".encode() * 2500])
def test_long_message_is_cut_between_characters(library, path):
    """Also one that has none: bytes that only go on a character."""
    pointer = native.ModelPointer()
    assert library.edgelora_model_load(path, None, ctypes.byref(pointer)) == 2
    kept = len(library.edgelora_last_error())
    assert library.edgelora_last_error() == path[:kept]
    assert kept == (4095 if path[0] != 0xC3 else 4094)


def test_isa_is_the_one_chosen_when_the_model_was_loaded(library, model, monkeypatch):
    info = native.ModelInfo(size=ctypes.sizeof(native.ModelInfo))
    monkeypatch.setenv("EDGELORA_FORCE_ISA", "abacus")
    native.check(library, library.edgelora_model_info(model.pointer, ctypes.byref(info)))
    assert info.isa.decode() == model.info.isa


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
