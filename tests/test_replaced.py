"""Modules and rows that an adapter saved whole: merged as PEFT computes with them, else refused."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import edgelora
import oracle
import tiny
from edgelora import EdgeLoraError
from edgelora.adapter import adapter_ledger
from edgelora.adding import add_adapter
from edgelora.checkpoint import merged_fingerprint
from edgelora.manifest import read_manifest
from test_float_oracle import SHARE, TOKENS, make_adapter, with_adapter

BASES: dict[str, Callable[..., Path]] = {
    "untied": tiny.tiny_llama,
    "tied": partial(tiny.tiny_llama, tie_word_embeddings=True),
    "qwen2": tiny.tiny_qwen2,
    "qwen3": partial(tiny.tiny_qwen3, tie_word_embeddings=True),
}
IDS = [5, 300, 42]
KINDS: dict[str, dict[str, Any]] = {
    "norms": {"modules_to_save": ["norm"]},
    "one_norm": {"modules_to_save": ["model.norm"]},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
    "both": {"modules_to_save": ["embed_tokens", "lm_head"], "use_dora": True},
    "linears": {"modules_to_save": ["k_proj", "mlp"], "target_modules": "all-linear"},
    "head_instead_of_target": {
        "modules_to_save": ["lm_head"],
        "target_modules": ["lm_head", "q_proj"],
    },
    "head_s_branch": {"modules_to_save": ["embed_tokens"], "target_modules": ["lm_head"]},
    "kept_tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "kept_tied_tokens": {"trainable_token_indices": IDS, "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": IDS},
    "tokens_of_head": {"trainable_token_indices": {"lm_head": IDS}},
    "tokens_of_both": {"trainable_token_indices": {"embed_tokens": IDS, "lm_head": IDS}},
    "other_tokens": {"trainable_token_indices": {"embed_tokens": IDS, "lm_head": [7]}},
    "tokens_and_norms": {"trainable_token_indices": IDS, "modules_to_save": ["norm"]},
}


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return BASES[request.param](tmp_path_factory.mktemp(request.param))


def saved(base: Path, folder: Path, kind: str) -> Path:
    return make_adapter(base, folder, **{"target_modules": ["q_proj", "up_proj"], **KINDS[kind]})


def logits(bundle: Path) -> np.ndarray:
    with edgelora.load(bundle, threads=2) as model:
        return model.logits(TOKENS)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_peft(base: Path, kind: str, tmp_path: Path) -> None:
    adapter = saved(base, tmp_path / "a", kind)
    bundle = tmp_path / "bundle"
    edgelora.export(base, bundle, adapters={"a": adapter}, format="float", mode="merge")
    theirs = oracle.logits(with_adapter(oracle.float_model(base), adapter), TOKENS)
    oracle.assert_close(logits(bundle), theirs, SHARE)
    plain = oracle.logits(oracle.float_model(base), TOKENS)
    assert np.abs(theirs - plain).max() > 100 * SHARE * np.abs(theirs).max()


def weights_of(folder: Path, name: str = "adapter_model") -> dict[str, np.ndarray]:
    return dict(load_file(folder / f"{name}.safetensors"))


def trained_base(base: Path, adapter: Path, folder: Path) -> Path:
    """The base with what the adapter saved in its own file; the adapter's branches become zero."""
    shutil.copytree(base, folder)
    tensors, kept = weights_of(base, "model"), weights_of(adapter)
    for name, values in kept.items():
        path, ids = name.removeprefix("base_model.model."), list(IDS)
        if ".lora_" in name:
            kept[name] = values * 0 if "lora_B" in name else values
        elif ".token_adapter." in path:
            tensors[f"{path.split('.token_adapter.')[0]}.weight"][ids] = values
        else:
            tensors[path] = values
    save_file(kept, adapter / "adapter_model.safetensors")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("quality", ["fast", "balanced"])
