"""target_parameters of ordinary weights are plain LoRA, by rules of its own: held against PEFT."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgelora
import oracle
import tiny
from edgelora.adapter import adapter_ledger, read_adapter
from edgelora.adding import add_adapter
from edgelora.checkpoint import open_checkpoint
from edgelora.errors import EdgeLoraError
from edgelora.layout import targets
from test_adapter import change_config
from test_float_oracle import SHARE, TOKENS, make_adapter, with_adapter

# PEFT warns of a pattern that it does follow.
pytestmark = pytest.mark.filterwarnings("ignore:.*_pattern keys did not match any targeted module")

KINDS: dict[str, dict[str, Any]] = {
    "alone": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    "one path": {
        "target_modules": [],
        "target_parameters": ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"],
    },
    "beside modules": {
        "target_modules": ["v_proj"],
        "target_parameters": ["down_proj.weight"],
        "layers_to_transform": [0],
        "rank_pattern": {"down_proj.weight": 3, "v_proj": 2},
        "alpha_pattern": {"down_proj.weight": 5},
        "use_rslora": True,
    },
    "not excluded": {
        "target_modules": ["k_proj", "q_proj"],
        "exclude_modules": ["q_proj"],
        "target_parameters": ["q_proj.weight"],
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["side", "merge"])
def test_logits_equal_peft(base: Path, mode: str, kind: str, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "a", **KINDS[kind])
    options = {"format": "float", "mode": mode, "report": False}
    edgelora.export(base, tmp_path / "bundle", adapters={"a": adapter}, **options)
    with edgelora.load(tmp_path / "bundle") as model:
        ours = model.logits(TOKENS, adapter="a" if mode == "side" else None)
    theirs = oracle.logits(with_adapter(oracle.float_model(base), adapter), TOKENS)
    oracle.assert_close(ours, theirs, SHARE)
    plain = oracle.logits(oracle.float_model(base), TOKENS)
    assert np.abs(theirs - plain).max() > 100 * SHARE * np.abs(theirs).max()


def test_ranks_and_scalings_follow_the_weight_s_path(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "a", **KINDS["beside modules"])
    branches = read_adapter(adapter, targets(open_checkpoint(base).config)).branches
    ranks = {target.rpartition(".")[2]: branch.rank for target, branch in branches.items()}
    assert ranks == {"v_proj": 2, "down_proj": 3} and len(branches) == 3
    down = branches["model.layers.1.mlp.down_proj"]  # layers_to_transform is of modules
    assert down.scaling == pytest.approx(5 / np.sqrt(3))


def test_it_is_added_and_inspected_without_the_base(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "a", **KINDS["beside modules"])
    assert not [each for each in adapter_ledger(adapter, None) if each.verdict == "refused"]
    edgelora.export(base, tmp_path / "bundle", report=False)
    add_adapter(tmp_path / "bundle", "a", adapter)


def test_the_embedding_s_weight_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    names = ["q_proj.weight", "embed_tokens.weight"]
    adapter = make_adapter(base, tmp_path / "a", target_modules=[], target_parameters=names)
    with pytest.raises(EdgeLoraError, match=r"model\.embed_tokens: the base has no linear"):
        edgelora.export(base, tmp_path / "bundle", adapters={"a": adapter})


def test_a_weight_that_no_linear_has_is_said(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "a", **KINDS["alone"])
    change_config(adapter, target_parameters=["q_proj.weight", "router.weight"])
    ledger = {each.item: each.verdict for each in adapter_ledger(adapter, None)}
    assert ledger["target_parameters 'router.weight'"] == "harmless"
    change_config(adapter, target_parameters=["v_proj.weight"])
    with pytest.raises(EdgeLoraError, match="do not name it"):
        read_adapter(adapter, targets(open_checkpoint(base).config))
