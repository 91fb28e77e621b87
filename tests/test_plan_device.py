"""What a device changes in a plan, in which order, and that the sizes behind it are the real
ones.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import edgelora
import tiny
from edgelora.checkpoint import open_checkpoint
from edgelora.config import ModelConfig
from edgelora.device import load_profile
from edgelora.errors import EdgeLoraError
from edgelora.inventory import take_inventory
from edgelora.layout import EMBEDDING
from edgelora.plan import ExportOptions, Inventory, Plan, make_plan
from edgelora.plan.memory import (
    OVERHEAD_BYTES,
    Sizes,
    kv_bytes_per_position,
    plan_sizes,
)
from edgelora.request import prepare
from test_float_oracle import make_adapter
from test_plan import ADAPTER, LARGE, LINEARS, SMALL, held, plan

SIZE_TOLERANCE = 0.02
NOTHING = Inventory()


def on(usable: int, config: ModelConfig, base: Inventory, **options: Any) -> Plan:
    """The plan for a Pixel 8 of which `usable` bytes are left."""
    profile = replace(load_profile("pixel-8"), memory_bytes=2**34, usable_memory_bytes=usable)
    return make_plan(config, ExportOptions(device="pixel-8", **options), base, profile=profile)


def needed(config: ModelConfig, made: Plan, base: Inventory, positions: int, **ch: Any) -> int:
    """Bytes for that many positions under the plan, changed as said."""
    changed = replace(made, **ch)
    held = plan_sizes(config, changed, base).held
    return held + OVERHEAD_BYTES + positions * kv_bytes_per_position(config, changed)


def test_small_device_gets_the_context_that_fits() -> None:
    usable = needed(SMALL, plan(block_size=128), NOTHING, 1200)
    made = on(usable, SMALL, NOTHING, block_size=128)
    assert made.context_length == 1024  # of 1200 positions, in steps of 256
    assert "pixel-8" in made.reasons["context_length"]


def test_base_too_large_for_the_device_is_refused() -> None:
    with pytest.raises(EdgeLoraError, match="raspberry-pi-zero-2w: room for 0 positions"):
        plan(LARGE, device="raspberry-pi-zero-2w")


@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_scarce_memory_gets_larger_blocks(block_size: int) -> None:
    """The smallest blocks that leave room for 2048 positions."""
    usable = needed(LARGE, plan(LARGE), NOTHING, 2048, block_size=block_size)
    made = on(usable, LARGE, NOTHING)
    assert (made.block_size, made.context_length) == (block_size, 2048)


def test_codes_are_carried_as_long_as_they_fit() -> None:
    base = held("int4", offsets=frozenset(LINEARS))
    enough = needed(SMALL, plan(base=base), base, 256)
    made = on(enough, SMALL, base)
    assert (made.carry, made.block_size, made.context_length) == ("any", 32, 256)
    made = on(enough - 1, SMALL, base)
    assert (made.carry, made.block_size) == ("none", 128)
    assert "dequantized: pixel-8 has no room for them" in made.reasons["carry"]
    assert "largest blocks" in made.reasons["block_size"]


def test_int8_codes_that_do_not_fit_become_int4_in_the_smallest_blocks_that_do() -> None:
    base = held("int8", "int8")
    usable = needed(SMALL, plan(), NOTHING, 2048)
    assert usable < needed(SMALL, plan(base=base), base, 2048)
    made = on(usable, SMALL, base, context_length=2048)
    assert (made.format, made.block_size, made.embedding_format) == ("int4", 32, "int8")
    assert "210 in int8) are dequantized: pixel-8" in made.reasons["carry"]


def test_embedding_gets_4_bits_before_the_model_is_refused() -> None:
    usable = needed(SMALL, plan(), NOTHING, 256, block_size=128)
    assert on(usable, SMALL, NOTHING).embedding_format == "int8"
    made = on(usable - 1, SMALL, NOTHING)
    assert (made.embedding_format, made.block_size) == ("int4", 128)
    assert "mean KL from 0.29 to 0.38" in made.reasons["embedding_format"]
    least = needed(SMALL, made, NOTHING, 256)
    assert on(least, SMALL, NOTHING).context_length == 256
    with pytest.raises(EdgeLoraError, match="room for 255 positions"):
        on(least - 1, SMALL, NOTHING)
    with pytest.raises(EdgeLoraError, match="room for"):
        on(usable - 1, SMALL, NOTHING, embedding_format="int8")


def test_nf4_has_no_larger_blocks_but_the_embedding_shrinks() -> None:
    base = held("nf4", "int8")
    usable = needed(SMALL, plan(base=base), base, 256) - 1
    made = on(usable, SMALL, base)
    assert (made.format, made.block_size, made.embedding_format) == ("nf4", 64, "int4")
    assert "no room for more than 4 bits" in made.reasons["carry_embedding"]


def test_adapters_take_memory_but_not_when_merged() -> None:
    base = Inventory(adapters=ADAPTER)
    apart, merged = plan(base=base), plan(base=base, mode="merge")
    assert plan_sizes(SMALL, apart, base).adapters == 30 * 16 * (576 + 576) * 2
    assert plan_sizes(SMALL, merged, base).adapters == 0


def test_streamed_bytes_are_those_of_linears_and_head() -> None:
    """A tied head is read whole although it is the embedding; an untied embedding is not read."""
    tied = plan_sizes(SMALL, plan(), NOTHING)
    untied_config = replace(SMALL, tie_word_embeddings=False)
    untied = plan_sizes(untied_config, plan(untied_config), NOTHING)
    assert tied.streamed == tied.weights == untied.streamed
    assert untied.weights - untied.streamed == 49152 * (576 + 18 * 2)
    profile = load_profile("pixel-8")
    rate = profile.bandwidth_bytes_per_second.sustained / untied.streamed
    made = plan(untied_config, device="pixel-8")
    assert f"at most {rate:.0f} tokens/s" in made.reasons["device"]


def test_bandwidth_counts_the_largest_adapter() -> None:
    base = Inventory(adapters=ADAPTER)
    made = plan(base=base, device="pixel-8")
    sizes: Sizes = plan_sizes(SMALL, made, base)
    profile = load_profile("pixel-8")
    rate = profile.bandwidth_bytes_per_second.sustained / (sizes.streamed + sizes.largest_adapter)
    assert f"at most {rate:.0f} tokens/s with the largest adapter" in made.reasons["device"]


def test_isa_is_named_where_the_format_is_the_default() -> None:
    assert "on neon too" in plan(device="raspberry-pi-zero-2w").reasons["format"]


def written_bytes(bundle: Path) -> int:
    """The weight file without norms, biases, rotary tables and what lies between tensors."""
    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    parts: dict[int, int] = {}
    for tensor in graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        role = tensor.name.rpartition(".")[2]
        if where and role in ("codes", "scales", "zero_points", "absmax_offset", "absmax_table"):
            parts[int(where["offset"])] = int(where["length"])
    return sum(parts.values())


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Odd sizes too: panels and blocks that are not full."""
    folder = tmp_path_factory.mktemp("bases")
    wide = {"hidden_size": 96, "intermediate_size": 200, "vocab_size": 390}
    source = tiny.tiny_llama(folder / "llama", hidden_size=64, intermediate_size=96)
    return {
        "llama": source,
        "wide": tiny.tiny_llama(folder / "wide", **wide),
        "tied": tiny.tiny_llama(folder / "tied", tie_word_embeddings=True),
        "Q4_0": tiny.tiny_gguf(folder / "q40.gguf", "Q4_0", source=source),
        "Q4_1": tiny.tiny_gguf(folder / "q41.gguf", "Q4_1", source=source),
        "Q8_0": tiny.tiny_gguf(folder / "q80.gguf", "Q8_0", source=source),
        "mixed": tiny.tiny_gguf(
            folder / "mixed.gguf", {"blk.0.attn_k.weight": "Q8_0", "": "Q4_1"}, source=source
        ),
        "nf4": tiny.tiny_bitsandbytes(folder / "nf4"),
        "fp4": tiny.tiny_bitsandbytes(folder / "fp4", quant_type="fp4"),
        "plain nf4": tiny.tiny_bitsandbytes(folder / "plain", double_quant=False),
    }