@pytest.mark.parametrize("kind", ["norms", "embedding", "head", "linears", "tokens"])
def test_merged_in_4_bits_is_the_bundle_of_a_base_that_was_trained_so(
    kind: str, quality: str, tmp_path: Path
) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    adapter = saved(base, tmp_path / "a", kind)
    trained = trained_base(base, adapter, tmp_path / "trained")
    options: dict[str, Any] = {"quality": quality}
    if quality == "balanced":
        words = np.random.default_rng(0).choice(" ".join(tiny.TEXT).split(), 30_000)
        (tmp_path / "text").write_text(" ".join(words))
        options["calibration"] = tmp_path / "text"
    edgelora.export(base, tmp_path / "ours", adapters={"a": adapter}, mode="merge", **options)
    edgelora.export(trained, tmp_path / "theirs", **options)
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_the_rest_of_a_quantized_base_is_carried(tmp_path: Path) -> None:
    source = tiny.tiny_llama(tmp_path / "source")
    file = tiny.tiny_gguf(tmp_path / "base.gguf", "Q4_0", source=source)
    adapter = saved(source, tmp_path / "a", "linears")
    edgelora.export(file, tmp_path / "ours", adapters={"a": adapter}, mode="merge")
    edgelora.export(file, tmp_path / "plain")
    ours, plain = (dict(oracle.BundleWeights(tmp_path / n).matrices()) for n in ("ours", "plain"))
    factors = weights_of(adapter)
    for name, values in ours.items():
        targeted = f"base_model.model.{name}.lora_A.weight" in factors
        whole = f"base_model.model.{name}.weight" in factors
        assert np.array_equal(values, plain[name]) == (not targeted and not whole), name


def test_the_bundle_names_base_and_adapter_as_any_merged_one(tmp_path: Path) -> None:
    """The fingerprint is of the source base, whatever is replaced in it."""
    base = tiny.tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    adapter = saved(base, tmp_path / "a", "embedding")
    edgelora.export(base, tmp_path / "plain")
    edgelora.export(base, tmp_path / "ours", adapters={"a": adapter}, mode="merge")
    manifest = read_manifest(tmp_path / "ours")
    source = read_manifest(tmp_path / "plain")["base"]["fingerprint"]
    merged = merged_fingerprint(source, manifest["merged"]["a"]["source"])
    assert manifest["base"]["fingerprint"] == merged


@pytest.mark.parametrize("kind", ["norms", "embedding", "tokens"])
def test_a_side_branch_refuses_it_by_name(base: Path, kind: str, tmp_path: Path) -> None:
    adapter = saved(base, tmp_path / "a", kind)
    field = "trainable_token_indices" if kind == "tokens" else "modules_to_save"
    edgelora.export(base, tmp_path / "plain")
    for flavor in ("edgelora", "ort"):
        with pytest.raises(EdgeLoraError, match=rf"/a: {field}: .*weight.*--mode merge"):
            edgelora.export(base, tmp_path / "b", adapters={"a": adapter}, flavor=flavor)
    with pytest.raises(EdgeLoraError, match=rf"/a: {field}: .*weight.*--mode merge"):
        add_adapter(tmp_path / "plain", "a", adapter)
    with pytest.raises(EdgeLoraError, match=rf"/a: {field}: .*weight.*--mode merge"):
        edgelora.compose({adapter: 1.0}, tmp_path / "sum")


P = "base_model.model."
EMBEDDING, NORM = f"{P}model.embed_tokens.weight", f"{P}model.norm.weight"
HEAD = f"{P}lm_head.weight"
DELTA = f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta"
Tensors = dict[str, np.ndarray]
WRONG: list[tuple[str, Callable[[Tensors], object], str]] = [
    ("embedding", lambda t: t.update({EMBEDDING: np.ones((385, 64))}), "saved as [385, 64]"),
    ("embedding", lambda t: t.pop(EMBEDDING), "modules_to_save 'embed_tokens': the file has"),
    ("norms", lambda t: t.pop(NORM), "model.norm.weight: of modules_to_save, but not in the file"),
    ("norms", lambda t: t.update({NORM: np.full(64, np.nan)}), "holds NaN"),
    ("norms", lambda t: t.update({f"{P}model.norm.bias": np.ones(64)}), "no such tensor"),
    ("norms", lambda t: t.update({EMBEDDING: np.ones((384, 64))}), "a copy of base weights"),
    ("kept_tied", lambda t: t.update({HEAD: t[EMBEDDING] + 1}), "a copy of base weights that"),
    ("tokens", lambda t: t.update({DELTA: np.ones((2, 64))}), "config names 3 tokens"),
    ("tokens", lambda t: t.update({DELTA: np.ones((3, 48))}), "rows of 48 values"),
    ("tokens", lambda t: t.pop(DELTA), "trainable_token_indices: the file has nothing"),
    ("norms", lambda t: t.update({DELTA: np.ones((3, 64))}), "name no rows of this module"),
    ("tokens", lambda t: t.update({DELTA.replace("embed_tokens", "norm"): t.pop(DELTA)}), "rows"),
]


