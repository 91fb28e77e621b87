"""Exports whose rounding is fitted to a text: closer to the float model, equal bytes everywhere."""

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save_file

import edgelora
import oracle
import tiny
from edgelora.checkpoint import open_checkpoint, read_tokenizer
from edgelora.errors import EdgeLoraError
from edgelora.layout import projections
from edgelora.manifest import read_manifest
from edgelora.plan import ExportOptions, make_plan
from edgelora.quantize import dequantize, quantize_int4
from edgelora.rounding import Rounding, true_share
from test_float_oracle import make_adapter
from test_quantized_oracle import check

pytestmark = pytest.mark.usefixtures("integer_kernels")

WORDS = " ".join(tiny.TEXT).split()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "calibration.txt"
    chosen = np.random.default_rng(0).choice(WORDS, 9000)
    file.write_text(" ".join(chosen))
    return file


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_llama(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


def weights(bundle: Path) -> dict[str, Any]:
    return dict(oracle.BundleWeights(bundle).matrices())


def untied(base: Path) -> Any:
    """The float model with a head of its own, for a bundle that has one."""
    model = oracle.float_model(base)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


@pytest.mark.parametrize("zero_points", [False, True])
def test_balanced_is_closer_to_the_float_model_on_other_text(
    base: Path,
    text: Path,
    tmp_path: Path,
    zero_points: bool,  # noqa: FBT001
) -> None:
    options: dict[str, Any] = {"zero_points": zero_points, "head_format": "int4"}
    options["embedding_format"] = "int8"  # a lookup's error would hide the others
    edgelora.export(base, tmp_path / "fast", **options)
    edgelora.export(base, tmp_path / "balanced", quality="balanced", calibration=text, **options)
    other = " ".join(np.random.default_rng(1).choice(WORDS, 200))
    ids = read_tokenizer(base).encode(other)[:200]
    exact = oracle.logits(oracle.float_model(base), ids)
    kl = {}
    for name in ("fast", "balanced"):
        with edgelora.load(tmp_path / name, accuracy="float") as model:
            kl[name] = oracle.mean_kl(model.logits(ids), exact)
    assert kl["balanced"] < 0.7 * kl["fast"], kl


@pytest.mark.parametrize("share", [0, 2], ids=["alone", "adapter added later"])
def test_corrected_weights_bring_outputs_nearest_to_the_float_ones(base: Path, share: int) -> None:
    """Ordinary least squares, but for the damping: no other weight does better on these tokens."""
    checkpoint = open_checkpoint(base)
    config, generator = checkpoint.config, np.random.default_rng(5)
    windows = generator.integers(0, config.vocab_size, (30, 50))
    plan = make_plan(config, ExportOptions(quality="balanced", calibration="-", format="int4"))
    rounding = Rounding(checkpoint, plan, {}, windows)
    table = checkpoint.read("model.embed_tokens.weight")
    rounding.begin(table, quantize_int4(table, 32))
    qkv, o_proj, *_ = projections(config)
    values = [checkpoint.read(linear.weight) for linear in qkv.linears]
    biases = [np.zeros(0, np.float32)] * 3
    rounding.pass_on(values, [quantize_int4(value, 32) for value in values], biases)
    inputs = rounding.inputs_of(o_proj.name, [o_proj.name])
    assert inputs is not None and rounding.stream is not None and rounding.exact is not None
    own, exact, weight = rounding.stream, rounding.exact, checkpoint.read(f"{o_proj.name}.weight")
    delta = share * weight[::-1]
    wanted = exact.residual + exact.inputs @ (weight + delta).T - own.inputs @ delta.T

    def missed(w: Any) -> float:
        return float(np.square(wanted - own.residual - own.inputs @ w.T).sum())

    corrected = inputs.corrected(weight, weight + delta if share else None)
    solved, *_ = np.linalg.lstsq(own.inputs, wanted - own.residual, rcond=None)
    assert missed(solved.T) <= missed(corrected) < 1.1 * missed(solved.T)
    assert missed(corrected) < 0.9 * missed(weight)


@pytest.mark.parametrize("signal", [0.0, 0.5, 3.0])
def test_what_least_squares_explains_of_noise_is_not_believed(signal: float) -> None:
    """With the true share, no factor does better on other inputs, but for what that is off by."""
    generator = np.random.default_rng(3)
    tokens, features, outputs = 600, 200, 40
    x, other = (generator.standard_normal((tokens, features)) for _ in range(2))
    truth = signal / np.sqrt(features) * generator.standard_normal((features, outputs))
    y = x @ truth + generator.standard_normal((tokens, outputs))
    solved, *_ = np.linalg.lstsq(x, y, rcond=None)
    explained = np.square(x @ solved).mean(0).astype(np.float32)
    total = np.square(y).mean(0).astype(np.float32)
    share = true_share(explained, total, features, tokens)

    def missed(factor: Any) -> Any:
        return np.square(other @ (truth - solved * factor)).sum()

    best = min(missed(factor) for factor in np.linspace(0, 1, 101))
    assert missed(share) <= best + 0.02 * missed(1)


def test_fewer_tokens_than_features_say_nothing() -> None:
    ones = np.ones(3, np.float32)
    assert not true_share(ones, 2 * ones, features=40, tokens=30).any()
    assert true_share(0 * ones, 0 * ones, features=40, tokens=300).tolist() == [0, 0, 0]


def test_tied_head_serves_the_embedding_too(base: Path, text: Path, tmp_path: Path) -> None:
    report = edgelora.export(base, tmp_path / "b", quality="balanced", calibration=text)
    assert (report.plan.embedding_format, report.plan.head_format) == ("int4", "int4")
    check(tmp_path / "b", oracle.float_model(base), None)
    own = weights(tmp_path / "b")
    assert np.array_equal(own["model.embed_tokens"], own["lm_head"])


def test_head_may_have_a_format_of_its_own(base: Path, text: Path, tmp_path: Path) -> None:
    options = {"embedding_format": "int8", "head_format": "int4"}
    edgelora.export(base, tmp_path / "fast", **options)
    edgelora.export(base, tmp_path / "b", quality="balanced", calibration=text, **options)
    for name in ("fast", "b"):
        check(tmp_path / name, untied(base), None)
    plain, fitted = weights(tmp_path / "fast"), weights(tmp_path / "b")
    assert np.array_equal(plain["model.embed_tokens"], fitted["model.embed_tokens"])
    assert not np.array_equal(plain["lm_head"], fitted["lm_head"])


def test_adapters_and_every_flavor(base: Path, text: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "a", target_modules="all-linear")
    options: dict[str, Any] = {"quality": "balanced", "calibration": text}
    edgelora.export(base, tmp_path / "side", adapters={"a": adapter}, **options)
    check(tmp_path / "side", oracle.float_model(base), adapter)
    report = edgelora.export(base, tmp_path / "ort", flavor="ort", **options)
    assert (report.plan.embedding_format, report.plan.head_format) == ("int8", "int4")
    exact = oracle.logits(oracle.float_model(base), list(range(2, 40)))
    with edgelora.load(tmp_path / "ort") as model:
        assert oracle.mean_kl(model.logits(list(range(2, 40))), exact) < 0.5


def test_merged_weights_are_what_is_compensated(base: Path, text: Path, tmp_path: Path) -> None:
    """The merged export equals the balanced export of the model that PEFT merges."""
    adapter = make_adapter(base, tmp_path / "a", target_modules=["q_proj", "down_proj"])
    edgelora.export(
        base, tmp_path / "m", adapters={"a": adapter}, mode="merge",
        quality="balanced", calibration=text,
    )  # fmt: skip
    check(tmp_path / "m", oracle.float_model(base), None)
    merged = PeftModel.from_pretrained(tiny.load_float(base), adapter).merge_and_unload()
    other = tmp_path / "other"
    merged.save_pretrained(other)
    tiny.write_tokenizer(other)
    edgelora.export(other, tmp_path / "o", quality="balanced", calibration=text)
    ours, theirs = weights(tmp_path / "m"), weights(tmp_path / "o")
    same = [np.isclose(ours[name], theirs[name], atol=1e-6).mean() for name in ours]
    # PEFT's product sums in another order: a code may fall to the other side, and what follows it.
    assert np.mean(same) > 0.9, same


def test_plan_says_what_was_done(base: Path, text: Path, tmp_path: Path) -> None:
    edgelora.export(base, tmp_path / "b", quality="balanced", calibration=text)
    plan = read_manifest(tmp_path / "b")["plan"]
    digest = hashlib.sha256(text.read_bytes()).hexdigest()
    assert plan["calibration"] == f"32 windows of 256 tokens of the text sha256:{digest}"
    assert plan["quality"] == "balanced" and "in 15 matrices" in plan["reasons"]["quality"]


EVERY_KIND = """
import os, sys
os.sched_setaffinity(0, range(int(sys.argv[4])))
import edgelora
base, text, out = sys.argv[1:4]
edgelora.export(base, out + "/plain", quality="balanced", calibration=text)
edgelora.export(base, out + "/zero_points", quality="balanced", calibration=text, zero_points=True)
"""


def test_same_inputs_give_the_same_bytes_on_any_number_of_cores(
    base: Path, text: Path, tmp_path: Path
) -> None:
    found = []
    for cores in ("1", "2", "2"):
        out = tmp_path / str(len(found))
        command = [sys.executable, "-c", EVERY_KIND, base, text, out, cores]
        subprocess.run(command, check=True)
        files = sorted(file for file in out.rglob("*") if file.is_file())
        found.append(
            {str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).digest() for f in files}
        )
    assert len(found[0]) > 6 and found[0] == found[1] == found[2]


