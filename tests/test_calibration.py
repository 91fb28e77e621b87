"""The calibration text's way through a decoder against transformers; texts that are refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import edgelora
import tiny
from edgelora.calibration import Arithmetic, Stream, read_calibration
from edgelora.checkpoint import open_checkpoint, read_tokenizer
from edgelora.errors import EdgeLoraError
from edgelora.layout import EMBEDDING, Linear, projections

EPSILON = 2.0**-24  # half a unit in the last place of float32, relative
MAKERS = {
    "llama": lambda path: tiny.tiny_llama(path, attention_bias=True, mlp_bias=True),
    "llama3 rope": tiny.tiny_llama3_rope,
    "mistral": tiny.tiny_mistral,
    "qwen2": tiny.tiny_qwen2,
    "qwen3": tiny.tiny_qwen3,
}


def inputs_by_hand(base: Path, windows: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
    """What reaches each linear of the float model, [tokens, in_features] by module path."""
    model, seen = tiny.load_float(base), {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, inputs: seen.__setitem__(name, inputs[0].flatten(0, 1).numpy())

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(keep(name))
    with torch.no_grad():
        model(torch.from_numpy(windows))
    return seen


@pytest.mark.parametrize("maker", MAKERS)
def test_every_linear_gets_the_inputs_of_the_float_model(maker: str, tmp_path: Path) -> None:
    base = MAKERS[maker](tmp_path / "base")
    checkpoint = open_checkpoint(base)
    config, read = checkpoint.config, checkpoint.read
    windows = np.random.default_rng(0).integers(0, config.vocab_size, (3, 40))
    expected = inputs_by_hand(base, windows)
    stream = Stream(
        config, Arithmetic(config, 40), windows, read(f"{EMBEDDING}.weight"), checkpoint.read
    )

    def bias(linear: Linear) -> NDArray[np.float32]:
        return read(f"{linear.target}.bias") if linear.bias else np.zeros(0, np.float32)

    for projection in projections(config):
        wanted = expected[projection.linears[0].target]
        # Float32 sums of at most 96 terms in another order, through two layers.
        atol = 200 * EPSILON * np.abs(wanted).max() * np.sqrt(wanted.shape[1])
        np.testing.assert_allclose(stream.inputs, wanted, rtol=0, atol=atol)
        gram = wanted.T.astype(np.float64) @ wanted / len(wanted)
        np.testing.assert_allclose(stream.hessian(), gram, rtol=0, atol=1e-4 * np.abs(gram).max())
        if projection.name != "lm_head":
            linears = projection.linears
            stream.advance([read(linear.weight) for linear in linears], [*map(bias, linears)])


@pytest.mark.parametrize("projection", range(4))
def test_drift_is_what_inputs_and_residual_miss(projection: int, tmp_path: Path) -> None:
    """Two streams, one of them through weights that are a little off."""
    checkpoint = open_checkpoint(tiny.tiny_llama(tmp_path / "base"))
    config, read = checkpoint.config, checkpoint.read
    generator = np.random.default_rng(0)
    windows = generator.integers(0, config.vocab_size, (60, 40))  # more than a part of the tokens
    table = read(f"{EMBEDDING}.weight")
    own, exact = (
        Stream(config, Arithmetic(config, 40), windows, values, read)
        for values in (table * np.float32(1.01), table)
    )
    for done in list(projections(config))[:projection]:
        weights = [read(linear.weight) for linear in done.linears]
        off = [w + generator.normal(0, 0.01, w.shape).astype(np.float32) for w in weights]
        biases = [np.zeros(0, np.float32)] * len(weights)
        own.advance(off, biases)
        exact.advance(weights, biases)
    drift = own.drift(exact)
    x = own.inputs.astype(np.float64)
    assert drift.tokens == len(x)
    for found, some, theirs, ours in (
        (drift.cross.inputs, drift.sample.inputs, exact.inputs, own.inputs),
        (drift.cross.residual, drift.sample.residual, exact.residual, own.residual),
    ):
        if found is None:
            assert some is None
            assert projection in (0, 2)  # their outputs are not added to the residual
            continue
        wanted = x.T @ (theirs.astype(np.float64) - ours) / len(x)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
        every_fourth = (theirs - ours).reshape(60, 40, -1)[::4]
        assert np.array_equal(some, every_fourth.reshape(15 * 40, -1))
    assert (drift.cross.residual is None) == (projection in (0, 2))


def test_products_equal_float64(tmp_path: Path) -> None:
    config = open_checkpoint(tiny.tiny_llama(tmp_path / "base")).config
    arithmetic, generator = Arithmetic(config, 8), np.random.default_rng(0)
    for dtype, unit in ((np.float32, EPSILON), (np.float64, 2.0**-53)):
        a = generator.standard_normal((70, 1100)).astype(dtype)
        b = generator.standard_normal((1100, 90)).astype(dtype)
        exact = a.astype(np.longdouble) @ b.astype(np.longdouble)
        magnitude = np.abs(a).astype(np.longdouble) @ np.abs(b)
        assert (np.abs(arithmetic.product(a, b) - exact) <= 1100 * unit * magnitude).all()
    x = generator.standard_normal((50, 1100)).astype(np.float32)
    y = generator.standard_normal((50, 33)).astype(np.float32)
    magnitude = np.abs(x.T).astype(float) @ np.abs(y)
    cross = arithmetic.cross(x, y)
    assert (np.abs(cross - x.T.astype(float) @ y) <= 50 * EPSILON * magnitude).all()
    gram, magnitude = arithmetic.gram(x), np.abs(x.T).astype(float) @ np.abs(x)
    assert (np.abs(gram - x.T.astype(float) @ x) <= 50 * EPSILON * magnitude).all()
    assert np.array_equal(gram, gram.T)


def test_windows_are_spread_over_the_text(tmp_path: Path) -> None:
    base, text = tiny.tiny_llama(tmp_path / "base"), tmp_path / "text.txt"
    text.write_text("abcdefgh " * 2000)
    config, tokenizer = open_checkpoint(base).config, read_tokenizer(base)
    ids = tokenizer.encode(text.read_text())
    made = read_calibration(text, tokenizer, config, windows=3)
    positions, whole = config.max_position_embeddings, len(ids) // config.max_position_embeddings
    assert whole > 6
    assert made.windows.tolist() == [
        ids[start * positions : (start + 1) * positions]
        for start in (0, whole // 3, whole * 2 // 3)
    ]
    assert str(made).startswith(f"3 windows of {positions} tokens of the text sha256:")


BAD_TEXTS = {
    "absent": (None, "cannot be read"),
    "not UTF-8": (b"abc\xff" * 9000, "not UTF-8 at byte 3: save it as such"),
    "empty": (b"", "0 tokens: calibration takes 32 windows of 256, so at least 8192"),
    "too short": (b"too short", "tokens: calibration takes 32 windows of 256, so at least 8192"),
}


@pytest.mark.parametrize("kind", BAD_TEXTS)
def test_unusable_text_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    base, text = tiny.tiny_llama(tmp_path / "base"), tmp_path / "text.txt"
    data, words = BAD_TEXTS[kind]
    if data is not None:
        text.write_bytes(data)
    with pytest.raises(EdgeLoraError, match=words) as refused:
        edgelora.export(base, tmp_path / "bundle", quality="balanced", calibration=text)
    assert str(text) in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "bundle").exists()


def test_folder_as_text_is_refused(tmp_path: Path) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    with pytest.raises(EdgeLoraError, match="cannot be read"):
        edgelora.export(base, tmp_path / "bundle", quality="balanced", calibration=tmp_path)