@pytest.mark.parametrize(("kind", "change", "culprit"), WRONG, ids=[each[2] for each in WRONG])
def test_a_wrong_file_is_refused_by_name(
    kind: str, change: Callable[[Tensors], object], culprit: str, tmp_path: Path
) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    adapter = saved(base, tmp_path / "a", kind)
    tensors = weights_of(adapter)
    change(tensors)
    tensors = {name: values.astype(np.float32) for name, values in tensors.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(EdgeLoraError) as caught:
        edgelora.export(base, tmp_path / "bundle", adapters={"a": adapter}, mode="merge")
    assert culprit in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "culprit"),
    [
        ({"modules_to_save": "norm"}, "modules_to_save"),
        ({"modules_to_save": ["norm", "("]}, "modules_to_save '(': not a valid regex"),
        ({"modules_to_save": ["embed_tokens"], "trainable_token_indices": IDS}, "not in the file"),
        ({"trainable_token_indices": [5, 5, 6]}, "different token ids"),
        ({"trainable_token_indices": [-1]}, "different token ids"),
        ({"trainable_token_indices": {"wte": [1]}}, "embed_tokens and lm_head"),
        ({"trainable_token_indices": [5, 300, 384]}, "token 384 is not below vocab_size 384"),
        ({"trainable_token_indices": {"embed_tokens": IDS, "lm_head": [1]}}, "lm_head.weight"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused_by_name(
    fields: dict[str, Any], culprit: str, tmp_path: Path
) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    adapter = saved(base, tmp_path / "a", "tokens")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(EdgeLoraError) as caught:
        edgelora.export(base, tmp_path / "bundle", adapters={"a": adapter}, mode="merge")
    assert culprit in str(caught.value) and "\n" not in str(caught.value)


def test_a_module_saved_inside_another_is_refused(base: Path, tmp_path: Path) -> None:
    """PEFT writes up_proj as mlp's copy holds it, not as it was trained, and cannot load it."""
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["mlp", "up_proj"]}
    adapter = make_adapter(base, tmp_path / "a", **settings)
    inside = r"/a: [^:]*layers.0.mlp.up_proj.weight[^:]*: in one of modules_to_save inside another"
    with pytest.raises(EdgeLoraError, match=inside):
        edgelora.export(base, tmp_path / "bundle", adapters={"a": adapter}, mode="merge")


def test_tokens_beside_a_branch_of_a_tied_head_are_refused(tmp_path: Path) -> None:
    base = tiny.tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    adapter = saved(base, tmp_path / "a", "tokens")
    path = adapter / "adapter_config.json"
    fields = json.loads(path.read_text()) | {"target_modules": ["q_proj", "up_proj", "lm_head"]}
    path.write_text(json.dumps(fields))
    shapes = {"A": (4, 64), "B": (384, 4)}
    head = {f"{P}lm_head.lora_{each}.weight": np.ones(shapes[each]) for each in shapes}
    tensors = weights_of(adapter) | {name: v.astype(np.float32) for name, v in head.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(EdgeLoraError, match="beside another change of the embedding or lm_head"):
        edgelora.export(base, tmp_path / "bundle", adapters={"a": adapter}, mode="merge")


def test_ledger_says_what_is_replaced(tmp_path: Path) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    adapter = saved(base, tmp_path / "a", "tokens_and_norms")
    ledger = {each.item: each for each in adapter_ledger(adapter, None)}
    assert not [each for each in ledger.values() if each.verdict == "refused"]
    assert "3 rows replace the base's" in ledger[DELTA].reason
    assert "replaces the base's: --mode merge" in ledger[NORM].reason
    assert ledger["trainable_token_indices = [5, 300, 42]"].verdict == "exported"
