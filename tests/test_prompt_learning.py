"""Prefix tuning, cartridges, prompt tuning and p-tuning: computed as PEFT does, refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import edgelora
import oracle
import tiny
from cases import case_id
from edgelora.adapter import SoftPrompt, adapter_ledger, read_adapter
from edgelora.adapter_file import read_adapter_file
from edgelora.adding import add_adapter
from edgelora.checkpoint import open_checkpoint
from edgelora.errors import EdgeLoraError
from edgelora.evaluating import evaluate_bundle
from edgelora.generation import Sampling
from edgelora.layout import targets
from edgelora.manifest import read_manifest
from edgelora.verify import verify
from prompts import KEYS, MAKERS, POSITIONS, make_prompt, peft_greedy, peft_logits
from test_adapter import CONFIG, WEIGHTS, change_config
from test_cli import fails, ok
from test_float_oracle import ARCHITECTURES, SHARE, TOKENS, make_adapter
from test_selfcheck import ALL_FORMATS, adapter_file, assert_passes, edit_adapter, refuse

TENSOR = "prompt_embeddings"
FILE = "adapters/a/adapter.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("adapters")
    return {kind: make_prompt(base, place / kind, kind) for kind in MAKERS}


@pytest.fixture(scope="module")
def exported(
    base: Path, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Of default options, with the prefix a, the soft prompt p and the LoRA adapter l."""
    lora = make_adapter(base, tmp_path_factory.mktemp("lora") / "l", target_modules="all-linear")
    out = tmp_path_factory.mktemp("exported") / "bundle"
    adapters = {"a": folders["prefix"], "p": folders["prompt"], "l": lora}
    edgelora.export(base, out, adapters=adapters)
    return out


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A prefix that a test may change."""
    return Path(shutil.copytree(folders["prefix"], tmp_path / "folder"))


# ---- what is computed ----


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", MAKERS)
def test_logits_and_tokens_equal_peft_s(architecture: str, kind: str, tmp_path: Path) -> None:
    base = ARCHITECTURES[architecture](tmp_path / "base")
    adapter = make_prompt(base, tmp_path / "a", kind)
    edgelora.export(base, tmp_path / "out", adapters={"a": adapter}, format="float", report=False)
    with edgelora.load(tmp_path / "out", threads=2) as model:
        ours, without = model.logits(TOKENS, adapter="a"), model.logits(TOKENS)
        with model.session(adapter="a") as session:
            session.prefill(TOKENS)
            ids = session.decode(12, ignore_eos=True)
    plain = oracle.float_model(base)
    theirs = peft_logits(plain, adapter, TOKENS)
    oracle.assert_close(ours, theirs, SHARE)
    assert ids == peft_greedy(oracle.float_model(base), adapter, TOKENS, 12)
    assert np.abs(ours - without).max() > 0.1 * np.abs(theirs).max()
    oracle.assert_close(without, oracle.logits(oracle.float_model(base), TOKENS), SHARE)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_flavor_ort_computes_the_same(
    base: Path, folders: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    lora = make_adapter(base, tmp_path / "l", target_modules=["q_proj"])
    adapters = {"a": folders[kind], "l": lora}
    edgelora.export(base, tmp_path / "out", adapters=adapters, format="float", flavor="ort")
    assert_passes(tmp_path / "out", "a", "l", flavor="ort")
    theirs = peft_logits(oracle.float_model(base), folders[kind], TOKENS)
    with edgelora.load(tmp_path / "out") as model, model.session(adapter="a") as session:
        oracle.assert_close(model.logits(TOKENS, adapter="a"), theirs, SHARE)
        model.load_adapter("outside", tmp_path / "out" / FILE)
        oracle.assert_close(model.logits(TOKENS, adapter="outside"), theirs, SHARE)
        for name in ("l", "a", None, "a"):
            session.adapter = name
            session.prefill(TOKENS[:3])
        seen = peft_logits(oracle.float_model(base), folders[kind], 4 * TOKENS[:3])
        oracle.assert_close(session.last_logits, seen[-1], SHARE)
        with pytest.raises(EdgeLoraError, match="cannot be weighted"):
            session.adapter = {"a": 0.5}
        factors = Path(shutil.copy(tmp_path / "out/adapters/l/adapter.onnx_adapter", tmp_path))
        with pytest.raises(EdgeLoraError, match="flavor ort takes the adapters of its bundle"):
            model._load("x", model.library.edgelora_adapter_load_file, factors)
    with pytest.raises(EdgeLoraError, match=r"flavor ort: its weights are not read back .*export"):
        add_adapter(tmp_path / "out", "b", folders[kind])
    edgelora.export(base, tmp_path / "own", adapters=adapters, format="float", report=False)
    with (
        edgelora.load(tmp_path / "out") as model,
        pytest.raises(EdgeLoraError, match="no factors from such a file"),
    ):
        model.load_adapter("x", tmp_path / "own/adapters/l")


@pytest.mark.parametrize("kind", ALL_FORMATS)
@pytest.mark.parametrize("layout", [{}, {"head_dim": 48}], ids=str)
def test_prefix_beside_a_rounded_base_equals_peft_s(
    kind: str, layout: dict[str, int], tmp_path: Path
) -> None:
    """The exact path against the bundle's own weights; head_dim 48 is padded in int8."""
    base = tiny.tiny_qwen3(tmp_path / "base", **layout)
    adapter = make_prompt(base, tmp_path / "prefix", "prefix")
    out, options = tmp_path / "out", ALL_FORMATS[kind]
    edgelora.export(base, out, adapters={"a": adapter}, report=False, **options)
    assert_passes(out, "a")
    rounded = oracle.bundle_model(out, oracle.float_model(base))
    theirs = peft_logits(rounded, adapter, TOKENS)
    with edgelora.load(out, threads=2, accuracy="float") as model:
        oracle.assert_close(model.logits(TOKENS, adapter="a"), theirs, SHARE)


