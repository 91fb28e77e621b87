"""What PEFT saves by default of an adapter of lm_head or the embedding: copies of base weights."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftConfig, get_peft_model
from safetensors.numpy import load_file, save_file

import edgelora
import oracle
import tiny
from edgelora.adapter import adapter_ledger
from edgelora.adding import add_adapter
from edgelora.base_copies import _rounded
from edgelora.checkpoint import open_checkpoint
from edgelora.errors import EdgeLoraError
from edgelora.plan import ExportOptions
from edgelora.request import prepare
from ledger_adapters import with_tensors
from test_adapter import change_config
from test_float_oracle import SHARE, make_adapter

COPY = "base_model.model.lm_head.base_layer.weight"
PLAIN = "base_model.model.lm_head.weight"
TOKENS = [5, 9, 300, 17, 7]
CONFIGS: dict[str, PeftConfig] = {
    "lora": LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "lm_head"]),
    "dora": LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["lm_head"], use_dora=True),
    "ia3": IA3Config(task_type="CAUSAL_LM", target_modules=["lm_head"], feedforward_modules=[]),
    "adalora": AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules=["lm_head"], init_r=3, total_step=10
    ),
}


def saved(base: Path, folder: Path, kind: str = "lora", dtype: torch.dtype | None = None) -> Path:
    """As PEFT saves it by default, from a model in that dtype."""
    model = oracle.float_model(base)
    if dtype is not None:
        model = model.to(dtype)
    with warnings.catch_warnings(action="ignore"):
        adapted = get_peft_model(model, CONFIGS[kind])
        torch.manual_seed(7)
        for values in (each for each in adapted.parameters() if each.requires_grad):
            values.data = (0.2 * torch.randn_like(values)).half().to(values.dtype)
        adapted.save_pretrained(folder)
    return folder


def logits(base: Path, folder: Path) -> np.ndarray:
    from peft import PeftModel

    with warnings.catch_warnings(action="ignore"):
        adapted = PeftModel.from_pretrained(oracle.float_model(base), str(folder))
    return oracle.logits(adapted.eval(), TOKENS)


def refusal(base: Path, folder: Path, out: Path, **options: str) -> str:
    with pytest.raises(EdgeLoraError) as caught:
        edgelora.export(base, out, adapters={"a": folder}, report=False, **options)
    assert not out.exists()
    text = str(caught.value)
    assert text.startswith(f"{folder}: ") and "\n" not in text
    return text


@pytest.mark.parametrize("mode", ["side", "merge"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_copy_that_equals_the_base_is_harmless(
    kind: str, mode: str, tmp_path: Path, *, tied: bool
) -> None:
    base = tiny.tiny_llama(tmp_path / "base", tie_word_embeddings=tied)
    folder = saved(base, tmp_path / "a", kind)
    assert COPY in load_file(folder / "adapter_model.safetensors")
    edgelora.export(
        base, tmp_path / "b", adapters={"a": folder}, mode=mode, format="float", report=False
    )
    with edgelora.load(tmp_path / "b") as model:
        name = "a" if mode == "side" else None
        oracle.assert_close(model.logits(TOKENS, adapter=name), logits(base, folder), SHARE)


def test_the_ledger_says_what_became_of_it(tmp_path: Path) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    folder = saved(base, tmp_path / "a")
    alone = {each.item: each for each in adapter_ledger(folder, None)}
    assert alone[COPY].verdict == "harmless"
    assert "to be compared with the base's" in alone[COPY].reason
    assert not [each for each in alone.values() if each.verdict == "refused"]
    request = prepare(base, {"a": folder}, ExportOptions(mode="side", report=False))
    entries = {each.item: each for each in request.adapters["a"].ledger}
    assert entries[COPY][1:] == ("harmless", "equals the base's")
    assert not request.adapters["a"].copies


@pytest.mark.parametrize("mode", ["side", "merge", "auto"])
@pytest.mark.parametrize("place", [0, 12345, -1])
def test_a_single_other_value_is_refused(place: int, mode: str, tmp_path: Path) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    folder = saved(base, tmp_path / "a")
    tensors = dict(load_file(folder / "adapter_model.safetensors"))
    tensors[COPY].flat[place] = np.nextafter(tensors[COPY].flat[place], np.float32(1))
    text = refusal(base, with_tensors(folder, tmp_path / "t", tensors), tmp_path / "b", mode=mode)
    words = ("copy of base weights that differs", "modules_to_save", "save_embedding_layers=False")
    assert all(word in text for word in (COPY, *words))


def renamed(tensors: dict[str, np.ndarray]) -> None:
    tensors[PLAIN] = tensors.pop(COPY) + np.float32(1)


WRONG: list[tuple[Callable[[dict[str, np.ndarray]], object], str]] = [
    (renamed, f"{PLAIN}: a copy of base weights that differs"),
    (lambda t: t.update({COPY: t[COPY] * np.nan}), f"{COPY}: holds NaN"),
    (lambda t: t.update({COPY: t[COPY].astype(np.float64)}), "in dtype F64"),
    (lambda t: t.update({COPY: t[COPY][:-1].copy()}), "of shape [383, 64]"),
    (lambda t: t.update({COPY: t[COPY].T.copy()}), "of shape [64, 384]"),
    (lambda t: t.update({COPY: t[COPY].reshape(-1)}), "of shape [24576]"),
    (lambda t: t.update({COPY: np.r_[t[COPY], t[COPY][:2]]}), "386 rows, the base has 384"),
    (lambda t: t.update({f"{COPY}.absmax": t[COPY][0].copy()}), f"{COPY}.absmax"),
]


@pytest.mark.parametrize(("change", "words"), WRONG, ids=[each[1] for each in WRONG])
@pytest.mark.parametrize("kind", ["lora", "ia3", "adalora"])
def test_a_wrong_copy_is_refused_by_name(
    kind: str, change: Callable[[dict[str, np.ndarray]], object], words: str, tmp_path: Path
) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    folder = saved(base, tmp_path / "a", kind)
    tensors = dict(load_file(folder / "adapter_model.safetensors"))
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    assert words in refusal(base, folder, tmp_path / "b")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_copy_of_a_rounded_base_is_compared_as_rounded(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    folder = saved(base, tmp_path / "a", dtype=dtype)
    adapters = {"a": folder}
    edgelora.export(base, tmp_path / "b", adapters=adapters, mode="side", report=False)
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    tensors = load_torch(folder / "adapter_model.safetensors")
    tensors[COPY][7, 3] *= 1.02
    save_torch(tensors, folder / "adapter_model.safetensors")
    assert "differs from the base's" in refusal(base, folder, tmp_path / "c")


@pytest.mark.parametrize("kind", ["F32", "F16", "Q4_0", "Q5_0"])
def test_of_a_gguf_the_dequantized_values_are_compared(kind: str, tmp_path: Path) -> None:
    source = tiny.tiny_llama(tmp_path / "source", hidden_size=256)
    types = {"": "F32", "output.weight": kind}
    file = tiny.tiny_gguf(tmp_path / "base.gguf", types, source=source)
    folder = saved(source, tmp_path / "a")
    tensors = dict(load_file(folder / "adapter_model.safetensors"))
    tensors[COPY] = open_checkpoint(file).read("lm_head.weight")
    good = with_tensors(folder, tmp_path / "good", tensors)
    edgelora.export(file, tmp_path / "b", adapters={"a": good}, report=False)
    tensors[COPY][3, 3] += np.float32(2**-8)
    bad = with_tensors(folder, tmp_path / "bad", tensors)
    assert "differs from the base's, dequantized: if" in refusal(file, bad, tmp_path / "c")
    if kind.startswith("Q"):
        assert "differs from the base's, dequantized" in refusal(file, folder, tmp_path / "d")


def test_of_a_bitsandbytes_base_lm_head_is_compared_as_it_is(tmp_path: Path) -> None:
    base = tiny.tiny_bitsandbytes(tmp_path / "base")
    folder = saved(base, tmp_path / "a")
    edgelora.export(base, tmp_path / "b", adapters={"a": folder}, report=False)
    tensors = dict(load_file(folder / "adapter_model.safetensors"))
    tensors[COPY][3, 3] += 1
    other = with_tensors(folder, tmp_path / "other", tensors)
    assert "differs from the base's: if" in refusal(base, other, tmp_path / "c")


def test_rounding_is_torchs() -> None:
    bits = np.random.default_rng(3).integers(0, 2**32, 1 << 16, dtype=np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) < 3e38)]
    for name, dtype in (("F16", torch.float16), ("BF16", torch.bfloat16)):
        theirs = torch.from_numpy(values).to(dtype).float().numpy()
        assert np.array_equal(_rounded(values, name).astype(np.float32), theirs)


def test_add_adapter_compares_with_the_base_only(tmp_path: Path) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    folder, bundle = saved(base, tmp_path / "a"), tmp_path / "b"
    edgelora.export(base, bundle, format="float", report=False)
    with pytest.raises(EdgeLoraError, match=r"copy of base weights: .*--base"):
        add_adapter(bundle, "a", folder)
    add_adapter(bundle, "a", folder, base=base)
    with edgelora.load(bundle) as model:
        oracle.assert_close(model.logits(TOKENS, adapter="a"), logits(base, folder), SHARE)
    tensors = dict(load_file(folder / "adapter_model.safetensors"))
    tensors[COPY][3, 3] += 1
    other = with_tensors(folder, tmp_path / "other", tensors)
    with pytest.raises(EdgeLoraError, match="differs from the base's"):
        add_adapter(bundle, "c", other, base=base)


def test_compose_has_no_base_to_compare_with(tmp_path: Path) -> None:
    folder = saved(tiny.tiny_llama(tmp_path / "base"), tmp_path / "a")
    with pytest.raises(EdgeLoraError, match=r"copy of base weights: .*save_embedding_layers=False"):
        edgelora.compose({folder: 1.0}, tmp_path / "out")


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_a_grown_vocabulary_without_modules_to_save_says_what_to_do(
    targets: list[str], tmp_path: Path
) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    model = oracle.float_model(base)
    model.resize_token_embeddings(tiny.VOCAB_SIZE + 6, mean_resizing=False)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets)
    with warnings.catch_warnings(action="ignore"):
        get_peft_model(model, config).save_pretrained(tmp_path / "a")
    text = refusal(base, tmp_path / "a", tmp_path / "b")
    words = "a copy of base weights with 390 rows, the base has 384: a grown vocabulary: train"
    assert words in text and "modules_to_save" in text and "merge_and_unload" in text


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_bad_field_is_not_blamed_on_the_copy(kind: str, tmp_path: Path) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    folder = saved(base, tmp_path / "a", kind)
    change_config(folder, target_modules=7)
    assert COPY not in refusal(base, folder, tmp_path / "b")


def test_of_a_base_whose_layers_are_repeated_too(tmp_path: Path) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    settings = {"target_modules": ["q_proj", "lm_head"], "layer_replication": [[0, 2], [0, 1]]}
    folder = make_adapter(base, tmp_path / "a", **settings)
    tensors = dict(load_file(folder / "adapter_model.safetensors"))
    tensors[COPY] = open_checkpoint(base).read("lm_head.weight")
    adapters = {"a": with_tensors(folder, tmp_path / "c", tensors)}
    edgelora.export(base, tmp_path / "b", adapters=adapters, report=False)
    tensors[COPY][3, 3] += 1
    with_tensors(folder, tmp_path / "c", tensors)
    assert "differs from the base's" in refusal(base, tmp_path / "c", tmp_path / "d")
