"""What a generation is asked to do and what comes out of it."""

from dataclasses import dataclass
from typing import TypedDict

from edgelora import native


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the runtime refuses a value out of its range when it generates.

    The filters act in transformers' order: repetition_penalty, temperature, top_k, top_p, min_p.
    """

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    repetition_penalty: float = 1.0  # 1: off; over all tokens of the session
    seed: int = 0  # same seed, same tokens
    ignore_eos: bool = False  # the model's own end tokens do not stop


class SamplingSettings(TypedDict, total=False):
    """The fields of `Sampling` as keyword arguments."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int
    ignore_eos: bool


@dataclass(frozen=True)
class Timings:
    """Of a session's last prefill and generate. Tokens: positions computed in that time."""

    prefill_seconds: float
    prefill_tokens: int
    decode_seconds: float
    decode_tokens: int

    @classmethod
    def of(cls, struct: native.Timings) -> "Timings":
        """From the C struct."""
        return cls(
            struct.prefill_seconds,
            struct.prefill_tokens,
            struct.decode_seconds,
            struct.decode_tokens,
        )


@dataclass(frozen=True)
class Completion:
    """A finished answer. finish: "length", "stop" (an end token or a stop string) or "context"."""

    text: str
    token_ids: list[int]
    finish: str
    timings: Timings