def test_inputs_beyond_float32_are_refused_in_one_line(text: Path, tmp_path: Path) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    file, name = base / "model.safetensors", "model.layers.0.post_attention_layernorm.weight"
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name] * np.float32(1e30)}, file, metadata={"format": "pt"})
    with pytest.raises(
        EdgeLoraError, match="gate_up_proj: its inputs on the calibration text: col"
    ):
        edgelora.export(base, tmp_path / "b", quality="balanced", calibration=text)
    assert not (tmp_path / "b").exists()


def test_what_is_carried_leaves_nothing_to_compensate(text: Path, tmp_path: Path) -> None:
    file = tiny.tiny_gguf(tmp_path / "tiny.gguf", "Q4_1")
    with pytest.raises(EdgeLoraError, match="nothing would be rounded to int4"):
        edgelora.export(file, tmp_path / "b", quality="balanced", calibration=text)


def test_head_of_carried_codes_is_compensated_alone(base: Path, text: Path, tmp_path: Path) -> None:
    """The linears and the lookup keep the codes of the file; the head, tied to it, is its own."""
    file = tiny.tiny_gguf(tmp_path / "tiny.gguf", "Q8_0", source=base)
    edgelora.export(
        file, tmp_path / "b", quality="balanced", calibration=text,
        embedding_format="int8", head_format="int4",
    )  # fmt: skip
    made, checkpoint = weights(tmp_path / "b"), open_checkpoint(file)
    for target, values in made.items():
        if target != "lm_head":
            assert np.array_equal(values, checkpoint.read(f"{target}.weight")), target
    plain = dequantize(quantize_int4(checkpoint.read("model.embed_tokens.weight"), 32))
    assert made["lm_head"].shape == plain.shape and not np.array_equal(made["lm_head"], plain)


def test_best_keeps_the_sensitive_linears_in_int8_and_loses_less(
    base: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(np.random.default_rng(2).choice(WORDS, 20000)))
    options: dict[str, Any] = {"calibration": text, "embedding_format": "int8"}
    balanced = edgelora.export(base, tmp_path / "balanced", quality="balanced", **options)
    best = edgelora.export(base, tmp_path / "best", quality="best", **options)
    assert best.mean_kl[""] < 0.8 * balanced.mean_kl[""]
    assert best.plan.reasons["int8"].startswith("what 4 bits hurt most: 2 v_proj, 1 gate_proj")
    check(tmp_path / "best", oracle.float_model(base), None)
    for target, weight in weights(tmp_path / "best").items():
        if "_proj" in target:
            values = max(len(np.unique(row[:32])) for row in weight)  # one block of int4
            assert (values > 16) == (target in best.plan.int8), target
