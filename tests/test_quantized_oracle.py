"""With 4-bit weights, the runtime computes what a float model with the dequantized weights
computes.

The exact path is held to float32's own noise. The int8 path is held to a simulation: the same
float model with the input of every linear rounded to int8 in blocks of 32, and NF4's 16 values to
the bytes that the kernels look up. What the simulation loses is the derived tolerance; beside it,
the runtime may only round a value that lies within float noise of a half to the other side, which
moves one code by one.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import bitsandbytes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

import edgelora
import oracle
import tiny
from conftest import has_amx
from edgelora.checkpoint import open_checkpoint
from test_float_oracle import ARCHITECTURES, TOKENS, make_adapter, with_adapter

pytestmark = pytest.mark.usefixtures("integer_kernels")

EXACT_SHARE = 1e-4
SIMULATION_SHARE = 0.5  # of the error that int8 rounding makes in the simulation itself
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
    model = dequantized(bundle, plain, adapter, "values")
    keep_row_factors(model, plain, adapter)
    exact = oracle.logits(model, TOKENS)
    with edgelora.load(bundle, threads=2, accuracy="float") as runtime:
        oracle.assert_close(runtime.logits(TOKENS, adapter=name), exact, EXACT_SHARE)
    with edgelora.load(bundle, threads=2) as runtime:
        ours = runtime.logits(TOKENS, adapter=name)
        look: oracle.Look = "levels" if runtime.info.isa == "avx2" else "bytes"
    model = dequantized(bundle, plain, adapter, look)
    with oracle.int8_activations(model):
        keep_row_factors(model, plain, adapter)
        simulated = oracle.logits(model, TOKENS)
    assert size_of(ours - simulated) <= SIMULATION_SHARE * size_of(simulated - exact)
    assert np.abs(ours - simulated).max() <= np.abs(simulated - exact).max()


def size_of(differences: NDArray[np.float32]) -> float:
    """Root mean square: where a hair became a step, single logits differ as if rounded anew."""
    return float(np.sqrt(np.square(differences, dtype=np.float64).mean()))


def dequantized(
    bundle: Path, plain: Any, adapter: Path | None, look: oracle.Look
) -> torch.nn.Module:
    model = oracle.bundle_model(bundle, plain, look)
    return model if adapter is None else with_adapter(model, adapter)


def row_norms(module: Any) -> torch.Tensor:
    """Of W0 + delta, by PEFT."""
    with torch.no_grad():
        weight = module.get_base_layer().weight + module.get_delta_weight("default")
        return torch.linalg.norm(weight, dim=1)


def magnitudes(model: torch.nn.Module) -> dict[str, Any]:
    """Module path → the module, of those with a DoRA magnitude."""
    return {
        name: module
        for name, module in model.named_modules()
        if len(getattr(module, "lora_magnitude_vector", []))
    }


def keep_row_factors(rounded: torch.nn.Module, plain: Any, adapter: Path | None) -> None:
    """DoRA divides by the norms of the base that it was trained on, not of the rounded one."""
    if not magnitudes(rounded):
        return
    trained = with_adapter(copy.deepcopy(plain), adapter)
    norms = {name: row_norms(module) for name, module in magnitudes(trained).items()}
    for name, module in magnitudes(rounded).items():
        module.lora_magnitude_vector["default"].weight.data *= row_norms(module) / norms[name]


def make_dora(base: Path, folder: Path) -> Path:
    """Row factors are powers of two, so that float16 holds B times them."""
    make_adapter(base, folder, target_modules="all-linear", use_dora=True)
    model = with_adapter(oracle.float_model(base), folder)
    for module in magnitudes(model).values():
        norms = row_norms(module)
        factors = torch.tensor([0.5, 1.0, 2.0, -1.0]).repeat(len(norms) // 4 + 1)[: len(norms)]
        module.lora_magnitude_vector["default"].weight.data = factors * norms
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


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


def test_small_factors_lose_no_more_than_others(base: Path, tmp_path: Path) -> None:
    """Multiples of 2^-22 are float16 numbers; but a 127th of them, as a scale of int8 codes, is
    below the smallest.
    """
    adapter = make_adapter(base, tmp_path / "a", target_modules="all-linear")
    tensors = load_file(adapter / "adapter_model.safetensors")
    small = {name: (64 * values).round() * 2.0**-22 for name, values in tensors.items()}
    save_file(small, adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["lora_alpha"] *= 2.0**32
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    edgelora.export(base, tmp_path / "bundle", adapters={"a": adapter})
    check(tmp_path / "bundle", oracle.float_model(base), adapter)


@pytest.mark.parametrize("kind", FORMATS)
def test_dora_on_quantized_base_keeps_the_rows_lengths(
    base: Path, kind: str, tmp_path: Path
) -> None:
    adapter = make_dora(base, tmp_path / "a")
    edgelora.export(base, tmp_path / "bundle", adapters={"a": adapter}, **FORMATS[kind])
    check(tmp_path / "bundle", oracle.float_model(base), adapter)


@pytest.mark.parametrize("kind", FORMATS)
def test_biases_on_quantized_base_equal_peft_s(kind: str, tmp_path: Path) -> None:
    """Of lora_B, of the base's own linears, and of linears without factors."""
    base = tiny.tiny_qwen2(tmp_path / "base")
    settings = {"target_modules": ["q_proj", "gate_proj", "lm_head"], "lora_bias": True}
    adapter = make_adapter(base, tmp_path / "a", bias="all", **settings)
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


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_folder_is_carried_bit_for_bit(
    kind: str, tmp_path: Path, *, double_quant: bool
) -> None:
    base = tiny.tiny_bitsandbytes(tmp_path / "base", quant_type=kind, double_quant=double_quant)
    assert edgelora.export(base, tmp_path / "bundle").plan.format == kind
    checkpoint = open_checkpoint(base)
    assert checkpoint.stored_as("model.layers.0.mlp.down_proj.weight") == kind
    for target, weights in oracle.BundleWeights(tmp_path / "bundle").matrices():
        name = f"{target}.weight"
        if checkpoint.stored_as(name) == kind:
            assert np.array_equal(weights, checkpoint.read(name)), name