SIZED: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"block_size": 128}),
    ("llama", {"zero_points": True}),
    ("llama", {"embedding_format": "int4", "block_size": 64}),
    ("llama", {"format": "float"}),
    ("llama", {"format": "nf4"}),
    ("llama", {"flavor": "ort"}),
    ("llama", {"flavor": "ort", "zero_points": True}),
    ("llama", {"flavor": "ort", "format": "float"}),
    ("wide", {}),
    ("wide", {"block_size": 64}),
    ("wide", {"flavor": "ort", "block_size": 64}),
    ("tied", {}),
    ("Q4_0", {}),
    ("Q4_1", {}),
    ("Q4_1", {"flavor": "ort"}),
    ("Q8_0", {}),
    ("Q8_0", {"embedding_format": "int4"}),
    ("Q8_0", {"flavor": "ort"}),
    ("mixed", {}),
    ("nf4", {}),
    ("plain nf4", {}),
    ("fp4", {}),
    ("nf4", {"flavor": "ort"}),
]


@pytest.mark.parametrize(("kind", "options"), SIZED, ids=str)
def test_predicted_weight_bytes_are_the_real_ones(
    kind: str, options: dict[str, Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    report = edgelora.export(bases[kind], tmp_path / "bundle", **options)
    checkpoint = open_checkpoint(bases[kind])
    sizes = plan_sizes(checkpoint.config, report.plan, take_inventory(checkpoint, {}))
    real = written_bytes(tmp_path / "bundle")
    assert abs(sizes.weights - real) <= SIZE_TOLERANCE * real


@pytest.mark.parametrize(
    "options", [{}, {"format": "nf4"}, {"format": "float"}, {"flavor": "ort"}], ids=str
)
def test_predicted_kv_cache_is_what_the_runtime_keeps(
    options: dict[str, Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    report = edgelora.export(bases["llama"], tmp_path / "bundle", **options)
    predicted = kv_bytes_per_position(open_checkpoint(bases["llama"]).config, report.plan)
    with edgelora.load(tmp_path / "bundle") as model:
        assert model.info.kv_cache_bytes == predicted


@pytest.mark.parametrize(
    ("head_dim", "options", "row"),
    [
        (64, {}, 64 + 2 * 2 + 64 + 4),  # int8 codes, a float16 for 32 of a key, a float32 a value
        (80, {}, 96 + 3 * 2 + 80 + 4),
        (72, {"format": "nf4"}, 96 + 3 * 2 + 80 + 4),
        (72, {"format": "float"}, 4 * 72 + 4 * 80),
        (72, {"flavor": "ort"}, 4 * 72 + 4 * 72),
    ],
)
def test_kv_cache_counts_codes_and_scales(head_dim: int, options: dict[str, Any], row: int) -> None:
    config = replace(SMALL, head_dim=head_dim)
    predicted = kv_bytes_per_position(config, replace(plan(), **options))
    assert predicted == config.num_hidden_layers * config.num_key_value_heads * row


@pytest.mark.parametrize(
    ("flavor", "more"),
    [
        ("edgelora", {}),
        ("edgelora", {"r": 32, "use_dora": True}),
        ("edgelora", {"r": 32, "lora_bias": True}),
        ("edgelora", {"r": 32, "target_modules": ["o_proj"], "bias": "all"}),
        ("edgelora", {"feedforward_modules": ["down_proj"]}),
        ("edgelora", {"init_r": 8, "total_step": 10}),
        ("ort", {}),
    ],
)
def test_predicted_adapter_bytes_are_the_real_ones(
    flavor: str, more: dict[str, Any], tmp_path: Path
) -> None:
    """A header is what the file has beside the factors."""
    base = tiny.tiny_qwen2(tmp_path / "base")
    settings = {"target_modules": "all-linear"} | (more or {"r": 32})
    adapter = make_adapter(base, tmp_path / "a", **settings)
    edgelora.export(base, tmp_path / "bundle", adapters={"a": adapter}, flavor=flavor)
    request = prepare(base, {"a": adapter}, ExportOptions(flavor=flavor))
    inventory = take_inventory(request.checkpoint, request.adapters)
    predicted = plan_sizes(request.checkpoint.config, request.plan, inventory).adapters
    (file,) = (tmp_path / "bundle/adapters/a").iterdir()
    beside = file.stat().st_size - predicted
    if flavor == "edgelora":
        assert beside == 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert 0 <= beside <= 16384


def test_embedding_format_is_what_the_bundle_holds(bases: dict[str, Path], tmp_path: Path) -> None:
    """What `--dry-run` prints is what is written, where the base's codes are int8 too."""
    options = {"embedding_format": "int4"}
    made = prepare(bases["Q8_0"], {}, ExportOptions(**options)).plan  # type: ignore[arg-type]
    edgelora.export(bases["Q8_0"], tmp_path / "bundle", **options)
    graph = onnx.load(tmp_path / "bundle/model.onnx", load_external_data=False).graph
    (node,) = [node for node in graph.node if node.op_type == "Embedding"]
    formats = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert made.embedding_format == formats["format"].decode() == "int4"
    assert not made.carries("int8", EMBEDDING)


def test_nf4_base_runs_in_flavor_ort(bases: dict[str, Path], tmp_path: Path) -> None:
    report = edgelora.export(bases["nf4"], tmp_path / "bundle", flavor="ort")
    assert report.plan.format == "int4"
    with edgelora.load(tmp_path / "bundle") as model:
        assert np.isfinite(model.logits([0, 1, 2])).all()