def test_long_prefixes_and_texts_cross_the_chunks_of_a_prefill(tmp_path: Path) -> None:
    options = {"format": "float", "report": False, "context_length": 1024}
    large = tiny.tiny_llama(tmp_path / "large", max_position_embeddings=1024)
    adapter = make_prompt(large, tmp_path / "a", "prefix", num_virtual_tokens=300)
    edgelora.export(large, tmp_path / "out", adapters={"a": adapter}, **options)
    ids = 15 * TOKENS
    with edgelora.load(tmp_path / "out", threads=2) as model:
        ours = model.logits(ids, adapter="a")
    oracle.assert_close(ours, peft_logits(oracle.float_model(large), adapter, ids), SHARE)


# ---- sessions ----


def test_a_change_to_or_from_a_prefix_computes_the_text_anew(exported: Path) -> None:
    with edgelora.load(exported) as model, model.session(adapter="a") as session:
        for name in ("a", "p", None, "l", "a"):
            session.adapter = name
            session.prefill(TOKENS[:2])
            assert session.timings.prefill_tokens == session.position
            seen = TOKENS[:2] * (session.position // 2)
            assert np.array_equal(session.last_logits, model.logits(seen, adapter=name)[-1])
        session.rewind(0)
        session.prefill(TOKENS)
        assert session.position == len(TOKENS)
        assert np.array_equal(session.last_logits, model.logits(TOKENS, adapter="a")[-1])


def test_the_prefix_stays_where_it_is_when_the_session_begins_anew(exported: Path) -> None:
    with edgelora.load(exported) as model, model.session(adapter="a") as session:
        for name in ("a", "a", None, "a", "p", "p", "a"):
            session.rewind(0)
            session.adapter = name
            found = session.logits(TOKENS)
            assert np.array_equal(found, model.logits(TOKENS, adapter=name))


def test_activated_lora_and_a_prefix_take_turns(
    base: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    waits = {"target_modules": ["q_proj", "v_proj"], "alora_invocation_tokens": TOKENS[6:8]}
    adapters = {"a": folders["prefix"], "w": make_adapter(base, tmp_path / "w", **waits)}
    edgelora.export(base, tmp_path / "out", adapters=adapters, report=False)
    with edgelora.load(tmp_path / "out") as model, model.session() as session:
        computed = {}
        for step, name in enumerate((None, "w", "a", "w", "a", None)):
            session.adapter = name
            session.prefill(TOKENS[:1] if step else TOKENS)
            computed[step, name] = session.timings.prefill_tokens
            with model.session(adapter=name) as alone:
                alone.prefill(TOKENS + step * TOKENS[:1])
                assert np.array_equal(session.last_logits, alone.last_logits)
        assert computed[1, "w"] < len(TOKENS) < computed[2, "a"] < computed[3, "w"]
        with pytest.raises(EdgeLoraError, match="cannot be weighted or added"):
            session.adapter = {"a": 1.0, "w": 1.0}


def test_the_kv_cache_is_not_kept_over_a_change_of_prefix(exported: Path) -> None:
    with edgelora.load(exported) as model, model.session() as session:
        session.set_adapter("a", keep_cache=True)  # nothing is computed yet
        session.prefill(TOKENS[:4])
        for name in (None, "p", "l"):
            with pytest.raises(EdgeLoraError, match=r"kv_cache cannot be kept.*without keep_cache"):
                session.set_adapter(name, keep_cache=True)
        assert session.adapter == "a"
        session.set_adapter(None)
        session.set_adapter("a", keep_cache=True)  # as it was
        session.prefill(TOKENS[4:5])
        assert session.timings.prefill_tokens == 1
        assert np.array_equal(session.last_logits, model.logits(TOKENS[:5], adapter="a")[-1])
        session.rewind(0)
        session.set_adapter(None, keep_cache=True)
        session.prefill(TOKENS)
        assert np.array_equal(session.last_logits, model.logits(TOKENS)[-1])


def test_a_prefix_counts_against_the_context(exported: Path) -> None:
    room = 8
    with (
        edgelora.load(exported) as model,
        model.session(adapter="a", context_length=POSITIONS + room) as session,
    ):
        with pytest.raises(EdgeLoraError, match="room for 8 tokens behind the prefix, 0 are in it"):
            session.prefill(TOKENS[: room + 1])
        session.prefill(TOKENS[: room - 2])
        tokens, finish = session.generate(10, Sampling(ignore_eos=True))
        assert (len(tokens), finish, session.position) == (2, "context", room)
        session.adapter = None
        assert session.decode(3, ignore_eos=True)
        session.adapter = "a"
        assert session.generate(1) == ([], "context")
        with pytest.raises(EdgeLoraError, match="room for 8 tokens behind the prefix, 11 are"):
            session.prefill(TOKENS[:1])
        session.rewind(room)
        assert session.generate(1) == ([], "context")
        session.rewind(room - 1)
        assert len(session.decode(1, ignore_eos=True)) == 1
    with edgelora.load(exported) as model:
        with pytest.raises(EdgeLoraError, match="prefix takes 5 positions, the context has 5"):
            model.session(adapter="a", context_length=POSITIONS)
        with model.session(context_length=POSITIONS) as session:
            session.prefill(TOKENS[:2])
            with pytest.raises(EdgeLoraError, match="nothing is left for text"):
                session.adapter = "a"
            assert session.adapter is None
            session.prefill(TOKENS[2:3])


@pytest.mark.parametrize(
    "weights", [{"a": 0.5}, {"a": 1.0, "l": 1.0}, {"l": 0.2, "p": 0.8}], ids=str
)
def test_a_prefix_is_neither_weighted_nor_added(exported: Path, weights: dict[str, float]) -> None:
    with edgelora.load(exported) as model:
        with pytest.raises(EdgeLoraError, match="a prefix of the text cannot be weighted or added"):
            model.logits(TOKENS, adapter=weights)
        alone = model.logits(TOKENS, adapter={"a": 1.0})
        assert np.array_equal(alone, model.logits(TOKENS, adapter="a"))


# ---- files ----


def test_the_file_holds_the_keys_and_values_that_peft_saved(
    exported: Path, folders: dict[str, Path]
) -> None:
    stored = read_adapter_file(exported / FILE)
    assert stored.prefix is not None and not stored.branches
    rows = load_file(folders["prefix"] / WEIGHTS)[TENSOR]
    both = rows.reshape(POSITIONS, 2, 2, 2, 16).transpose(1, 2, 3, 0, 4)  # layer, key or value
    assert np.array_equal(stored.prefix.keys, both[:, 0].astype(np.float16))
    assert np.array_equal(stored.prefix.values, both[:, 1].astype(np.float16))
    entry = read_manifest(exported)["adapters"]["a"]
    assert (entry["prefix"], entry["targets"], entry["ranks"]) == (POSITIONS, 0, [])
    assert "prefix" not in read_manifest(exported)["adapters"]["l"]


def zero(tensors: Any, _: Any) -> None:
    for values in tensors.values():
        values[:] = 0


def swap(tensors: Any, _: Any) -> None:
    keys = tensors["prefix.keys"].copy()
    tensors["prefix.keys"], tensors["prefix.values"] = tensors["prefix.values"].copy(), keys


def shorten(tensors: Any, _: Any) -> None:
    for name, values in tensors.items():
        tensors[name] = values[:, :, :-1].copy()


@pytest.mark.parametrize("change", [zero, swap, shorten])
def test_a_changed_prefix_fails_the_self_check(bundle: Path, change: Callable[..., None]) -> None:
    list(verify(bundle))
    edit_adapter(bundle, change)
    refuse(bundle, 'adapter "a" computes other logits')
    assert 'adapter "a" computes other logits' in fails("verify", bundle)


def test_a_prefix_is_added_without_the_base(
    base: Path, folders: dict[str, Path], exported: Path, tmp_path: Path
) -> None:
    edgelora.export(base, tmp_path / "out", report=False)
    for kind in KEYS:
        add_adapter(tmp_path / "out", kind, folders[kind])
    add_adapter(tmp_path / "out", "bound", exported / FILE)
    with edgelora.load(tmp_path / "out") as ours, edgelora.load(exported) as theirs:
        for name in ("prefix", "bound"):
            logits = ours.logits(TOKENS, adapter=name)
            assert np.array_equal(logits, theirs.logits(TOKENS, adapter="a"))
    assert read_manifest(tmp_path / "out")["adapters"]["bound"]["prefix"] == POSITIONS
    list(verify(tmp_path / "out"))
    assert_passes(tmp_path / "out", "bound", *sorted(KEYS))
    for kind in ("prompt", "p_tuning"):
        with pytest.raises(EdgeLoraError, match=r"embeddings become keys.*--base"):
            add_adapter(tmp_path / "out", kind, folders[kind])


def test_an_added_prefix_must_fit_the_bundle(
    base: Path, folders: dict[str, Path], exported: Path, tmp_path: Path
) -> None:
    edgelora.export(base, tmp_path / "short", context_length=POSITIONS, report=False)
    edgelora.export(base, tmp_path / "tight", context_length=POSITIONS + 9, report=False)
    with pytest.raises(EdgeLoraError, match="leaves 9 positions of the context, the prompts"):
        add_adapter(tmp_path / "tight", "a", folders["prefix"])
    assert not (tmp_path / "tight/adapters").exists()
    other = tiny.tiny_llama(tmp_path / "deep", num_hidden_layers=3)
    edgelora.export(other, tmp_path / "out", report=False)
    for path in (folders["prefix"], exported / FILE):
        with pytest.raises(EdgeLoraError, match="leave nothing of the context of 5"):
            add_adapter(tmp_path / "short", "a", path)
    with pytest.raises(EdgeLoraError, match=r"are for \[2, 2, 16\], the base has \[3, 2, 16\]"):
        add_adapter(tmp_path / "out", "a", folders["prefix"])


# ---- what an export says of it ----


def test_the_report_has_a_prefix_as_a_side_branch(exported: Path) -> None:
    report = json.loads((exported / "report.json").read_text())
    kinds = {name: [] for name in (None, "a", "p", "l")}
    for each in report["variants"]:
        kinds[each["adapter"]].append(each["kind"])
    assert kinds["a"] == kinds["p"] == ["float", "side"]
    assert kinds["l"] == ["float", "side", "merged", "merged_nf4"]
    for each in report["variants"]:
        if each["adapter"] in ("a", "p") and each["kind"] == "side":
            size = 2 * 2 * 2 * POSITIONS * 16 * 2  # layers, keys, heads, positions, head_dim, bytes
            assert each["adapter_bytes"] == size


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_a_prefix_loses_nothing_in_a_float_bundle(
    base: Path, folders: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    edgelora.export(base, out, adapters={"a": folders[kind]}, format="float")
    report = json.loads((out / "report.json").read_text())
    (side,) = [v for v in report["variants"] if (v["adapter"], v["kind"]) == ("a", "side")]
    effect = report["effects"]["a"]["mean_kl"]
    assert effect > 0.02 and side["mean_kl"] < 1e-6 * effect
    for given in ({}, {"a": folders[kind]}):
        scores = evaluate_bundle(out, base=base, adapters=given, windows=2).scores
        (score,) = [each.score for each in scores if each.adapter == "a"]
        assert score is not None and score.mean_kl < 1e-3 * effect


def test_a_prefix_is_never_merged(base: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    for kind in MAKERS:
        with pytest.raises(EdgeLoraError, match=r"5 virtual tokens: .* use --mode side"):
            options = {"adapters": {"a": folders[kind]}, "mode": "merge", "report": False}
            edgelora.export(base, tmp_path / "out", **options)
    edgelora.export(base, tmp_path / "out", adapters={"a": folders["prompt"]}, mode="auto")
    plan = read_manifest(tmp_path / "out")["plan"]
    assert (plan["mode"], plan["merge_base"]) == ("side", None)
    assert (
        plan["reasons"]["mode"] == "the adapter stands before the text, which no merging can apply"
    )


def test_a_composition_takes_no_prefix(folders: dict[str, Path], tmp_path: Path) -> None:
    for kind in MAKERS:
        with pytest.raises(EdgeLoraError, match="5 virtual tokens: they have no factors to add"):
            edgelora.compose({folders[kind]: 1.0}, tmp_path / "out")


def test_commands_take_a_prefix_as_any_adapter(exported: Path, folders: dict[str, Path]) -> None:
    said = json.loads(ok("run", exported, "--prompt", "a", "--adapter", "a", "--json"))
    base = json.loads(ok("run", exported, "--prompt", "a", "--json"))
    assert said["token_ids"] != base["token_ids"] and said["adapter"] == {"a": 1.0}
    assert ok("chat", exported, "--adapter", "p", text="hello\n/base\nhello\n/quit\n")
    assert "cannot be weighted" in fails("run", exported, "--prompt", "a", "--adapter", "a:0.5")
    held = read_manifest(exported)["model"]["context_length"]
    asked = ("bench", exported, "--adapter", "a", "--repeats", 1, "--prompt-tokens", held - 9)
    assert "the context holds 251: ask for fewer" in fails(*asked, "--new-tokens", 8)
    assert ok(*asked, "--new-tokens", 3, "--json")
    assert "a: a prefix of 5 positions" in ok("inspect", exported)
    assert "keys and values before the text" in ok("inspect", folders["prefix"])
    assert "that the base makes of them" in ok("inspect", folders["p_tuning"])


# ---- what is refused ----


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("with_base", [True, False])
def test_ledger_says_what_becomes_of_all(
    base: Path, folders: dict[str, Path], kind: str, *, with_base: bool
) -> None:
    shapes = targets(open_checkpoint(base).config) if with_base else None
    ledger = {each.item: each for each in adapter_ledger(folders[kind], shapes)}
    assert {each.verdict for each in ledger.values()} == {"exported", "harmless"}
    assert ledger[TENSOR].verdict == "exported"
    assert len(ledger) == len(json.loads((folders[kind] / CONFIG).read_text())) + 1


def refused(folder: Path, base: Path, **options: Any) -> str:
    """The one line of an export, which writes nothing."""
    out = folder.parent / "refused"
    with pytest.raises(EdgeLoraError) as caught:
        edgelora.export(base, out, adapters={"a": folder}, **options)
    assert not out.exists() and {path.name for path in folder.parent.iterdir()} == {folder.name}
    assert "\n" not in str(caught.value)
    return str(caught.value)


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    (
        {"num_virtual_tokens": 6},
        "prompt_embeddings: shape [5, 128], but config and base need [6, 1",
    ),
    ({"num_virtual_tokens": None}, "num_virtual_tokens = null: must be a positive integer"),
    ({"num_virtual_tokens": True}, "num_virtual_tokens = true: must be a positive integer"),
    ({"num_virtual_tokens": -5}, "num_virtual_tokens = -5"),
    ({"num_layers": 1}, "shape [5, 128], but config and base need [5, 64]"),
    ({"num_layers": 1, "token_dim": 64}, "are for [1, 2, 32], the base has [2, 2, 16]"),
    ({"num_layers": 4, "token_dim": 16}, "are for [4, 2, 8], the base has [2, 2, 16]"),
    ({"num_attention_heads": 4}, "are for [2, 4, 8], the base has [2, 2, 16]"),
    ({"num_attention_heads": 3}, "token_dim = 32: no multiple of num_attention_heads"),
    ({"token_dim": "x"}, 'token_dim = "x"'),
    ({"num_transformer_submodules": 2}, "num_transformer_submodules = 2: 2 is for encoder-decoder"),
    ({"modules_to_save": ["norm"]}, "modules_to_save"),
    ({"r": 8}, "r = 8: not a field of PEFT 0.21.2's PrefixTuningConfig"),
    ({"peft_type": "P_TUNING"}, "init_weights = null, prefix_projection"),
]


@pytest.mark.parametrize(("change", "culprit"), BAD_FIELDS, ids=case_id)
def test_bad_field_is_refused_by_name(
    folder: Path, base: Path, change: dict[str, Any], culprit: str
) -> None:
    change_config(folder, **change)
    assert culprit in refused(folder, base)


Tensors = dict[str, np.ndarray]
BAD_TENSORS: list[tuple[Callable[[Tensors], object], str]] = [
    (lambda t: t.clear(), "holds no prompt_embeddings"),
    (lambda t: t.update({TENSOR: t[TENSOR][:-1]}), "prompt_embeddings: shape [4, 128]"),
    (lambda t: t.update({TENSOR: t[TENSOR][:, :-1].copy()}), "shape [5, 127]"),
    (lambda t: t.update({TENSOR: t[TENSOR][None]}), "shape [1, 5, 128]"),
    (lambda t: t.update({TENSOR: t[TENSOR] * np.nan}), "prompt_embeddings: holds NaN"),
    (lambda t: t.update({TENSOR: t[TENSOR].astype(np.int8)}), "dtype I8"),
    (lambda t: t.update({TENSOR: t[TENSOR] * 1e6}), "does not fit float16: export --format float"),
    (lambda t: t.update({"base_model.x.weight": t[TENSOR]}), "base_model.x.weight: PEFT saves"),
]


@pytest.mark.parametrize(("change", "culprit"), BAD_TENSORS, ids=case_id)
def test_bad_tensor_is_refused_by_name(
    folder: Path, base: Path, change: Callable[[Tensors], object], culprit: str
) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    assert culprit in refused(folder, base)


def test_what_leaves_no_context_is_refused(folder: Path, base: Path) -> None:
    wanted = "its 5 virtual tokens leave nothing of the context of 5: export with a longer"
    assert wanted in refused(folder, base, context_length=POSITIONS)
    out = folder.parent / "refused"
    arguments = ("export", base, "-o", out, "--adapter", f"a={folder}")
    assert wanted in fails(*arguments, "--context-length", POSITIONS)
    assert not out.exists()


def test_the_shortest_context_that_has_room_is_taken(
    folders: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    options = {"adapters": {"a": folders["prompt"]}, "context_length": POSITIONS + 1}
    edgelora.export(base, tmp_path / "out", **options)
    assert len(list(verify(tmp_path / "out"))) > 4
    with edgelora.load(tmp_path / "out") as model:
        assert model.logits(TOKENS[:1], adapter="a").shape == (1, 384)


def test_embeddings_of_another_base_are_refused(
    folders: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    other = tiny.tiny_llama(tmp_path / "wide", hidden_size=96)
    with pytest.raises(EdgeLoraError, match=r"are for \[64\], the base has \[96\] \(hidden_size\)"):
        edgelora.export(other, tmp_path / "out", adapters={"a": folders["prompt"]})
    assert isinstance(read_adapter(folders["prompt"], {}).prefix, SoftPrompt)


def test_a_prefix_s_file_is_read_strictly(bundle: Path, tmp_path: Path) -> None:
    def change(edit: Callable[..., object]) -> str:
        copy = Path(shutil.copytree(bundle, tmp_path / "copy", dirs_exist_ok=True))
        edit_adapter(copy, edit)
        with pytest.raises(EdgeLoraError) as ours:
            read_adapter_file(adapter_file(copy, "a"))
        with edgelora.load(copy) as model, pytest.raises(EdgeLoraError) as theirs:
            model.logits(TOKENS, adapter="a")
        assert "\n" not in f"{ours.value}{theirs.value}"
        return f"{ours.value} | {theirs.value}"

    said = change(lambda tensors, _: tensors.pop("prefix.values"))
    assert said.count("prefix.values") == 2
    said = change(lambda tensors, _: tensors["prefix.keys"].fill(np.inf))
    assert said.count("NaN or infinity") == 2
    said = change(lambda _, metadata: metadata.update(scaling='{"lm_head": 1}'))
    assert "scaling must be {}" in said and "a prefix and targets" in said
    waits = {"activation": '{"invocation_tokens": [1]}', "scaling": "{}"}
    said = change(lambda _, metadata: metadata.update(waits))
    assert said.count("its prefix cannot wait for invocation tokens") == 2
    halved = {"prefix.keys": np.zeros((2, 2, 4, 16), np.float32)}
    assert "keys and values F32" in change(lambda tensors, _: tensors.update(halved))
