"""The plan: each decision follows from the base, the options and the device, and says why."""

from dataclasses import fields, replace
from typing import Any

import pytest

from edgelora.config import ModelConfig
from edgelora.device import load_profile
from edgelora.errors import EdgeLoraError
from edgelora.layout import EMBEDDING, targets
from edgelora.plan import ExportOptions, Inventory, Plan, make_plan
from edgelora.plan.memory import plan_sizes

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
LINEARS = [target for target in targets(SMALL) if target != "lm_head"]
LINEAR = "model.layers.0.mlp.up_proj"
ADAPTER = {"a": {target: 16 for target in LINEARS if ".q_proj" in target}}


def held(kind: str | None, outer: str | None = None, **more: Any) -> Inventory:
    """SMALL with all linears in codes of one kind, and the embedding in codes of another."""
    stored = dict.fromkeys(LINEARS, kind) if kind else {}
    return Inventory(stored | ({EMBEDDING: outer} if outer else {}), **more)  # type: ignore[arg-type]


def plan(config: ModelConfig = SMALL, base: Inventory | None = None, **options: Any) -> Plan:
    made = ExportOptions(**options)
    profile = load_profile(made.device) if made.device else None
    read = "32 windows" if made.calibration else None
    return make_plan(config, made, base, profile=profile, calibration=read)


def test_defaults_are_int4_in_blocks_of_32_with_an_int8_head() -> None:
    made = plan()
    assert (made.format, made.block_size, made.embedding_format) == ("int4", 32, "int8")
    assert (made.quality, made.calibration, made.head_format) == ("fast", None, "int8")
    assert made.context_length == 8192


BALANCED: dict[str, Any] = {"quality": "balanced", "calibration": "text.txt"}
BASES = [
    Inventory(adapters=ADAPTER),
    held("int4", "int4", offsets=frozenset(LINEARS), adapters=ADAPTER),
    held("int8", "int8", adapters=ADAPTER),
    held("nf4", adapters=ADAPTER),
    held("fp4", adapters=ADAPTER),
    held(None, foreign={"blocks of 128": 210}, adapters=ADAPTER),
]


@pytest.mark.parametrize("base", BASES, ids=["float", "Q4_1", "Q8_0", "nf4", "fp4", "foreign"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "merge"},
        {"device": "raspberry-pi-5"},
        {"device": "raspberry-pi-zero-2w", "context_length": 512},
        {"flavor": "ort"},
        {"format": "float"},
        {"format": "nf4"},
        {"format": "int4", "block_size": 64, "zero_points": True},
        {"embedding_format": "int4"},
        {"head_format": "int4"},
        BALANCED | {"head_format": "int4", "format": "int4", "block_size": 64},
    ],
    ids=str,
)
def test_every_decision_has_a_reason(options: dict[str, Any], base: Inventory) -> None:
    made = plan(base=base, **options)
    assert set(made.reasons) == {field.name for field in fields(Plan)} - {"reasons"}
    assert all(made.reasons.values())


@pytest.mark.parametrize(
    ("options", "tied", "embedding", "head"),
    [
        ({}, True, "int8", "int8"),
        ({"head_format": "int4"}, True, "int8", "int4"),
        ({"embedding_format": "int4"}, False, "int4", "int4"),
        (BALANCED, True, "int4", "int4"),
        (BALANCED, False, "int8", "int4"),
        (BALANCED | {"flavor": "ort"}, True, "int8", "int4"),
        (BALANCED | {"embedding_format": "int8"}, True, "int8", "int8"),
        (BALANCED | {"embedding_format": "int8", "head_format": "int4"}, True, "int8", "int4"),
        (BALANCED | {"head_format": "int8"}, True, "int8", "int8"),
        (BALANCED | {"device": "raspberry-pi-5"}, True, "int4", "int4"),
    ],
)
def test_formats_of_embedding_and_head(
    options: dict[str, Any],
    tied: bool,  # noqa: FBT001
    embedding: str,
    head: str,
) -> None:
    made = plan(replace(SMALL, tie_word_embeddings=tied), **options)
    assert (made.embedding_format, made.head_format) == (embedding, head)
    assert all(made.reasons.values())


