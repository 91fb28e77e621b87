"""What 4 bits and merging lose, measured on a text against the float model."""

from edgelora.evaluation.evaluation import (
    Evaluation,
    VariantResult,
    evaluate,
)
from edgelora.evaluation.scores import Score, Tally
from edgelora.evaluation.stored import StoredWeights
from edgelora.evaluation.survival import Survival, survival
from edgelora.evaluation.text import EvaluationText, TextDescription, read_evaluation_text
from edgelora.evaluation.variants import Kind, LinearWeights, Subject, Variant
from edgelora.evaluation.walk import LinearResult, Walk

__all__ = [
    "Evaluation",
    "EvaluationText",
    "Kind",
    "LinearResult",
    "LinearWeights",
    "Score",
    "StoredWeights",
    "Subject",
    "Survival",
    "Tally",
    "TextDescription",
    "Variant",
    "VariantResult",
    "Walk",
    "evaluate",
    "read_evaluation_text",
    "survival",
]
