"""The `ort` flavor agrees with our operators, in a plain onnxruntime session and in our runtime."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

import edgelora
import oracle
import tiny
from edgelora import EdgeLoraError
from test_float_oracle import ARCHITECTURES, SHARE, TOKENS, make_adapter, with_adapter


@pytest.fixture(scope="module", params=ARCHITECTURES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ARCHITECTURES[request.param](tmp_path_factory.mktemp(request.param))


def export_ort(base: Path, folder: Path) -> Path:
    """A bundle of flavor ort, int4, with adapters a (every linear) and b (two of each layer)."""
    adapters = {
        "a": make_adapter(base, folder / "a", target_modules="all-linear"),
        "b": make_adapter(base, folder / "b", target_modules=["q_proj", "up_proj"]),
    }
    edgelora.export(base, folder / "bundle", adapters=adapters, flavor="ort")
    return folder / "bundle"


@pytest.fixture(scope="module")
def bundle(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_ort(base, tmp_path_factory.mktemp("ort"))


def plain_logits(
    bundle: Path, adapter: str | None = None, tokens: Sequence[int] = TOKENS
) -> NDArray[np.float32]:
    """Logits of `tokens` from onnxruntime alone."""
    session = onnxruntime.InferenceSession(
        bundle / "model.onnx", providers=["CPUExecutionProvider"]
    )
    count = len(tokens)
    feeds = {
        "input_ids": np.array([tokens]),
        "attention_mask": np.ones((1, count), np.int64),
        "logits_to_keep": np.arange(count),
    }
    for entry in session.get_inputs():
        if entry.name.startswith("past_key_values"):
            feeds[entry.name] = np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32)
    options = onnxruntime.RunOptions()
    if adapter:
        file = onnxruntime.LoraAdapter()
        file.Load(str(bundle / f"adapters/{adapter}/adapter.onnx_adapter"))
        options.add_active_adapter(file)
    logits: NDArray[np.float32] = session.run(["logits"], feeds, options)[0][0]
    return logits


def test_float_ort_bundle_equals_transformers_and_peft(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "a", target_modules="all-linear")
    bundle = tmp_path / "bundle"
    edgelora.export(base, bundle, adapters={"a": adapter}, format="float", flavor="ort")
    plain = oracle.float_model(base)
    oracle.assert_close(plain_logits(bundle), oracle.logits(plain, TOKENS), SHARE)
    theirs = oracle.logits(with_adapter(plain, adapter), TOKENS)
    oracle.assert_close(plain_logits(bundle, "a"), theirs, SHARE)


@pytest.mark.parametrize("options", [{}, {"block_size": 64}, {"zero_points": True}], ids=str)
def test_flavors_agree(base: Path, options: dict[str, object], tmp_path: Path) -> None:
    """Both round activations to int8, each in blocks of its own.

    They differ by no more than that costs either.
    """
    adapter = make_adapter(base, tmp_path / "a", target_modules="all-linear")
    for flavor in ("edgelora", "ort"):
        out = tmp_path / flavor
        edgelora.export(base, out, adapters={"a": adapter}, flavor=flavor, **options)
    for name in (None, "a"):
        with edgelora.load(tmp_path / "edgelora", accuracy="float") as model:
            exact = model.logits(TOKENS, adapter=name)
        with edgelora.load(tmp_path / "edgelora") as model:
            ours = model.logits(TOKENS, adapter=name)
        stock = plain_logits(tmp_path / "ort", name)
        allowed = 2 * np.abs(ours - exact).max() + SHARE * np.abs(exact).max()
        assert np.abs(stock - exact).max() <= allowed


def test_nf4_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    with pytest.raises(EdgeLoraError, match="nf4"):
        edgelora.export(base, tmp_path / "bundle", format="nf4", flavor="ort")


@pytest.mark.parametrize("name", [None, "a", "b"])
def test_runtime_equals_plain_onnxruntime(bundle: Path, name: str | None) -> None:
    expected = plain_logits(bundle, name)
    with edgelora.load(bundle) as model:
        assert model.info.isa == "onnxruntime"
        oracle.assert_close(model.logits(TOKENS, adapter=name), expected, 1e-5)


@pytest.mark.parametrize("name", [None, "a"])
def test_decode_equals_greedy_choice_of_plain_logits(bundle: Path, name: str | None) -> None:
    tokens = list(TOKENS)
    for _ in range(12):
        tokens.append(int(plain_logits(bundle, name, tokens)[-1].argmax()))
    with edgelora.load(bundle) as model, model.session(adapter=name) as session:
        session.prefill(TOKENS)
        assert session.decode(12, ignore_eos=True) == tokens[len(TOKENS) :]


def test_equal_weighted_sum_set_again_computes_the_cache_anew(tmp_path: Path) -> None:
    """Kept first, then asked for anew: as if it had been there from the start."""
    base = ARCHITECTURES["llama"](tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "a", target_modules="all-linear")
    edgelora.export(base, tmp_path / "bundle", adapters={"a": adapter}, format="float")
    with edgelora.load(tmp_path / "bundle") as model:
        expected = model.logits(TOKENS, adapter={"a": 0.5})[-1]
        with model.session() as session:
            session.prefill(TOKENS[:-1])
            session.set_adapter({"a": 0.5}, keep_cache=True)
            session.adapter = {"a": 0.5}
            ours = session.logits(TOKENS[-1:])[0]
    oracle.assert_close(ours, expected, SHARE)


@pytest.mark.parametrize("flavor", ["edgelora", "ort"])
def test_prompt_of_several_runs_leaves_its_last_logits(flavor: str, tmp_path: Path) -> None:
    """Only the last run of a prefill computes any."""
    base = tiny.tiny_llama(tmp_path / "base", max_position_embeddings=1024)
    edgelora.export(base, tmp_path / "bundle", format="float", flavor=flavor, report=False)
    tokens = (TOKENS * 600)[:600]
    with edgelora.load(tmp_path / "bundle") as model, model.session() as session:
        session.prefill(tokens)
        last = session.last_logits
        assert last is not None
        oracle.assert_close(last, model.logits(tokens)[-1], 1e-5)