def test_merged_head_leaves_the_embedding_in_int8() -> None:
    base = Inventory(adapters={"a": {"lm_head": 16}})
    made = plan(base=base, mode="merge", **BALANCED)
    assert (made.embedding_format, made.head_format) == ("int8", "int4")
    assert "lookup's error" in made.reasons["embedding_format"]


def test_bytes_count_a_head_of_its_own() -> None:
    rows, columns = SMALL.vocab_size, SMALL.hidden_size
    four, eight = (rows * columns * bits // 8 + rows * columns // 32 * 2 for bits in (4, 8))
    sizes = [
        plan_sizes(SMALL, plan(**options), Inventory())
        for options in ({}, {"head_format": "int4"}, {"embedding_format": "int4"})
    ]
    linears = sizes[0].weights - eight
    assert [size.weights - linears for size in sizes] == [eight, eight + four, four]
    assert [size.streamed - linears for size in sizes] == [eight, four, four]


def test_balanced_says_how_many_matrices_it_works_on() -> None:
    assert "in 211 matrices" in plan(**BALANCED).reasons["quality"]
    some = plan(base=held("int4", "int8"), **BALANCED, head_format="int4")
    assert "in 1 matrices" in some.reasons["quality"]
    alone = plan(**BALANCED, embedding_format="int4", flavor="edgelora")
    assert "rounded plainly" not in alone.reasons["quality"]
    untied = plan(replace(SMALL, tie_word_embeddings=False), **BALANCED, embedding_format="int4")
    assert "in 211 matrices" in untied.reasons["quality"]
    assert "the embedding is rounded plainly" in untied.reasons["quality"]
    said = plan(**BALANCED).reasons["quality"]  # 4.5 bits for each of 134 479 872 weights
    assert "; 75.6 MB of weights, 75.6 MB read a token" in said


@pytest.mark.parametrize("base", [held("int4", "int8"), held("nf4"), held("int8", "int8")])
def test_balanced_is_refused_where_nothing_is_rounded_to_int4(base: Inventory) -> None:
    options = {"embedding_format": "int8"} if base.stored.get(LINEAR) == "nf4" else {}
    with pytest.raises(EdgeLoraError, match="quality balanced: nothing would be rounded to int4"):
        plan(base=base, **BALANCED, **options)


def test_nf4_base_stays_nf4_unless_something_else_is_asked_for() -> None:
    assert plan(base=held("nf4")).format == "nf4"
    assert plan(base=held("nf4"), format="int4").format == "int4"
    made = plan(base=held("nf4"), block_size=32)
    assert (made.format, made.block_size) == ("int4", 32)
    assert "are dequantized (210 NF4): blocks of 32" in made.reasons["format"]
    assert "210 in nf4) are dequantized: blocks of 32 were asked for" in made.reasons["carry"]


def test_nf4_base_becomes_int4_in_flavor_ort() -> None:
    made = plan(base=held("nf4"), flavor="ort")
    assert made.format == "int4"
    assert "have no nf4" in made.reasons["format"] and "have no nf4" in made.reasons["carry"]


def test_nf4_needs_input_features_in_multiples_of_32() -> None:
    odd = replace(SMALL, hidden_size=72, head_dim=8)
    with pytest.raises(EdgeLoraError, match=r"format nf4: .*q_proj has 72 input features"):
        plan(odd, format="nf4")
    made = plan(odd, held("nf4"))
    assert made.format == "int4" and "72 input features" in made.reasons["format"]


def test_fp4_base_stays_fp4_and_all_else_becomes_nf4() -> None:
    made = plan(base=held("fp4"))
    assert (made.format, made.block_size, made.wanted(LINEAR)) == ("fp4", 64, "nf4")
    assert "already: 210 FP4" in made.reasons["format"]
    merged = plan(base=held("fp4", adapters={"a": {LINEAR: 8}}), mode="merge")
    assert merged.format == "nf4" and "1 that the adapter changes" in merged.reasons["carry"]
    assert plan(base=held("fp4"), format="nf4").format == "nf4"  # rounded anew, as asked for
    assert "dequantized (210 FP4)" in plan(base=held("fp4"), flavor="ort").reasons["format"]


def test_4_bit_matrices_that_nf4_cannot_hold_are_named() -> None:
    made = plan(base=held(None, foreign={"absmax groups of 64": 3, "blocks of 128": 4}))
    assert made.format == "int4"
    assert (
        "cannot hold them: 3 in absmax groups of 64, 4 in blocks of 128" in made.reasons["format"]
    )


@pytest.mark.parametrize(
    ("options", "stored", "kept"),
    [
        ({}, "int4", True),
        ({}, "int8", True),
        ({"format": "int4"}, "int4", True),
        ({"format": "int4"}, "int8", False),
        ({"block_size": 64}, "int4", False),
        ({"zero_points": True}, "int4", False),
        ({"format": "nf4"}, "nf4", True),
        ({"format": "nf4"}, "int4", False),
        ({"format": "float"}, "int8", False),
        ({"embedding_format": "int4"}, "int8", True),
        ({}, None, False),
    ],
)
def test_codes_of_linears_are_carried_when_nothing_else_is_asked_for(
    options: dict[str, Any],
    stored: str | None,
    kept: bool,  # noqa: FBT001
) -> None:
    assert plan(base=held(stored), **options).carries(stored, LINEAR) is kept


@pytest.mark.parametrize(
    ("options", "stored", "kept", "written"),
    [
        ({}, "int8", True, "int8"),
        ({}, "int4", True, "int4"),
        ({"embedding_format": "int4"}, "int8", False, "int4"),
        ({"embedding_format": "int8"}, "int4", False, "int8"),
        ({"embedding_format": "int4"}, "int4", True, "int4"),
        ({"format": "int4"}, "int8", True, "int8"),
        ({"block_size": 64}, "int8", True, "int8"),
        ({"block_size": 64}, "int4", False, "int8"),
        ({"format": "float"}, "int8", False, "float"),
        ({"flavor": "ort"}, "int4", False, "int8"),
    ],
)
def test_embedding_format_goes_before_carrying(
    options: dict[str, Any],
    stored: str,
    kept: bool,  # noqa: FBT001
    written: str,
) -> None:
    made = plan(base=held(None, stored), **options)
    assert made.carries(stored, EMBEDDING) is kept
    assert made.embedding_format == written
    assert ("kept" in made.reasons["carry_embedding"]) is kept


def test_plan_names_the_format_in_which_all_linears_are_carried() -> None:
    made = plan(base=held("int8"))
    assert made.format == "int8" and "all linears" in made.reasons["format"]
    some = Inventory({LINEAR: "int8"})
    assert plan(base=some).format == "int4" and "1 in int8" in plan(base=some).reasons["carry"]


def test_merged_targets_are_not_carried() -> None:
    made = plan(base=held("int4", adapters=ADAPTER), mode="merge")
    assert "kept, not rounded anew (180 in int4)" in made.reasons["carry"]
    assert "30 that the adapter changes (30 in int4)" in made.reasons["carry"]


def test_mode_says_whether_there_are_adapters() -> None:
    assert "switched" in plan(base=Inventory(adapters=ADAPTER)).reasons["mode"]
    assert "no adapter is given; they can be added later" in plan().reasons["mode"]
    assert "at export only" in plan(flavor="ort").reasons["mode"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "float", "block_size": 32}, "block size 32: format float has no blocks"),
        ({"format": "float", "embedding_format": "int4"}, "embedding format int4: with format"),
        ({"format": "float", "zero_points": True}, "zero points with format float"),
        ({"format": "nf4", "block_size": 32}, "nf4 has blocks of 64"),
        ({"format": "nf4", "flavor": "ort"}, "no nf4 with double quantization"),
        ({"format": "float", "head_format": "int4"}, "head format int4: with format float"),
        ({"head_format": "int2"}, "head format 'int2': one of int8, int4"),
        ({"quality": "superb"}, "quality 'superb': one of fast, balanced, best"),
        ({"quality": "balanced"}, "quality balanced: needs --calibration FILE, a plain text"),
        ({"calibration": "t.txt"}, "t.txt: quality fast reads no calibration text"),
        (BALANCED | {"format": "nf4"}, "quality balanced with format nf4: int4 only"),
    ],
)
def test_contradicting_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(EdgeLoraError, match=words):
        ExportOptions(**options)


def test_context_longer_than_the_base_is_refused() -> None:
    with pytest.raises(EdgeLoraError, match="made for at most 8192"):
        plan(context_length=8193)
