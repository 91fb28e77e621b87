"""ties, dare and magnitude_prune: PEFT's own functions, so that draws and rounding are PEFT's."""

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora.composition.factors import Factors, root_weights
from edgelora.composition.recipe import Recipe, Target, Values
from edgelora.errors import EdgeLoraError

if TYPE_CHECKING:
    from torch import Tensor


class Pruning:
    """Targets must come in the model's order: each draws the random numbers that follow."""

    def __init__(self, recipe: Recipe) -> None:
        self._options = recipe.options
        self._torch, merge_utils = _import(recipe.options.method)
        self._merge = getattr(merge_utils, recipe.options.method.removesuffix("_svd"))
        if recipe.options.draws:
            seed = recipe.options.seed or 0
            self._state = self._torch.Generator().manual_seed(seed).get_state()
            with self._own_draws():
                self._draw_start(recipe)

    def factors(self, target: Target) -> Factors:
        """Of A and B, each for itself."""
        weights_a, weights_b = root_weights(target)
        tensor = self._torch.from_numpy
        lora_a = self._merged([tensor(term.lora_a) for term in target.terms], weights_a)
        return lora_a, self._merged([tensor(term.lora_b) for term in target.terms], weights_b)

    def delta(self, target: Target) -> Values:
        tensor = self._torch.from_numpy
        deltas = [tensor(t.lora_b) @ tensor(t.lora_a) * t.scaling for t in target.terms]
        return self._merged(deltas, [term.weight for term in target.terms])

    def _merged(self, tensors: "list[Tensor]", weights: list[float]) -> Values:
        arguments: list[Any] = [tensors, self._torch.tensor(weights), self._options.density]
        if "ties" in self._options.method:
            arguments.append(self._options.majority_sign or "total")
        with self._own_draws(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # density 1 was asked for
            values: Values = self._merge(*arguments).numpy().astype(np.float32)
        return values

    @contextmanager
    def _own_draws(self) -> Iterator[None]:
        """torch's generator is left as it was."""
        if not self._options.draws:
            yield
            return
        before = self._torch.get_rng_state()
        self._torch.set_rng_state(self._state)
        try:
            yield
        finally:
            self._state = self._torch.get_rng_state()
            self._torch.set_rng_state(before)

    def _draw_start(self, recipe: Recipe) -> None:
        """The numbers that PEFT draws for a new adapter before it composes (`update_layer`)."""
        linear, init = self._torch.nn.Linear, self._torch.nn.init
        for target in recipe.targets:
            out_features, in_features = target.size
            lora_a = linear(in_features, recipe.rank, bias=False)
            linear(recipe.rank, out_features, bias=False)
            if recipe.init is True:
                init.kaiming_uniform_(lora_a.weight, a=math.sqrt(5))
            elif recipe.init == "gaussian":
                init.normal_(lora_a.weight)
            elif recipe.init == "orthogonal":
                shapes = ((recipe.rank,) * 2, (in_features, recipe.rank // 2))
                for shape in (*shapes, (recipe.rank // 2, out_features)):
                    self._torch.randn(shape)


def _import(method: str) -> tuple[ModuleType, ModuleType]:
    """torch and peft.utils.merge_utils, without what bitsandbytes logs when it is imported."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch
            from peft.utils import merge_utils
    except ModuleNotFoundError as error:
        raise EdgeLoraError(
            f"method {method} needs {error.name}: pip install 'edgelora[compose]'"
        ) from error
    finally:
        logger.setLevel(level)
    return torch, merge_utils
