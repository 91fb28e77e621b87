"""Activated LoRA (PEFT's alora_invocation_tokens): it acts from where its tokens occur last."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

import edgelora
import oracle
import tiny
from edgelora.adapter.tensors import parse_safetensors, safetensors_bytes
from edgelora.adapter_file import read_adapter_file
from edgelora.adding import add_adapter
from edgelora.errors import EdgeLoraError
from edgelora.evaluating import evaluate_bundle
from edgelora.model import Model
from edgelora.verify import verify
from test_adapter import change_config
from test_float_oracle import SHARE, TOKENS, make_adapter, with_adapter

START = 8
INVOCATION = TOKENS[START : START + 2]
FLAVORS = ("edgelora", "ort")
BEFORE = TOKENS[: START - 2]  # holds no invocation
TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("a")
    return make_adapter(base, path, target_modules=TARGETS, alora_invocation_tokens=INVOCATION)


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(
        base, tmp_path_factory.mktemp("p"), r=3, target_modules=["v_proj", "o_proj"]
    )


@pytest.fixture(scope="module")
def peft(base: Path, folder: Path) -> PeftModel:
    return with_adapter(oracle.float_model(base), folder)


@pytest.fixture(scope="module", params=FLAVORS)
def model(
    request: pytest.FixtureRequest,
    base: Path,
    folder: Path,
    plain: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Model]:
    bundle = tmp_path_factory.mktemp("bundle") / request.param
    options = {"format": "float", "flavor": request.param, "report": False}
    edgelora.export(base, bundle, adapters={"a": folder, "p": plain}, **options)
    with edgelora.load(bundle, threads=1) as loaded:
        yield loaded


@pytest.fixture
def own(model: Model) -> Model:
    """For what only flavor edgelora can do."""
    if model.info.isa == "onnxruntime":
        pytest.skip("flavor ort takes one adapter at a time")
    return model


@pytest.mark.parametrize(
    "tokens",
    [
        pytest.param(TOKENS, id="once"),
        pytest.param(TOKENS + TOKENS[3:15], id="twice"),
        pytest.param(BEFORE, id="absent"),
        pytest.param([*BEFORE, INVOCATION[0]], id="half"),
        pytest.param(INVOCATION, id="nothing else"),
        pytest.param([*BEFORE, *INVOCATION, *INVOCATION], id="at the end"),
        pytest.param(TOKENS * 12, id="many times"),
    ],
)
def test_logits_are_those_of_peft(model: Model, peft: PeftModel, tokens: list[int]) -> None:
    oracle.assert_close(model.logits(tokens, adapter="a"), oracle.logits(peft, tokens), SHARE)


def test_it_does_something_from_its_tokens_on_and_nothing_before(model: Model) -> None:
    ours, base = (model.logits(TOKENS, adapter=name) for name in ("a", None))
    assert np.array_equal(ours[: START - 1], base[: START - 1])
    changed = np.abs(ours - base).max(axis=1) > 0.01 * np.abs(base).max()
    assert not changed[:START].any()
    assert changed[START:].all()


@pytest.mark.parametrize("cut", [START, START + 1, START + 2, len(TOKENS) - 1])
def test_the_invocation_may_be_split_over_two_appends(
    model: Model, peft: PeftModel, cut: int
) -> None:
    theirs = oracle.logits(peft, TOKENS)
    with model.session(adapter="a") as session:
        session.prefill(TOKENS[:cut])
        oracle.assert_close(session.logits(TOKENS[cut:]), theirs[cut:], SHARE)
        recomputed = 1 if cut == START + 1 else 0  # its first token, computed by the base
        assert session.timings.prefill_tokens == len(TOKENS) - cut + recomputed


def test_what_the_base_computed_before_the_invocation_stays(model: Model, peft: PeftModel) -> None:
    theirs = oracle.logits(peft, TOKENS)
    with model.session() as session:
        session.prefill(TOKENS[:-1])
        session.set_adapter("a")
        assert session.last_logits is None
        oracle.assert_close(session.logits(TOKENS[-1:]), theirs[-1:], SHARE)
        assert session.timings.prefill_tokens == len(TOKENS) - START
        session.set_adapter(None)
        session.prefill([0])
        assert session.timings.prefill_tokens == len(TOKENS) - START + 1


def test_without_the_invocation_nothing_is_computed_anew(model: Model) -> None:
    with model.session() as session:
        session.prefill(BEFORE)
        before = session.last_logits
        session.set_adapter("a")
        assert np.array_equal(session.last_logits, before)
        session.prefill([INVOCATION[1]])
        assert session.timings.prefill_tokens == 1


def test_a_later_invocation_gives_what_lies_before_it_back_to_the_base(
    model: Model, peft: PeftModel
) -> None:
    tokens = TOKENS + TOKENS[5:12]
    theirs = oracle.logits(peft, tokens)
    with model.session(adapter="a") as session:
        session.prefill(TOKENS)
        found = session.logits(tokens[len(TOKENS) :])
        oracle.assert_close(found, theirs[len(TOKENS) :], SHARE)
        assert session.timings.prefill_tokens == len(tokens) - START


@pytest.mark.parametrize("position", [START - 3, START + 1, START + 5])
def test_a_rewound_text_counts_as_what_is_left(
    model: Model, peft: PeftModel, position: int
) -> None:
    tokens = [*TOKENS[:position], 7, 7, *INVOCATION, 9]
    with model.session(adapter="a") as session:
        session.prefill(TOKENS)
        session.rewind(position)
        found = session.logits([7])
        oracle.assert_close(found, oracle.logits(peft, tokens[: position + 1])[-1:], SHARE)
        found = session.logits(tokens[position + 1 :])
        oracle.assert_close(found, oracle.logits(peft, tokens)[position + 1 :], SHARE)


def test_a_kept_cache_is_kept(model: Model, peft: PeftModel) -> None:
    with model.session() as session:
        session.prefill([*TOKENS[:START], INVOCATION[0]])
        session.set_adapter("a", keep_cache=True)
        session.prefill(TOKENS[START + 1 :])
        assert session.timings.prefill_tokens == len(TOKENS) - START - 1


def greedy(peft: PeftModel, tokens: list[int], count: int) -> list[int]:
    """By PEFT's own generate."""
    with torch.no_grad():
        out = peft.generate(
            input_ids=torch.tensor([tokens]),
            attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
    return [int(token) for token in out[0, len(tokens) :]]


@pytest.mark.parametrize("tokens", [TOKENS, BEFORE], ids=["invoked", "absent"])
def test_generation_is_that_of_peft(model: Model, peft: PeftModel, tokens: list[int]) -> None:
    with model.session(adapter="a") as session:
        session.prefill(tokens)
        assert session.decode(12, ignore_eos=True) == greedy(peft, tokens, 12)


def test_tokens_that_are_generated_invoke_it_at_the_next_call(
    model: Model, base: Path, tmp_path: Path
) -> None:
    with model.session() as session:
        session.prefill(BEFORE)
        generated = session.decode(8, ignore_eos=True)
    invocation = generated[2:4]
    folder = make_adapter(
        base, tmp_path / "a", target_modules=TARGETS, alora_invocation_tokens=invocation
    )
    peft = with_adapter(oracle.float_model(base), folder)
    options = {"format": "float", "flavor": _flavor(model), "report": False}
    edgelora.export(base, tmp_path / "bundle", adapters={"a": folder}, **options)
    with edgelora.load(tmp_path / "bundle", threads=1) as other:
        session = other.session(adapter="a")
        session.prefill(BEFORE)
        assert session.decode(8, ignore_eos=True) == greedy(peft, BEFORE, 8) == generated
        theirs = oracle.logits(peft, [*BEFORE, *generated, 9])
        oracle.assert_close(session.logits([9]), theirs[-1:], SHARE)


def _flavor(model: Model) -> str:
    return "ort" if model.info.isa == "onnxruntime" else "edgelora"


def test_a_failed_call_leaves_the_session_as_it_was(model: Model) -> None:
    with model.session(adapter="a", context_length=len(TOKENS)) as session:
        session.prefill([*TOKENS[:START], INVOCATION[0]])
        before = session.last_logits
        with pytest.raises(EdgeLoraError, match="the context is full"):
            session.prefill(TOKENS)
        assert np.array_equal(session.last_logits, before)
        session.prefill(TOKENS[START + 1 :])
        ours = session.last_logits
    oracle.assert_close(ours[None], model.logits(TOKENS, adapter="a")[-1:], SHARE)


def test_a_sum_waits_with_that_part_alone(
    own: Model, base: Path, folder: Path, plain: Path
) -> None:
    """PEFT with both adapters active, told where the invocation is."""
    theirs = with_adapter(oracle.float_model(base), plain, "p")
    theirs.load_adapter(str(folder), "x")  # PEFT warns of names within "lora_"
    theirs.base_model.set_adapter(["p", "x"])
    for module in theirs.modules():
        if hasattr(module, "lora_A"):
            module.scaling = {n: s * {"p": 0.5, "x": 1.5}[n] for n, s in module.scaling.items()}
    with (
        torch.no_grad(),
        theirs.base_model._enable_peft_forward_hooks(alora_offsets=[len(TOKENS) - START]),
    ):
        out = theirs.base_model.model(torch.tensor([TOKENS])).logits[0].numpy()
    weights = {"p": 0.5, "a": 1.5}
    oracle.assert_close(own.logits(TOKENS, adapter=weights), out, SHARE)
    with own.session(adapter=weights) as session:
        session.prefill(TOKENS)
        session.set_adapter({"a": 1.0})
        session.prefill([1])
        assert session.timings.prefill_tokens == len(TOKENS) + 1  # the base's, no longer the sum's
    oracle.assert_close(
        own.logits(TOKENS, adapter={"a": 1.0}), own.logits(TOKENS, adapter="a"), SHARE
    )


def test_a_sum_waits_for_one_invocation(own: Model, base: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    edgelora.export(base, bundle, format="float", report=False)
    for name, tokens in (("a", [1, 2]), ("b", [1, 2]), ("c", [1])):
        add_adapter(
            bundle,
            name,
            make_adapter(
                base, tmp_path / name, target_modules=TARGETS, alora_invocation_tokens=tokens
            ),
        )
    with edgelora.load(bundle) as model:
        model.logits(TOKENS, adapter={"a": 1.0, "b": 0.5})
        with pytest.raises(EdgeLoraError, match="wait for different invocation tokens"):
            model.logits(TOKENS, adapter={"a": 1.0, "c": 0.5})


def test_an_adapter_unloaded_meanwhile_is_refused(own: Model) -> None:
    with own.session(adapter={"a": 1.0, "p": 1.0}) as session:
        session.prefill(TOKENS[:3])
        own.unload_adapter("a")  # the sum holds its parts
        session.prefill(TOKENS[3:])


def test_a_bundle_tells_its_invocation(model: Model, folder: Path, tmp_path: Path) -> None:
    bundle = Path(model._bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["adapters"]["a"]["invocation_tokens"] == INVOCATION
    assert "invocation_tokens" not in manifest["adapters"]["p"]
    if _flavor(model) == "edgelora":
        file = bundle / manifest["adapters"]["a"]["path"]
        assert read_adapter_file(file).invocation == tuple(INVOCATION)


@pytest.mark.parametrize(
    "activation", ["", "[1]", "{}", '{"invocation_tokens": []}', '{"invocation_tokens": [-1]}']
)
def test_a_damaged_activation_is_refused(
    own: Model, folder: Path, tmp_path: Path, activation: str
) -> None:
    bundle = Path(own._bundle)
    data = (bundle / "adapters/a/adapter.safetensors").read_bytes()
    tensors, metadata = parse_safetensors(data, "a")
    arrays = {name: tensor.values() for name, tensor in tensors.items()}
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(safetensors_bytes(arrays, metadata | {"activation": activation}))
    with pytest.raises(EdgeLoraError, match=f"{file}: activation"):
        own.load_adapter("damaged", file)
    with pytest.raises(EdgeLoraError, match=f"{file}: activation"):
        read_adapter_file(file)


def test_self_check_report_and_eval_measure_it_as_invoked(
    base: Path, folder: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    edgelora.export(base, bundle, adapters={"a": folder})
    report = json.loads((bundle / "report.json").read_text())
    kinds = {each["kind"] for each in report["variants"] if each["adapter"] == "a"}
    assert kinds == {"float", "side"}
    assert report["effects"]["a"]["mean_kl"] > 0.01
    whats = [check.what for check in verify(bundle)]
    assert {"adapter a in float", "adapter a in int8"} <= set(whats)
    scores = evaluate_bundle(bundle, base=base, windows=1).scores
    of = {each.adapter: each.score.mean_kl for each in scores}
    assert of["a"] < 0.1 * report["effects"]["a"]["mean_kl"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora: PEFT allows it only without alora_invocation_tokens"),
        ({"bias": "all"}, "bias: would act before alora_invocation_tokens too"),
        ({"alora_invocation_tokens": []}, "alora_invocation_tokens = .*: must be null or a list"),
        ({"alora_invocation_tokens": [1, 2.0]}, "alora_invocation_tokens = .*: must be null or"),
        ({"alora_invocation_tokens": [-1]}, "alora_invocation_tokens = .*: must be null or"),
        ({"alora_invocation_tokens": [10**6]}, "alora_invocation_tokens: 1000000: not below"),
    ],
)
def test_what_cannot_wait_is_refused(
    base: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    path = make_adapter(
        base, tmp_path / "a", target_modules=TARGETS, alora_invocation_tokens=INVOCATION
    )
    change_config(path, **changes)
    with pytest.raises(EdgeLoraError, match=message):
        edgelora.export(base, tmp_path / "bundle", adapters={"a": path}, report=False)


def test_it_is_neither_merged_nor_composed(base: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EdgeLoraError, match="alora_invocation_tokens: merged it would act on"):
        edgelora.export(base, tmp_path / "bundle", adapters={"a": folder}, mode="merge")
    with pytest.raises(EdgeLoraError, match="alora_invocation_tokens: PEFT's sum does not wait"):
        edgelora.compose({folder: 1.0}, tmp_path / "out")
    report = edgelora.export(base, tmp_path / "b", adapters={"a": folder}, mode="auto")
    assert report.plan.mode == "side"
    assert "waits for its invocation tokens" in report.plan.reasons["mode"]
