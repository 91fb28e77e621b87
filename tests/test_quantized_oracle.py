"""With 4-bit weights, the runtime computes what a float model with the dequantized weights
computes.

The exact path is held to float32's own noise. The int8 path is held to a simulation: the same
float model with the input of every linear rounded to int8 in blocks of 32, and NF4's 16 values to
the bytes that the kernels look up. What the simulation loses is the derived tolerance; beside it,
the runtime may only round a value that lies within float noise of a half to the other side, which
moves one code by one.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import edgelora
import oracle
import tiny
from edgelora.checkpoint import open_checkpoint
from test_float_oracle import ARCHITECTURES, TOKENS, make_adapter, with_adapter

EXACT_SHARE = 1e-4
SIMULATION_SHARE = 0.5  # of the largest error that int8 rounding makes in the simulation itself
FORMATS: dict[str, dict[str, Any]] = {
    "int4_32": {"format": "int4", "block_size": 32},
    "int4_64": {"format": "int4", "block_size": 64},
    "int4_128": {"format": "int4", "block_size": 128},
    "int4_zero_points": {"format": "int4", "zero_points": True},
    "nf4": {"format": "nf4"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_llama(tmp_path_factory.mktemp("llama"))


def check(bundle: Path, plain: Any, adapter: Path | None) -> None:
    """Exact path and int8 path of the bundle (with its adapter "a") against the dequantized float
    model.
    """
    name = "a" if adapter else None
    exact = oracle.logits(dequantized(bundle, plain, adapter, oracle.NF4), TOKENS)
    with edgelora.load(bundle, threads=2, accuracy="float") as runtime:
        oracle.assert_close(runtime.logits(TOKENS, adapter=name), exact, EXACT_SHARE)
    model = dequantized(bundle, plain, adapter, oracle.BYTE_NF4)
    with oracle.int8_activations(model):
        simulated = oracle.logits(model, TOKENS)
    with edgelora.load(bundle, threads=2) as runtime:
        ours = runtime.logits(TOKENS, adapter=name)
    allowed = SIMULATION_SHARE * np.abs(simulated - exact).max()
    assert np.abs(ours - simulated).max() <= allowed


def dequantized(bundle: Path, plain: Any, adapter: Path | None, nf4: Any) -> torch.nn.Module:
    model = oracle.bundle_model(bundle, plain, nf4)
    return model if adapter is None else with_adapter(model, adapter)


@pytest.mark.parametrize("kind", FORMATS)
def test_logits_equal_the_dequantized_model(base: Path, kind: str, tmp_path: Path) -> None:
    edgelora.export(base, tmp_path / "bundle", **FORMATS[kind])
    check(tmp_path / "bundle", oracle.float_model(base), None)


@pytest.mark.parametrize("kind", FORMATS)
def test_adapter_on_quantized_base_equals_peft_on_dequantized(
    base: Path, kind: str, tmp_path: Path
) -> None:
    adapter = make_adapter(base, tmp_path / "a", target_modules="all-linear")
    edgelora.export(base, tmp_path / "bundle", adapters={"a": adapter}, **FORMATS[kind])
    check(tmp_path / "bundle", oracle.float_model(base), adapter)


@pytest.mark.parametrize("make", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_every_architecture_runs_in_int4(make: Callable[..., Path], tmp_path: Path) -> None:
    base = make(tmp_path / "base")
    edgelora.export(base, tmp_path / "bundle")
    check(tmp_path / "bundle", oracle.float_model(base), None)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_gguf_codes_are_carried_losslessly(kind: str, tmp_path: Path) -> None:
    """The bundle's weights equal the dequantized file's bit for bit."""
    source = tiny.tiny_llama(tmp_path / "source", hidden_size=64, intermediate_size=96)
    file = tiny.tiny_gguf(tmp_path / "base.gguf", kind, source=source)
    edgelora.export(file, tmp_path / "bundle")
    checkpoint = open_checkpoint(file)
    for target, weights in oracle.BundleWeights(tmp_path / "bundle").matrices():
        name = f"{target}.weight"
        if name in checkpoint.names():
            assert np.array_equal(weights, checkpoint.read(name)), name


def test_bitsandbytes_folder_is_carried_bit_for_bit(tmp_path: Path) -> None:
    base = tiny.tiny_bitsandbytes(tmp_path / "base")
    edgelora.export(base, tmp_path / "bundle")
    checkpoint = open_checkpoint(base)
    assert checkpoint.stored_as("model.layers.0.mlp.down_proj.weight") == "nf4"
    for target, weights in oracle.BundleWeights(tmp_path / "bundle").matrices():
        name = f"{target}.weight"
        if checkpoint.stored_as(name) == "nf4":
            assert np.array_equal(weights, checkpoint.read(name)), name


def test_bitsandbytes_logits_equal_transformers(tmp_path: Path) -> None:
    """Float path of an nf4 bundle, head and embedding included in the comparison by the bundle's
    own weights.
    """
    base = tiny.tiny_bitsandbytes(tmp_path / "base")
    edgelora.export(base, tmp_path / "bundle")
    theirs = oracle.float_model(base)
    own = dict(oracle.BundleWeights(tmp_path / "bundle").matrices())
    with torch.no_grad():
        theirs.get_input_embeddings().weight.copy_(torch.tensor(own["model.embed_tokens"]))
        theirs.get_output_embeddings().weight.copy_(torch.tensor(own["lm_head"]))
    with edgelora.load(tmp_path / "bundle", accuracy="float") as runtime:
        oracle.assert_close(runtime.logits(TOKENS), oracle.logits(theirs, TOKENS), EXACT_SHARE)
