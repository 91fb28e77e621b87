"""What a session remembers of calls that failed, and what may happen while a call runs."""

import contextlib
import os
import subprocess
import sys
import threading

import pytest

import edgelora
from edgelora.errors import EdgeLoraError
from edgelora.generation import Sampling
from toy_bundle import CONTEXT_LENGTH, write_toy_bundle

TOKENS = [(7 * i + 5) % 60 for i in range(CONTEXT_LENGTH)]
ENDLESS = Sampling(ignore_eos=True)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_toy_bundle(tmp_path_factory.mktemp("toy") / "bundle")


@pytest.fixture
def model(bundle):
    with edgelora.load(bundle) as model:
        yield model


@pytest.fixture
def session(model):
    with model.session() as session:
        yield session


def computed(session, token=5):
    """Positions that the next token costs."""
    session.prefill([token])
    return session.timings.prefill_tokens


# ---- which adapter computed what is cached ----


def test_rewind_before_a_kept_change_remembers_the_former_adapter(session):
    session.prefill(TOKENS[:20])
    session.set_adapter("one", keep_cache=True)
    session.prefill(TOKENS[20:30])
    session.rewind(10)  # what is left is the base's
    session.set_adapter(None)
    assert computed(session) == 1
    session.set_adapter("one")
    assert computed(session) == 12


def cancel_within_prefill(session, tokens, delay):
    timer = threading.Timer(delay, session.cancel)
    timer.start()
    with contextlib.suppress(EdgeLoraError):
        session.prefill(tokens)
    timer.join()


def test_prefill_that_is_cancelled_leaves_the_adapter_of_what_is_cached(session):
    cancelled = 0
    for i in range(40):
        session.rewind(0)
        session.set_adapter(None)
        session.prefill(TOKENS[:10])
        session.set_adapter("one", keep_cache=True)
        cancel_within_prefill(session, TOKENS[10:], 0.0005 * (i % 20))
        if session.position > 10:
            continue  # too late
        cancelled += 1
        session.set_adapter("one")  # what is left is the base's
        assert computed(session) == 11
    assert cancelled > 5


# ---- what happens while a call runs ----


def test_generate_finishes_with_an_adapter_that_is_unloaded_meanwhile(model):
    with model.session(adapter="two") as other:
        other.prefill(TOKENS[:10])
        expected = other.decode(20, ignore_eos=True)

    def on_token(_):
        if "two" in model._handles:
            model.unload_adapter("two")
        return True

    with model.session(adapter="two") as session:
        session.prefill(TOKENS[:10])
        assert session.generate(20, ENDLESS, on_token=on_token)[0] == expected
        with pytest.raises(EdgeLoraError, match="unknown or unloaded"):
            session.decode(1)


@pytest.mark.parametrize(
    "call",
    [
        lambda session: session.prefill([5]),
        lambda session: session.logits([5]),
        lambda session: session.rewind(0),
        lambda session: session.set_adapter("one"),
        lambda session: session.decode(1),
    ],
)
def test_callback_that_uses_its_session_is_refused(model, session, call):
    def on_token(_):
        with pytest.raises(EdgeLoraError, match="the session is in a call"):
            call(session)
        positions.append(session.position)
        assert session.last_logits is None
        return True

    positions: list[int] = []
    with model.session() as other:
        other.prefill(TOKENS[:10])
        expected = other.decode(5, ignore_eos=True)
    session.prefill(TOKENS[:10])
    assert session.generate(5, ENDLESS, on_token=on_token)[0] == expected
    assert positions == [11, 12, 13, 14, 15]
    session.prefill(TOKENS[:1])


def test_callback_may_use_another_session(model, session):
    with model.session() as other:
        session.prefill(TOKENS[:10])
        session.generate(3, ENDLESS, on_token=lambda token: other.prefill([token]) is None)
        assert other.position == 3


def test_session_that_its_callback_frees_ends_with_the_call(session):
    def on_token(_):
        session.close()
        return True

    session.prefill(TOKENS[:10])
    assert len(session.generate(20, ENDLESS, on_token=on_token)[0]) == 20
    with pytest.raises(EdgeLoraError, match="this session is closed"):
        session.prefill(TOKENS[:1])


FORKING = """
import os, edgelora
from edgelora.errors import EdgeLoraError
model = edgelora.load({bundle!r})
session = model.session()
session.prefill([5, 6, 7])
if os.fork() == 0:
    try:
        session.prefill([8])
    except EdgeLoraError as error:
        print(error, flush=True)
    with edgelora.load({bundle!r}) as again, again.session() as other:
        other.prefill([5, 6, 7, 8])
        print(other.position, flush=True)
    os._exit(0)
os.wait()
session.prefill([8])
print(session.position)
"""


def test_fork_refuses_the_models_of_its_parent_and_loads_its_own(bundle):
    code = FORKING.format(bundle=str(bundle))
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}  # of forking beside threads
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment
    )
    said, *positions = done.stdout.splitlines()
    assert "loaded before this process was forked" in said
    assert positions == ["4", "4"], done.stderr
