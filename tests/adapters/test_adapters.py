"""The shipped adapters and their data are what their README says."""

import json

import pytest
from recipes import ADAPTERS, HERE, RECIPES, Recipe, read_examples
from safetensors import safe_open
from scores import json_keys, json_values, marker_score

MAX_BYTES = 5_000_000
RECORDED = json.loads((HERE / "scores.json").read_text())

each_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))


@each_recipe
def test_adapter_is_small_fp16_and_on_its_targets(recipe: Recipe) -> None:
    path = ADAPTERS / recipe.name / "adapter_model.safetensors"
    assert path.stat().st_size <= MAX_BYTES
    with safe_open(path, framework="np") as file:
        names = list(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"F16"}
    assert {name.split(".")[-3] for name in names} == set(recipe.targets)
    assert len(names) == 30 * 2 * len(recipe.targets)


@each_recipe
def test_adapter_config_names_the_base_and_no_path(recipe: Recipe) -> None:
    text = (ADAPTERS / recipe.name / "adapter_config.json").read_text()
    config = json.loads(text)
    assert config["base_model_name_or_path"] == "SmolLM2-135M-Instruct"
    assert sorted(config["target_modules"]) == sorted(recipe.targets)
    assert "/" not in text


@each_recipe
def test_recorded_scores_reach_the_goal(recipe: Recipe) -> None:
    for metric, goal in recipe.goals.items():
        columns = RECORDED[recipe.name]["scores"][metric]
        assert columns["base"] <= 0.1
        assert columns["adapter"] >= goal


@each_recipe
def test_recorded_scores_follow_from_the_recorded_answers(recipe: Recipe) -> None:
    held_out = read_examples(f"{recipe.name}_held_out.jsonl")
    spoken = RECORDED[recipe.name]["answers"]
    assert [entry["prompt"] for entry in spoken] == [example["prompt"] for example in held_out]
    for metric, score in recipe.scores.items():
        for who in ("base", "adapter"):
            passed = [
                score(example, entry[who]) for example, entry in zip(held_out, spoken, strict=True)
            ]
            recorded = RECORDED[recipe.name]["scores"][metric][who]
            assert sum(passed) / len(passed) == pytest.approx(recorded, abs=1e-4)


@each_recipe
def test_held_out_prompts_are_not_in_the_training_data(recipe: Recipe) -> None:
    trained = {example["prompt"] for example in read_examples(*recipe.data)}
    held_out = {example["prompt"] for example in read_examples(f"{recipe.name}_held_out.jsonl")}
    assert len(held_out) >= 20
    assert not trained & held_out


@each_recipe
def test_training_answers_pass_their_own_score(recipe: Recipe) -> None:
    for example in read_examples(*recipe.data):
        for metric, score in recipe.scores.items():
            assert score(example, example["answer"]), (metric, example)


def test_marker_score_wants_two_different_markers() -> None:
    in_style = marker_score("pirate")
    assert in_style({}, "Arr, that be a fine ship, matey!")
    assert not in_style({}, "Arr, arr, arr!")
    assert not in_style({}, "The harried crew ate.")


def test_json_scores_tell_form_from_content() -> None:
    expected = {"answer": '{"person":"Anna","task":"rest","day":null,"time":null}'}
    other = '{"person":"Tom","task":"rest","day":null,"time":null}'
    assert json_keys(expected, other)
    assert not json_values(expected, other)
    assert json_values(expected, expected["answer"])
    assert not json_keys(expected, other + " Done.")
    assert not json_keys(expected, '{"person":"Anna"}')
