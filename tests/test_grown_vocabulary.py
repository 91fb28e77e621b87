"""Adapters of a base whose vocabulary was grown before training: merged as PEFT computes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer

import edgelora
import oracle
import tiny
from edgelora.adapter import adapter_ledger
from edgelora.adding import add_adapter
from edgelora.errors import EdgeLoraError
from edgelora.evaluating import evaluate_bundle
from test_float_oracle import SHARE

pytestmark = pytest.mark.filterwarnings(
    "ignore:Model has .tie_word_embeddings=True", "ignore:Setting .save_embedding_layers"
)
ROWS = tiny.VOCAB_SIZE + 6
TOKENS = [5, 9, tiny.VOCAB_SIZE, 300, ROWS - 1, 7]
NEW = "<|new|>"
BOTH = ("embed_tokens", "lm_head")


def grown(base: Path, folder: Path, saved: tuple[str, ...] = BOTH, **settings: Any) -> np.ndarray:
    """A PEFT folder with the grown tokenizer, and PEFT's logits."""
    model = oracle.float_model(base)
    torch.manual_seed(3)
    model.resize_token_embeddings(ROWS, mean_resizing=False)
    settings |= {"target_modules": ["q_proj"], "modules_to_save": list(saved)}
    config = LoraConfig(task_type="CAUSAL_LM", r=4, **settings)
    adapted = get_peft_model(model, config)
    for name, values in adapted.named_parameters():
        if ".lora_" in name or ".modules_to_save." in name:
            values.data = (0.2 * torch.randn_like(values)).half().float()
    adapted.save_pretrained(folder, save_embedding_layers=True)
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.add_tokens([NEW])
    tokenizer.save(str(folder / "tokenizer.json"))
    return oracle.logits(adapted.eval(), TOKENS)


@pytest.mark.parametrize("tied", [False, True])
def test_merged_equals_peft(tmp_path: Path, *, tied: bool) -> None:
    base = tiny.tiny_llama(tmp_path / "base", tie_word_embeddings=tied)
    theirs = grown(base, tmp_path / "a")
    adapters = {"a": tmp_path / "a"}
    edgelora.export(base, tmp_path / "b", adapters=adapters, format="float", mode="merge")
    with edgelora.load(tmp_path / "b") as model:
        assert model.info.vocab_size == ROWS
        oracle.assert_close(model.logits(TOKENS), theirs, SHARE)
        model.selfcheck()
    tokenizer = Tokenizer.from_file(str(tmp_path / "b" / "tokenizer.json"))
    assert tokenizer.token_to_id(NEW) is not None
    (tmp_path / "text").write_text(" ".join(tiny.TEXT))
    found = evaluate_bundle(
        tmp_path / "b", base=base, adapters=adapters, text=tmp_path / "text", windows=1
    )
    assert all(each.score is not None and each.score.mean_kl < 1e-5 for each in found.scores)


@pytest.mark.parametrize("saved", BOTH)
def test_kept_tied_a_head_grows_with_the_embedding(saved: str, tmp_path: Path) -> None:
    base = tiny.tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    theirs = grown(base, tmp_path / "a", (saved,), ensure_weight_tying=True)
    adapters = {"a": tmp_path / "a"}
    edgelora.export(base, tmp_path / "b", adapters=adapters, format="float", mode="merge")
    with edgelora.load(tmp_path / "b") as model:
        oracle.assert_close(model.logits(TOKENS), theirs, SHARE)


def test_in_4_bits_it_is_near(tmp_path: Path) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    theirs = grown(base, tmp_path / "a")
    edgelora.export(base, tmp_path / "b", adapters={"a": tmp_path / "a"}, mode="merge")
    with edgelora.load(tmp_path / "b") as model:
        ours = model.logits(TOKENS)
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.95


def test_other_modes_say_merge_only(tmp_path: Path) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    grown(base, tmp_path / "a")
    assert not [e for e in adapter_ledger(tmp_path / "a", None) if e.verdict == "refused"]
    said = f"a grown vocabulary of {ROWS} tokens, the base has {tiny.VOCAB_SIZE}: merge only, since"
    with pytest.raises(EdgeLoraError, match=rf"/a: modules_to_save: {said} .*--mode merge"):
        edgelora.export(base, tmp_path / "b", adapters={"a": tmp_path / "a"})
    edgelora.export(base, tmp_path / "b", report=False)
    with pytest.raises(EdgeLoraError, match=said):
        add_adapter(tmp_path / "b", "a", tmp_path / "a")


def test_what_is_missing_of_a_grown_vocabulary_is_said(tmp_path: Path) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    grown(base, tmp_path / "a")
    settings: dict[str, Any] = {"adapters": {"a": tmp_path / "a"}, "mode": "merge"}
    (tmp_path / "a" / "tokenizer.json").unlink()
    with pytest.raises(EdgeLoraError, match=r"/a: no tokenizer\.json"):
        edgelora.export(base, tmp_path / "b", **settings)


def test_an_embedding_without_its_head_is_refused(tmp_path: Path) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    grown(base, tmp_path / "a", saved=("embed_tokens",))
    settings: dict[str, Any] = {"adapters": {"a": tmp_path / "a"}, "mode": "merge"}
    with pytest.raises(EdgeLoraError, match=r"/a: .*lm_head"):
        edgelora.export(base, tmp_path / "b", **settings)