def test_bitsandbytes_logits_equal_transformers(tmp_path: Path) -> None:
    """Float path of an nf4 bundle, head and embedding included in the comparison by the bundle's
    own weights.
    """
    base = tiny.tiny_bitsandbytes(tmp_path / "base")
    edgelora.export(base, tmp_path / "bundle")
    theirs = with_outer_weights(oracle.float_model(base), tmp_path / "bundle")
    with edgelora.load(tmp_path / "bundle", accuracy="float") as runtime:
        oracle.assert_close(runtime.logits(TOKENS), oracle.logits(theirs, TOKENS), EXACT_SHARE)


@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 96}], ids=["whole", "across rows"])
@pytest.mark.parametrize(
    "kind",
    [
        {"double_quant": False},
        {"double_quant": False, "quant_type": "fp4"},
        {"quant_type": "fp4"},
    ],
    ids=["plain nf4", "plain fp4", "fp4"],
)
def test_carried_codes_equal_the_simulation(
    kind: dict[str, Any], sizes: dict[str, int], tmp_path: Path
) -> None:
    """Both paths; nested fp4 without an adapter, whose int8 factors turn a hair into a step."""
    path = tmp_path / "base"
    base = tiny.tiny_bitsandbytes(path, **kind, **sizes)
    source = path.with_name("base-source")
    adapter = make_adapter(source, tmp_path / "a", target_modules="all-linear")
    edgelora.export(base, tmp_path / "bundle", adapters={"a": adapter})
    plain = "double_quant" in kind
    check(tmp_path / "bundle", oracle.float_model(source), adapter if plain else None)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_16_bit_bitsandbytes_logits_equal_transformers(
    kind: str, dtype: str, tmp_path: Path, *, double_quant: bool
) -> None:
    """bitsandbytes rounds each weight to the quant_state's dtype, and so does the bundle."""
    settings = {"quant_type": kind, "dtype": dtype, "double_quant": double_quant}
    base = tiny.tiny_bitsandbytes(tmp_path / "base", **settings)  # type: ignore[arg-type]
    adapter = make_adapter(tmp_path / "base-source", tmp_path / "a", target_modules="all-linear")
    report = edgelora.export(base, tmp_path / "bundle", adapters={"a": adapter})
    assert report.plan.format == kind
    checkpoint = open_checkpoint(base)
    for target, weights in oracle.BundleWeights(tmp_path / "bundle").matrices():
        if checkpoint.stored_as(name := f"{target}.weight") == kind:
            assert np.array_equal(weights, checkpoint.read(name)), name
    theirs = with_outer_weights(oracle.float_model(base), tmp_path / "bundle")
    for module in theirs.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            oracle.use_dequantized(module, getattr(torch, dtype))
    with edgelora.load(tmp_path / "bundle", accuracy="float") as runtime:
        ours = {name: runtime.logits(TOKENS, adapter=name) for name in (None, "a")}
    oracle.assert_close(ours[None], oracle.logits(theirs, TOKENS), EXACT_SHARE)
    adapted = oracle.logits(with_adapter(theirs, adapter), TOKENS)
    oracle.assert_close(ours["a"], adapted, EXACT_SHARE)


def with_outer_weights(model: Any, bundle: Path) -> Any:
    """The model with the bundle's embedding and head."""
    own = dict(oracle.BundleWeights(bundle).matrices())
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.tensor(own["model.embed_tokens"]))
        model.get_output_embeddings().weight.copy_(torch.tensor(own["lm_head"]))
    return model


@pytest.mark.skipif(not has_amx(), reason="no AMX here")
@pytest.mark.parametrize("kind", FORMATS)
def test_bfloat16_tiles_lose_no_more_than_int8(
    kind: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both round x to int8 blocks; what bfloat16 rounds beside that may not show."""
    edgelora.export(base, tmp_path / "bundle", **FORMATS[kind])

    def logits(isa: str, accuracy: Literal["float", "int8"]) -> np.ndarray:
        monkeypatch.setenv("EDGELORA_FORCE_ISA", isa)
        with edgelora.load(tmp_path / "bundle", threads=2, accuracy=accuracy) as runtime:
            return runtime.logits(TOKENS)

    exact = logits("amx_bf16", "float")
    lost = {isa: np.abs(logits(isa, "int8") - exact).mean() for isa in ("amx_bf16", "avx512_vnni")}
    assert 0 < lost["amx_bf16"] <= 1.3 * lost["avx512_vnni"]
