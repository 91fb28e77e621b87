"""compose: each method makes the factors and deltas of PEFT's add_weighted_adapter."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

import edgelora
import oracle
import tiny
from edgelora.adapter import adapter_of, read_folder
from edgelora.composition import METHODS
from test_float_oracle import TOKENS, with_adapter

Deltas = dict[str, NDArray[np.float32]]

ADAPTERS: Mapping[str, Mapping[str, Any]] = {
    "one": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "two": {"target_modules": ["v_proj", "down_proj", "lm_head"], "lora_alpha": 6},
    "three": {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"layers.1.*v_proj": 20}},
    "rslora": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "rank_2": {"target_modules": ["v_proj", "up_proj"], "r": 2},
    "mixed": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.0.*q_proj": 2}},
    "regex": {"target_modules": r".*\.(q|k)_proj"},
    "other_regex": {"target_modules": r".*\.1\..*q_proj"},
    "gaussian": {"target_modules": ["v_proj", "o_proj"], "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": ["v_proj"], "init_lora_weights": "orthogonal"},
}
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "linear": {},
    "cat": {},
    "svd": {},
    "ties": {"density": 0.5},
    "ties_svd": {"density": 0.6, "majority_sign": "frequency"},
    "dare_linear": {"density": 0.7, "seed": 3},
    "dare_linear_svd": {"density": 0.7},
    "dare_ties": {"density": 0.4, "seed": 11, "majority_sign": "frequency"},
    "dare_ties_svd": {"density": 0.4, "seed": 2**63},
    "magnitude_prune": {"density": 0.3},
    "magnitude_prune_svd": {"density": 0.3},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_llama(tmp_path_factory.mktemp("tiny-base"))


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every one has factors of its own."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        config = LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 12, **settings})
        adapted = get_peft_model(oracle.float_model(base), config)
        torch.manual_seed(seed)
        for parameter, values in adapted.named_parameters():
            if "lora_" in parameter:
                values.data = 0.2 * torch.randn_like(values)
        adapted.save_pretrained(root / name, save_embedding_layers=False)
    return {name: root / name for name in ADAPTERS}


@pytest.fixture
def model(base: Path) -> PreTrainedModel:
    return oracle.float_model(base)


@pytest.fixture
def exact_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's SVD in float64, as ours: in float32, rounding mixes the last vector that is kept with
    the first that is cut, by the inverse of the distance of their singular values."""
    svd = torch.linalg.svd

    def exact(matrix: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
        return tuple(part.float() for part in svd(matrix.double(), **options))

    monkeypatch.setattr(torch.linalg, "svd", exact)


def test_adamix_is_linear_with_the_weights_1_by_n_squared(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """It averages A and B of n adapters apart."""
    names = ["one", "three"]
    edgelora.compose({folders[n]: 0.25 for n in names}, tmp_path / "c", method="linear")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    found = file_factors(tmp_path / "c")
    given = [file_factors(folders[name]) for name in names]
    a, b = (sum(each[key.format(factor)] for each in given) / 2 for factor in "AB")
    scaling = 12 / 4
    composed = found[key.format("B")] @ found[key.format("A")]
    np.testing.assert_allclose(composed, scaling * b @ a, rtol=1e-4, atol=1e-5)


def composed_by_peft(
    model: PreTrainedModel,
    folders: Mapping[str, Path],
    weights: Mapping[str, float],
    method: str,
    *,
    rank: int | None = None,
    density: float | None = None,
    majority_sign: str = "total",
    seed: int = 0,
) -> PeftModel:
    """PEFT's own, as its adapter "sum"."""
    first, *others = weights
    adapted = with_adapter(model, folders[first], first)
    for name in others:
        adapted.load_adapter(str(folders[name]), name)
    torch.manual_seed(seed - 2**64 if seed >= 2**63 else seed)
    adapted.add_weighted_adapter(
        list(weights), list(weights.values()), "sum", method,
        svd_rank=rank, density=density, majority_sign_method=majority_sign,
    )  # fmt: skip
    return adapted


def peft_factors(adapted: PeftModel) -> Deltas:
    """Names as in a file of PEFT's."""
    return {
        name.replace(".sum.", "."): values.numpy()
        for name, values in adapted.state_dict().items()
        if ".sum." in name
    }


def file_factors(folder: Path) -> Deltas:
    return safetensors.numpy.load_file(folder / "adapter_model.safetensors")


def deltas(factors: Deltas) -> Deltas:
    """With a scaling of 1."""
    return {
        name.removesuffix(".lora_A.weight"): factors[name.replace("lora_A", "lora_B")] @ lora_a
        for name, lora_a in factors.items()
        if "lora_A" in name
    }


def assert_same(ours: Deltas, theirs: Deltas, tolerance: float) -> None:
    """Within `tolerance` of each array's largest magnitude."""
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert ours[name].shape == values.shape, name
        largest = float(np.abs(values).max())
        assert largest > 0, name
        np.testing.assert_allclose(
            ours[name], values, rtol=0, atol=tolerance * largest, err_msg=name
        )


def compose(
    folders: Mapping[str, Path], weights: Mapping[str, float], out: Path, **options: Any
) -> Path:
    adapters = {folders[name]: weight for name, weight in weights.items()}
    return edgelora.compose(adapters, out, **options).folder


@pytest.mark.usefixtures("exact_svd")
@pytest.mark.parametrize("method", METHODS)
def test_method_equals_peft(
    method: str, model: PreTrainedModel, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Targets of one, two and three adapters, one subtracted."""
    weights, options = {"one": 0.6, "two": -0.4, "three": 1.3}, OPTIONS[method]
    out = compose(folders, weights, tmp_path / "out", method=method, **options)
    theirs = peft_factors(composed_by_peft(model, folders, weights, method, **options))
    ours = file_factors(out)
    if method.endswith("svd"):
        assert {name: each.shape for name, each in ours.items()} == {
            name: each.shape for name, each in theirs.items()
        }
        assert_same(deltas(ours), deltas(theirs), 1e-5)
    else:
        assert_same(ours, theirs, 1e-6)


@pytest.mark.usefixtures("exact_svd")
@pytest.mark.parametrize(
    ("names", "method", "options"),
    [
        (["one", "rank_2"], "cat", {}),
        (["one", "rank_2"], "svd", {}),
        (["one", "mixed"], "cat", {}),
        (["one", "mixed"], "svd", {"rank": 3}),
        (["one", "mixed"], "svd", {"rank": 20}),
        (["one", "mixed"], "ties_svd", {"density": 0.5, "rank": 6}),
        (["rank_2", "one"], "dare_linear_svd", {"density": 0.5, "seed": 4}),
        (["gaussian", "one"], "dare_linear", {"density": 0.5, "seed": 5}),
        (["orthogonal", "one"], "dare_ties", {"density": 0.5, "seed": 6}),
        (["one", "rslora"], "linear", {}),
        (["one", "rslora"], "dare_ties", {"density": 0.5}),
        (["regex", "other_regex"], "cat", {}),
        (["regex", "other_regex"], "ties", {"density": 1.0}),
    ],
)
def test_ranks_scalings_and_targets_equal_peft(
    names: list[str],
    method: str,
    options: dict[str, Any],
    model: PreTrainedModel,
    folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    weights = {name: 0.5 + index for index, name in enumerate(names)}
    out = compose(folders, weights, tmp_path / "out", method=method, **options)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # density 1
        theirs = peft_factors(composed_by_peft(model, folders, weights, method, **options))
    ours = file_factors(out)
    if not method.endswith("svd"):
        assert_same(ours, theirs, 1e-6)
    assert_same(deltas(ours), deltas(theirs), 1e-5)


def test_rslora_first_is_a_true_sum_where_peft_multiplies_by_the_root_of_the_rank(
    model: PreTrainedModel, folders: dict[str, Path], tmp_path: Path
) -> None:
    """PEFT keeps the first adapter's use_rslora with alpha = rank; the factors are the same."""
    weights = {"rslora": 0.6, "one": 0.4}
    out = compose(folders, weights, tmp_path / "out", method="linear")
    adapted = composed_by_peft(model, folders, weights, "linear")
    assert_same(file_factors(out), peft_factors(adapted), 1e-6)
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["sum"] == 2  # √4
    assert {b.scaling for b in adapter_of(read_folder(out), None).branches.values()} == {1}


@pytest.mark.parametrize("method", ["linear", "cat", "svd", "ties_svd"])
def test_one_adapter_is_linear_as_in_peft(
    method: str, model: PreTrainedModel, folders: dict[str, Path], tmp_path: Path
) -> None:
    options = {"density": 0.5} if method == "ties_svd" else {}
    report = edgelora.compose({folders["one"]: 0.7}, tmp_path / "out", method=method, **options)
    assert report.method == "linear"
    said = "".join(report.warnings)
    assert ("one adapter: method linear, as PEFT does" in said) == (method != "linear")
    assert ("--density aside" in said) == (method == "ties_svd")
    theirs = peft_factors(composed_by_peft(model, folders, {"one": 0.7}, method))
    assert_same(file_factors(report.folder), theirs, 1e-6)


def test_mixed_ranks_are_in_the_config(
    base: Path, model: PreTrainedModel, folders: dict[str, Path], tmp_path: Path
) -> None:
    """PEFT's own sum, saved, has them in no pattern, so that PEFT cannot load it."""
    out = compose(folders, {"mixed": 0.7}, tmp_path / "out", method="linear")
    single = {each.rank for each in adapter_of(read_folder(out), None).branches.values()}
    assert single == {2, 4}
    scaled = with_adapter(model, folders["mixed"])
    for module in scaled.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling = {name: 0.7 * value for name, value in module.scaling.items()}
    ours = with_adapter(oracle.float_model(base), out)
    oracle.assert_close(oracle.logits(ours, TOKENS), oracle.logits(scaled, TOKENS), 1e-5)


@pytest.mark.parametrize("method", ["linear", "cat", "svd", "dare_ties"])
def test_peft_loads_the_folder_and_computes_the_same(
    method: str, base: Path, model: PreTrainedModel, folders: dict[str, Path], tmp_path: Path
) -> None:
    weights, options = {"one": 0.8, "two": -0.3}, OPTIONS[method]
    out = compose(folders, weights, tmp_path / "out", method=method, **options)
    theirs = composed_by_peft(model, folders, weights, method, **options)
    theirs.set_adapter("sum")
    ours = with_adapter(oracle.float_model(base), out)
    logits = oracle.logits(ours, TOKENS)
    oracle.assert_close(logits, oracle.logits(theirs, TOKENS), 1e-4)
    assert not np.allclose(logits, oracle.logits(oracle.float_model(base), TOKENS), atol=1e-2)


def test_cat_equals_the_weighted_sum_at_run_time(
    base: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    weights = {"one": 0.6, "rslora": -0.5, "two": 1.4}
    chosen = {name: folders[name] for name in weights}
    made = {
        method: compose(folders, weights, tmp_path / method, method=method)
        for method in ("cat", "linear")
    }
    full = compose(folders, weights, tmp_path / "svd", method="svd", rank=12)
    edgelora.export(
        base, tmp_path / "bundle", adapters={**chosen, **made, "svd": full}, format="float"
    )
    with edgelora.load(tmp_path / "bundle") as loaded:
        summed = loaded.logits(TOKENS, adapter=weights)
        oracle.assert_close(loaded.logits(TOKENS, adapter="cat"), summed, 1e-5)
        oracle.assert_close(loaded.logits(TOKENS, adapter="svd"), summed, 1e-5)
        assert not np.allclose(loaded.logits(TOKENS, adapter="linear"), summed, atol=1e-2)


@pytest.mark.parametrize("method", ["svd", "dare_ties_svd"])
def test_same_inputs_give_the_same_bytes_and_torch_draws_as_if_nothing_were(
    method: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    options = {} if method == "svd" else {"density": 0.5, "seed": 1}
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    drawn = []
    for name in ("first", "again"):
        compose(folders, {"one": 1, "two": 2}, tmp_path / name, method=method, **options)
        drawn.append(torch.rand(1))
    assert torch.equal(torch.cat(drawn), expected)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_seed_decides_the_draws(folders: dict[str, Path], tmp_path: Path) -> None:
    for seed in (0, 1):
        options = {"method": "dare_linear", "density": 0.5, "seed": seed}
        compose(folders, {"one": 1, "two": 2}, tmp_path / str(seed), **options)
    compose(folders, {"one": 1, "two": 2}, tmp_path / "none", method="dare_linear", density=0.5)
    zero, one, none = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("0", "1", "none")
    )
    assert zero == none != one
