"""An adapter's factors of the token embedding, merged: against PEFT's forward."""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import edgelora
import oracle
import tiny
from edgelora.adapter import adapter_ledger
from edgelora.adding import add_adapter
from edgelora.checkpoint import open_checkpoint
from edgelora.errors import EdgeLoraError
from edgelora.evaluating import evaluate_bundle
from edgelora.graph import WEIGHT_FILE
from ledger_adapters import make_base
from test_float_oracle import SHARE, make_adapter, with_adapter

PREFIX = "base_model.model.model.embed_tokens."
A, B = f"{PREFIX}lora_embedding_A", f"{PREFIX}lora_embedding_B"
COPY = f"{PREFIX}base_layer.weight"
FILE = "adapter_model.safetensors"
TOKENS = [5, 9, 300, 17, 7]
SETTINGS: dict[str, dict[str, Any]] = {
    "alone": {"target_modules": ["embed_tokens"]},
    "beside": {"target_modules": ["q_proj", "embed_tokens"]},
    "with the head": {"target_modules": ["embed_tokens", "lm_head"]},
    "by a regex": {"target_modules": r".*(embed_tokens|v_proj)"},
    "rank of its own": {
        "target_modules": ["embed_tokens", "q_proj"],
        "rank_pattern": {"embed_tokens": 7},
        "alpha_pattern": {"embed_tokens": 3},
        "use_rslora": True,
    },
    "beside a saved head": {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]},
}


def theirs(base: Path, folder: Path) -> np.ndarray:
    return oracle.logits(with_adapter(oracle.float_model(base), folder).eval(), TOKENS)


def refusal(base: Path, folder: Path, out: Path, mode: str = "merge") -> str:
    with pytest.raises(EdgeLoraError) as caught:
        edgelora.export(base, out, adapters={"a": folder}, mode=mode, report=False)
    assert not out.exists()
    text = str(caught.value)
    assert text.startswith(f"{folder}: ") and "\n" not in text
    return text


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", SETTINGS)
def test_merged_equals_pefts_forward(kind: str, tmp_path: Path, *, tied: bool) -> None:
    base = tiny.tiny_llama(tmp_path / "base", tie_word_embeddings=tied)
    folder = make_adapter(base, tmp_path / "a", **SETTINGS[kind])
    assert not [each for each in adapter_ledger(folder, None) if each.verdict == "refused"]
    adapters = {"a": folder}
    edgelora.export(base, tmp_path / "b", adapters=adapters, format="float", mode="merge")
    with edgelora.load(tmp_path / "b") as model:
        oracle.assert_close(model.logits(TOKENS), theirs(base, folder), SHARE)
        model.selfcheck()
    (tmp_path / "text").write_text(" ".join(tiny.TEXT))
    found = evaluate_bundle(
        tmp_path / "b", base=base, adapters=adapters, text=tmp_path / "text", windows=1
    )
    assert all(each.score is not None and each.score.mean_kl < 1e-5 for each in found.scores)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("flavor", ["edgelora", "ort"])
def test_in_4_bits_it_is_near(flavor: str, tmp_path: Path, *, tied: bool) -> None:
    base = tiny.tiny_llama(tmp_path / "base", tie_word_embeddings=tied)
    folder = make_adapter(base, tmp_path / "a", **SETTINGS["beside"])
    options: dict[str, Any] = {"mode": "merge", "flavor": flavor}
    edgelora.export(base, tmp_path / "b", adapters={"a": folder}, **options)
    with edgelora.load(tmp_path / "b") as model:
        ours = model.logits(TOKENS)
    assert np.corrcoef(ours.ravel(), theirs(base, folder).ravel())[0, 1] > 0.95


def test_mode_auto_merges(tmp_path: Path) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    folder = make_adapter(base, tmp_path / "a", **SETTINGS["beside"])
    found = edgelora.export(base, tmp_path / "b", adapters={"a": folder}, mode="auto", report=False)
    assert found.plan.mode == "merge"


