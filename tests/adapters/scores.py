"""How an answer is judged: plain, stated rules, each True or False for one held-out example."""

import json
import re
from collections.abc import Callable

Score = Callable[[dict[str, str], str], bool]

KEYS = ["person", "task", "day", "time"]

MARKERS = {
    "pirate": (
        *("arr", "aye", "ahoy", "avast", "matey", "mateys", "hearties"),
        *("ye", "yer", "landlubber", "scurvy", "doubloons"),
    ),
    "butler": (
        *("sir", "indeed", "very good", "if i may", "might i", "permit me", "allow me"),
        *("at your service", "i dare say", "pray", "i venture", "with pleasure", "i regret"),
        *("i trust", "i should"),
    ),
}


def marker_score(character: str) -> Score:
    """Whether an answer holds at least two different marker words of the character."""
    patterns = [re.compile(rf"\b{marker}\b", re.IGNORECASE) for marker in MARKERS[character]]

    def in_style(example: dict[str, str], answer: str) -> bool:
        return sum(bool(pattern.search(answer)) for pattern in patterns) >= 2

    return in_style


def parse_object(answer: str) -> dict[str, object]:
    """The answer as a JSON object; empty where it is anything else."""
    try:
        parsed = json.loads(answer)
    except json.JSONDecodeError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def json_keys(example: dict[str, str], answer: str) -> bool:
    """Whether the whole answer is one JSON object with exactly the four keys."""
    return sorted(parse_object(answer)) == sorted(KEYS)


def json_values(example: dict[str, str], answer: str) -> bool:
    """Whether it also says exactly what the expected object says."""
    return parse_object(answer) == json.loads(example["answer"])


def share(score: Score, examples: list[dict[str, str]], answers: list[str]) -> float:
    """The share of the answers that pass."""
    passed = [score(example, text) for example, text in zip(examples, answers, strict=True)]
    return round(sum(passed) / len(passed), 4)
