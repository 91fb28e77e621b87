"""The plan: each decision follows from the base, the options and the device, and says why."""

from dataclasses import replace

import pytest

from edgelora.config import ModelConfig
from edgelora.device import load_profile
from edgelora.errors import EdgeLoraError
from edgelora.plan import ExportOptions, Plan, make_plan
from edgelora.plan.memory import (
    OVERHEAD_BYTES,
    bits_per_weight,
    kv_bytes_per_position,
    weight_bytes,
)

SMALL = ModelConfig(
    architecture="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=1e5,
    tie_word_embeddings=True,
)
LARGE = ModelConfig(
    architecture="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=5e5,
    tie_word_embeddings=False,
)


def plan(
    config: ModelConfig = SMALL, stored: dict[str, int] | None = None, **options: object
) -> Plan:
    made = ExportOptions(**options)  # type: ignore[arg-type]
    profile = load_profile(made.device) if made.device else None
    return make_plan(config, made, stored=stored or {}, profile=profile)


def test_defaults_are_int4_in_blocks_of_32_with_an_int8_head() -> None:
    made = plan()
    assert (made.format, made.block_size, made.embedding_format) == ("int4", 32, "int8")
    assert made.context_length == 8192


def test_every_decision_has_a_reason() -> None:
    made = plan(device="raspberry-pi-5", stored={"int4": 210})
    named = {
        "mode",
        "format",
        "block_size",
        "embedding_format",
        "carry",
        "context_length",
        "device",
    }
    assert set(made.reasons) == named
    assert all(made.reasons.values())


def test_nf4_base_stays_nf4_unless_something_else_is_asked_for() -> None:
    assert plan(stored={"nf4": 10}).format == "nf4"
    assert plan(stored={"nf4": 10}, format="int4").format == "int4"
    assert plan(stored={"nf4": 10}, block_size=32).format == "int4"


@pytest.mark.parametrize(
    ("options", "stored", "wanted", "kept"),
    [
        ({}, "int4", "int4", True),
        ({}, "int8", "int4", True),
        ({"format": "int4"}, "int8", "int4", False),
        ({"block_size": 64}, "int4", "int4", False),
        ({"block_size": 64}, "int8", "int8", True),
        ({"zero_points": True}, "int4", "int4", False),
        ({"format": "nf4"}, "nf4", "nf4", True),
        ({"format": "nf4"}, "int4", "nf4", False),
        ({"format": "float"}, "int8", "float", False),
        ({}, None, "int4", False),
    ],
)
def test_codes_are_carried_when_nothing_else_is_asked_for(
    options: dict[str, object],
    stored: str | None,
    wanted: str,
    kept: bool,  # noqa: FBT001
) -> None:
    counts = {stored: 1} if stored else {}
    assert plan(stored=counts, **options).carries(stored, wanted) is kept


def test_small_device_gets_the_context_that_fits() -> None:
    made = plan(device="raspberry-pi-zero-2w")
    used = weight_bytes(SMALL, "int4", made.block_size)
    used += made.context_length * SMALL.num_hidden_layers * 2 * 3 * 64 * 4
    assert used <= load_profile("raspberry-pi-zero-2w").usable_memory_bytes
    assert made.context_length % 256 == 0
    assert "raspberry-pi-zero-2w" in made.reasons["context_length"]


def test_base_too_large_for_the_device_is_refused() -> None:
    with pytest.raises(EdgeLoraError, match="raspberry-pi-zero-2w: room for 0 positions"):
        plan(LARGE, device="raspberry-pi-zero-2w")


@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_scarce_memory_gets_larger_blocks(block_size: int) -> None:
    """The smallest blocks that leave room for 2048 positions."""
    needed = weight_bytes(LARGE, "int4", block_size) + OVERHEAD_BYTES
    needed += 2048 * kv_bytes_per_position(LARGE)
    roomy = replace(load_profile("pixel-8"), memory_bytes=2**34, usable_memory_bytes=needed)
    made = make_plan(LARGE, ExportOptions(device="pixel-8"), stored={}, profile=roomy)
    assert (made.block_size, made.context_length) == (block_size, 2048)


@pytest.mark.parametrize(
    ("arguments", "bits"),
    [(("int4", 32), 4.5), (("int4", 64), 4.25), (("int8", 32), 8.5), (("float", 0), 32.0)],
)
def test_bits_per_weight(arguments: tuple[str, int], bits: float) -> None:
    assert bits_per_weight(*arguments) == bits
    assert bits_per_weight("nf4", 64) == pytest.approx(4.127, abs=5e-4)
