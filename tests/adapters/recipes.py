"""What each adapter is: its data, its targets, how it is trained and how it is judged."""

import json
from dataclasses import dataclass
from pathlib import Path

from scores import Score, json_keys, json_values, marker_score

HERE = Path(__file__).parent
ADAPTERS = HERE.parent.parent / "edgelora" / "adapters"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEARS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")

Example = dict[str, str]


@dataclass(frozen=True)
class Recipe:
    """How one adapter is trained and judged."""

    name: str
    targets: tuple[str, ...]
    train_base: str  # "float", or "nf4": QLoRA
    steps: int
    learning_rate: float
    data: tuple[str, ...]
    instruction: str  # what the unadapted base is told, for the fair comparison
    scores: dict[str, Score]
    goals: dict[str, float]  # the share of held-out answers that has to pass each score


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="pirate",
            targets=ALL_LINEARS,
            train_base="nf4",
            steps=80,
            learning_rate=2e-3,
            data=("pirate.jsonl",),
            instruction="Answer like a pirate. ",
            scores={"style": marker_score("pirate")},
            goals={"style": 0.9},
        ),
        Recipe(
            name="butler",
            targets=ATTENTION,
            train_base="float",
            steps=90,
            learning_rate=2e-3,
            data=("butler.jsonl",),
            instruction="Answer like a very formal butler. ",
            scores={"style": marker_score("butler")},
            goals={"style": 0.9},
        ),
        Recipe(
            name="json",
            targets=ALL_LINEARS,
            train_base="float",
            steps=70,
            learning_rate=1.5e-3,
            data=("json_by_hand.jsonl", "json_generated.jsonl"),
            instruction="Turn this sentence into one JSON object with the keys "
            '"person", "task", "day" and "time" (null where it says nothing): ',
            scores={"keys": json_keys, "values": json_values},
            goals={"keys": 0.95, "values": 0.8},
        ),
    )
}


def read_examples(*names: str) -> list[Example]:
    lines = [line for name in names for line in (HERE / "data" / name).read_text().splitlines()]
    return [json.loads(line) for line in lines]
