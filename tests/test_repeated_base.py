"""layer_replication: the base with its layers repeated, held against PEFT."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgelora
import oracle
import tiny
from edgelora.adapter import adapter_ledger
from edgelora.adding import add_adapter
from edgelora.errors import EdgeLoraError
from edgelora.evaluating import evaluate_bundle
from edgelora.manifest import read_manifest
from edgelora.plan import ExportOptions
from edgelora.request import prepare
from test_adapter import change_config
from test_float_oracle import SHARE, TOKENS, make_adapter, with_adapter

RANGES = [[0, 2], [1, 2], [0, 1]]
LAYERS = [0, 1, 1, 0]
KINDS: dict[str, dict[str, Any]] = {
    "all": {"target_modules": "all-linear"},
    "one copy": {"target_modules": ["q_proj"], "layers_to_transform": [2]},
    "dora": {"target_modules": ["down_proj"], "use_dora": True},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_llama(tmp_path_factory.mktemp("base"))


def make(base: Path, folder: Path, kind: str, ranges: list[list[int]] = RANGES) -> Path:
    return make_adapter(base, folder, layer_replication=ranges, **KINDS[kind])


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        (kind, mode)
        for kind in KINDS
        for mode in ("side", "merge")
        if (kind, mode) != ("saved", "side")
    ],
)
def test_logits_equal_peft(kind: str, mode: str, base: Path, tmp_path: Path) -> None:
    adapter = make(base, tmp_path / "a", kind)
    options: dict[str, Any] = {"format": "float", "mode": mode, "report": False}
    edgelora.export(base, tmp_path / "bundle", adapters={"a": adapter}, **options)
    with edgelora.load(tmp_path / "bundle") as model:
        ours = model.logits(TOKENS, adapter="a" if mode == "side" else None)
        model.selfcheck()
    theirs = oracle.logits(with_adapter(oracle.float_model(base), adapter), TOKENS)
    oracle.assert_close(ours, theirs, SHARE)
    plain = oracle.logits(oracle.float_model(base), TOKENS)
    assert np.abs(theirs - plain).max() > 100 * SHARE * np.abs(theirs).max()
    manifest = read_manifest(tmp_path / "bundle")
    assert manifest["base"]["layers"] == LAYERS and manifest["model"]["num_hidden_layers"] == 4


@pytest.mark.parametrize("kind", ["Q4_1", "plain fp4"])
def test_codes_of_repeated_layers_are_carried_and_their_bytes_foreseen(
    kind: str, base: Path, tmp_path: Path
) -> None:
    adapter = make(base, tmp_path / "a", "all")
    if kind == "Q4_1":
        source = tiny.tiny_gguf(tmp_path / "base.gguf", kind, source=base)
    else:
        settings: dict[str, Any] = {"quant_type": "fp4", "double_quant": False}
        source = tiny.tiny_bitsandbytes(tmp_path / "base", **settings)
    request = prepare(source, {"a": adapter}, ExportOptions(report=False))
    assert "28 in" in request.plan.reasons["carry"]
    report = edgelora.export(source, tmp_path / "bundle", adapters={"a": adapter}, report=False)
    assert report.plan == request.plan


def test_an_evaluation_finds_the_base_again(base: Path, tmp_path: Path) -> None:
    adapter = make(base, tmp_path / "a", "all")
    edgelora.export(base, tmp_path / "bundle", adapters={"a": adapter}, format="float")
    (tmp_path / "text").write_text(tiny.TEXT if isinstance(tiny.TEXT, str) else " ".join(tiny.TEXT))
    found = evaluate_bundle(tmp_path / "bundle", base=base, text=tmp_path / "text", windows=1)
    assert all(each.score is not None and each.score.mean_kl < 1e-5 for each in found.scores)


def test_an_evaluation_refuses_a_base_of_fewer_layers(base: Path, tmp_path: Path) -> None:
    adapter = make(base, tmp_path / "a", "all")
    edgelora.export(base, tmp_path / "bundle", adapters={"a": adapter}, format="float")
    other = tiny.tiny_llama(tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(EdgeLoraError, match=r"/other: it has 1 layers, .* at least 2: give that"):
        evaluate_bundle(tmp_path / "bundle", base=other)


def test_bundles_take_no_such_adapter_later(base: Path, tmp_path: Path) -> None:
    adapter = make(base, tmp_path / "a", "all")
    plain = make_adapter(base, tmp_path / "plain", target_modules=["q_proj"])
    assert not [each for each in adapter_ledger(adapter, None) if each.verdict == "refused"]
    edgelora.export(base, tmp_path / "bundle", report=False)
    with pytest.raises(EdgeLoraError, match="/a: layer_replication: repeated layers make another"):
        add_adapter(tmp_path / "bundle", "a", adapter)
    edgelora.export(base, tmp_path / "long", adapters={"a": adapter}, report=False)
    with pytest.raises(EdgeLoraError, match="/long: its base repeats layers"):
        add_adapter(tmp_path / "long", "plain", plain)
    with pytest.raises(EdgeLoraError, match="/a: layer_replication: a sum does not say"):
        edgelora.compose({adapter: 1.0}, tmp_path / "out")
    with pytest.raises(EdgeLoraError, match=r"/plain: layer_replication: not that of .*/a: each"):
        edgelora.export(base, tmp_path / "two", adapters={"a": adapter, "b": plain})


def test_layers_that_the_base_does_not_have_are_refused(base: Path, tmp_path: Path) -> None:
    adapter = make(base, tmp_path / "a", "one copy")
    change_config(adapter, layer_replication=[[0, 2], [1, 3]])
    with pytest.raises(EdgeLoraError, match=r"layer_replication \[1, 3\]: the base has 2 layers"):
        edgelora.export(base, tmp_path / "bundle", adapters={"a": adapter})