def test_with_pefts_copy_of_the_embedding(tmp_path: Path) -> None:
    base = tiny.tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    folder = make_adapter(base, tmp_path / "a", **SETTINGS["beside"])
    with warnings.catch_warnings(action="ignore"):
        with_adapter(oracle.float_model(base), folder).save_pretrained(tmp_path / "c")
    assert COPY in load_file(tmp_path / "c" / FILE)
    options: dict[str, Any] = {"mode": "merge", "report": False}
    for name in "ac":
        edgelora.export(base, tmp_path / f"b{name}", adapters={"x": tmp_path / name}, **options)
    weights = [(tmp_path / f"b{name}" / WEIGHT_FILE).read_bytes() for name in "ac"]
    assert weights[0] == weights[1]
    tensors = dict(load_file(tmp_path / "c" / FILE))
    tensors[COPY][3, 3] += 1
    save_file(tensors, tmp_path / "c" / FILE)
    assert f"{COPY}: a copy of base weights that differs" in refusal(
        base, tmp_path / "c", tmp_path / "out"
    )


def test_beside_the_base_it_is_merge_only(tmp_path: Path) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    folder = make_adapter(base, tmp_path / "a", **SETTINGS["beside"])
    words = re.compile(r"lora_embedding_A, lora_embedding_B: .* merge only: .*--mode merge")
    assert words.search(refusal(base, folder, tmp_path / "b", "side"))
    edgelora.export(base, tmp_path / "b", report=False)
    for given in (None, base):
        with pytest.raises(EdgeLoraError, match=words):
            add_adapter(tmp_path / "b", "a", folder, base=given)
    with pytest.raises(EdgeLoraError, match=words):
        edgelora.compose({folder: 1.0}, tmp_path / "c")


Tensors = dict[str, np.ndarray]
BAD: list[tuple[Callable[[Tensors], object], str]] = [
    (lambda t: t.pop(A), "embed_tokens: has no lora_embedding_A"),
    (lambda t: t.pop(B), "embed_tokens: has no lora_embedding_B"),
    (lambda t: [t.pop(A), t.pop(B)], "has no lora_embedding_A; model.embed_tokens: has no"),
    (lambda t: t.update({A: t[A].T.copy()}), f"{A}: shape [384, 4], but config and base need [4"),
    (lambda t: t.update({B: t[B].T.copy()}), f"{B}: shape [4, 64], but config and base need [64"),
    (lambda t: t.update({A: t[A][:, :-1].copy()}), f"{A}: shape [4, 383]"),
    (lambda t: t.update({A: t[A][:-1].copy()}), f"{A}: shape [3, 384]"),
    (lambda t: t.update({B: t[B] * np.inf}), f"{B}: holds NaN or infinity"),
    (lambda t: t.update({B: t[B].astype(np.float64)}), f"{B}: dtype F64"),
    (lambda t: t.update({A: t[A] * 0 + 1e38, B: t[B] * 0 + 9}), "model.embed_tokens: row 0"),
    (lambda t: t.update({f"{A}.weight": t[A].copy()}), f"{A}.weight: not a factor"),
    (lambda t: t.update({f"{PREFIX}lora_A.weight": t[A].copy()}), "model.embed_tokens"),
    (
        lambda t: t.update({A.replace("embed_tokens", "norm"): t[A].copy()}),
        "model.norm.lora_embedding_A: not a factor of the token embedding",
    ),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=[each[1] for each in BAD])
def test_bad_factors_are_refused_by_name(
    change: Callable[[Tensors], object], words: str, tmp_path: Path
) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    folder = make_adapter(base, tmp_path / "a", **SETTINGS["beside"])
    tensors = dict(load_file(folder / FILE))
    change(tensors)
    save_file(tensors, folder / FILE)
    with pytest.raises(EdgeLoraError) as caught:
        edgelora.export(base, tmp_path / "b", adapters={"a": folder}, mode="merge", report=False)
    assert words in str(caught.value) and not (tmp_path / "b").exists()


FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"target_modules": ["q_proj"]}, f"{A}, {B}: in the file, but the config's target_modules do"),
    ({"use_dora": True}, "use_dora: the token embedding's factors"),
    ({"lora_bias": True}, "lora_bias: the token embedding's factors"),
    ({"exclude_modules": ["embed_tokens"]}, f"{A}, {B}: in the file, but"),
    ({"r": 5}, f"{A}: shape [4, 384], but config and base need [5, 384]"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
]


@pytest.mark.parametrize(("change", "words"), FIELDS, ids=[each[1] for each in FIELDS])
def test_a_field_that_does_not_go_with_them_is_refused(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    folder = make_adapter(base, tmp_path / "a", **SETTINGS["beside"])
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert words in refusal(base, folder, tmp_path / "b")


def test_pefts_dora_of_the_embedding_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    folder = make_adapter(base, tmp_path / "a", target_modules=["embed_tokens"], use_dora=True)
    assert "use_dora: the token embedding's" in refusal(base, folder, tmp_path / "b")


def test_tokens_beside_them_are_refused(tmp_path: Path) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    settings = {"target_modules": ["embed_tokens"], "trainable_token_indices": {"lm_head": [7]}}
    folder = make_adapter(base, tmp_path / "a", **settings)
    words = "trainable_token_indices beside another change of the embedding"
    assert words in refusal(base, folder, tmp_path / "b")


def test_on_repeated_layers(tmp_path: Path) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    settings = {"target_modules": ["embed_tokens"], "layer_replication": [[0, 2], [0, 1]]}
    folder = make_adapter(base, tmp_path / "a", **settings)
    options: dict[str, Any] = {"mode": "merge", "format": "float", "report": False}
    edgelora.export(base, tmp_path / "b", adapters={"a": folder}, **options)
    with edgelora.load(tmp_path / "b") as model:
        oracle.assert_close(model.logits(TOKENS), theirs(base, folder), SHARE)


BASES: dict[str, Callable[[Path], Path]] = {
    "gguf": lambda path: tiny.tiny_gguf(
        path.with_suffix(".gguf"),
        "Q8_0",
        source=tiny.tiny_llama(path.with_name("source"), tie_word_embeddings=True),
    ),
    "bitsandbytes": tiny.tiny_bitsandbytes,
}


@pytest.mark.parametrize("kind", BASES)
def test_the_other_weights_of_a_quantized_base_are_carried(kind: str, tmp_path: Path) -> None:
    base = BASES[kind](tmp_path / "base")
    whole = tmp_path / "source" if kind == "gguf" else base
    folder = make_adapter(whole, tmp_path / "a", target_modules=["embed_tokens"])
    edgelora.export(base, tmp_path / "b", adapters={"a": folder}, mode="merge")
    checkpoint = open_checkpoint(base)
    weights = dict(oracle.BundleWeights(tmp_path / "b").matrices())
    name = "model.layers.0.self_attn.o_proj"
    assert np.array_equal(weights[name], checkpoint.read(f"{name}.weight"))
    if kind == "gguf":
        embedding = checkpoint.read("model.embed_tokens.weight")
        assert np.array_equal(weights["lm_head"], embedding)
    with edgelora.load(tmp_path / "b") as model:
        ours = model.logits(TOKENS)
    assert np.corrcoef(ours.ravel(), theirs(whole, folder).ravel())[0, 1] > 0.95


def test_calibrated_it_is_near(tmp_path: Path) -> None:
    base = tiny.tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    folder = make_adapter(base, tmp_path / "a", **SETTINGS["beside"])
    (tmp_path / "text").write_text(" ".join(tiny.TEXT * 400))
    options: dict[str, Any] = {"quality": "balanced", "calibration": str(tmp_path / "text")}
    edgelora.export(base, tmp_path / "b", adapters={"a": folder}, mode="merge", **options)
    with edgelora.load(tmp_path / "b") as model:
        ours = model.logits(TOKENS)
    assert np.corrcoef(ours.ravel(), theirs(base, folder).ravel())[0, 1] > 0.95
