"""The calibration text on its way through a decoder, from one projection's input to the next's.

The weights are those that the bundle will hold: what an earlier layer lost is part of a later
layer's input, so that its rounding can make up for it. Beside it the same text goes through the
float weights, which says what is missing.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgelora.calibration.arithmetic import Arithmetic, Past, Weight
from edgelora.config import ModelConfig
from edgelora.layout import FINAL_NORM
from edgelora.quantize.curvature import Product

QKV_PROJ, O_PROJ, GATE_UP_PROJ, DOWN_PROJ = range(4)  # the order of a layer's projections
_ROWS = 2048  # tokens at a time
_SAMPLED = 4  # one window in so many says how large a drift is

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Missing:
    """How much is missing of X, a projection's inputs, [n, in_features], and of the residual that
    its output is added to, [n, hidden_size], or None. float32; n tokens, or features of X.
    """

    inputs: Float32
    residual: Float32 | None

    def outputs(self, weight: Float32, product: Product) -> Float32:
        """What a linear's output should have more of, [n, out_features]."""
        of_inputs = product(self.inputs, np.ascontiguousarray(weight.T))
        return of_inputs if self.residual is None else of_inputs + self.residual


@dataclass(frozen=True)
class Drift:
    """Δ, what is missing at each of some tokens: XᵀΔ divided by their number, and Δ of a sample."""

    cross: Missing  # [in_features, …]
    sample: Missing  # [tokens, …]
    tokens: int


class Stream:
    """Holds the residual and one projection's input of every token, float32.

    `advance` is called for each projection in the order of layout.projections. `read`: the name of
    a norm → its weight; `past`: a layer → what its kv_cache holds before each window, or None.
    """

    def __init__(
        self,
        config: ModelConfig,
        arithmetic: Arithmetic,
        windows: NDArray[np.int64],  # token ids [windows, positions]
        embedding: Float32,  # [vocab_size, hidden_size]
        read: Callable[[str], Float32],
        past: Callable[[int], Past | None] = lambda layer: None,
    ) -> None:
        self.config, self.arithmetic, self.read, self.past = config, arithmetic, read, past
        self.shape = windows.shape
        self.residual = embedding[windows.ravel()]  # [tokens, hidden_size]
        self.done = 0  # projections
        self.inputs = self._normed()  # [tokens, in_features]

    def hessian(self) -> Float64:
        """XᵀX of the next projection's input, divided by the number of tokens."""
        size = self.inputs.shape[1]
        total = np.zeros((size, size))
        for part in self._parts():
            total += self.arithmetic.gram(self.inputs[part])
        return total / len(self.inputs)

    def drift(self, exact: "Stream") -> Drift:
        """How far this stream has come from `exact`, as the next projection's inputs show it."""
        cross, sample = (step(exact.inputs, self.inputs) for step in (self._cross, self._sample))
        if self.done % 4 not in (O_PROJ, DOWN_PROJ):
            return Drift(Missing(cross, None), Missing(sample, None), len(self.inputs))
        of_residual = self._cross(exact.residual, self.residual)
        sample_of_residual = self._sample(exact.residual, self.residual)
        return Drift(
            Missing(cross, of_residual), Missing(sample, sample_of_residual), len(self.inputs)
        )

    def _sample(self, exact: Float32, own: Float32) -> Float32:
        """exact − own, of some windows."""
        chosen = np.arange(len(own)) // self.shape[1] % _SAMPLED == 0
        return np.asarray(exact[chosen] - own[chosen], np.float32)

    def _cross(self, exact: Float32, own: Float32) -> Float32:
        """Xᵀ(exact − own), divided by the number of tokens."""
        total = np.zeros((self.inputs.shape[1], own.shape[1]))
        for part in self._parts():
            total += self.arithmetic.cross(self.inputs[part], exact[part] - own[part])
        return np.asarray(total / len(own), np.float32)

    def advance(self, weights: Sequence[Weight], biases: Sequence[Float32]) -> None:
        """Runs the projection and what follows it, up to the next projection's input.

        weights [out_features, in_features] and biases [out_features] or [0] of its linears.
        """
        kind = self.done % 4
        self.done += 1
        if kind in (O_PROJ, DOWN_PROJ):
            self._add(weights[0], biases[0])
        else:
            self.inputs = self._through(
                self._attend if kind == QKV_PROJ else self._gate, weights, biases
            )

    def _through(
        self,
        step: Callable[[Sequence[Float32]], Float32],
        weights: Sequence[Weight],
        biases: Sequence[Float32],
    ) -> Float32:
        """step(outputs of the linears), [tokens, out_features of the first]."""
        results = np.empty((len(self.inputs), len(weights[0])), np.float32)
        for part in self._parts():
            x = self.inputs[part]
            pairs = zip(weights, biases, strict=True)
            results[part] = step([self.arithmetic.linear(x, *pair) for pair in pairs])
        return results

    def _parts(self) -> Iterator[slice]:
        """Whole windows, about _ROWS tokens."""
        windows, positions = self.shape
        step = max(1, _ROWS // positions)
        for first in range(0, windows, step):
            yield slice(first * positions, min(first + step, windows) * positions)

    def _attend(self, qkv: Sequence[Float32]) -> Float32:
        q, k, v = qkv
        if self.config.qk_norm:
            q, k = self._head_norm(q, "q_norm"), self._head_norm(k, "k_norm")
        past = self.past((self.done - 1) // 4)
        windows = [x.reshape(-1, self.shape[1], x.shape[1]) for x in (q, k, v)]
        attended = self.arithmetic.attention(windows[0], windows[1], windows[2], past)
        return attended.reshape(q.shape)

    def _head_norm(self, x: Float32, name: str) -> Float32:
        layer = (self.done - 1) // 4
        weight = self.read(f"model.layers.{layer}.self_attn.{name}.weight")
        heads = x.reshape(-1, self.config.head_dim)
        return rms_norm(heads, weight, self.config.rms_norm_eps).reshape(x.shape)

    def _gate(self, gate_up: Sequence[Float32]) -> Float32:
        gate, up = gate_up
        with np.errstate(over="ignore", invalid="ignore"):  # exp(−gate) = Inf is a gate of 0
            return np.asarray(gate / (1 + np.exp(-gate)) * up, np.float32)

    def _add(self, weight: Weight, bias: Float32) -> None:
        for part in self._parts():
            self.residual[part] += self.arithmetic.linear(self.inputs[part], weight, bias)
        self.inputs = self._normed()

    def _normed(self) -> Float32:
        layer, kind = divmod(self.done, 4)
        name = f"model.layers.{layer}.input_layernorm"
        if kind == GATE_UP_PROJ:
            name = f"model.layers.{layer}.post_attention_layernorm"
        elif layer == self.config.num_hidden_layers:
            name = FINAL_NORM
        weight, normed = self.read(f"{name}.weight"), np.empty_like(self.residual)
        for part in self._parts():
            normed[part] = rms_norm(self.residual[part], weight, self.config.rms_norm_eps)
        return normed


def rms_norm(x: Float32, weight: Float32, epsilon: float) -> Float32:
    """Over the last dimension."""
    with np.errstate(over="ignore", invalid="ignore"):  # refused with the Hessian
        mean = np.mean(np.square(x), axis=-1, keepdims=True)
        return np.asarray(x / np.sqrt(mean + np.float32(epsilon)) * weight, np.float32)
