"""QA-LoRA (Xu et al. 2024): A reads the means of groups of inputs; read as the A of plain LoRA.

PEFT 0.21.2 (`QALoraLinearVariant` in peft/tuners/lora/variants.py): y += scaling·B·A·p, where p has
K / group values, each the mean of `group` inputs times K / group. It does so in GPTQ's linears only
and in all others computes plain LoRA: A's width says which.
"""

import numpy as np
from numpy.typing import NDArray

from edgelora.adapter.tensors import Factor


def inputs_of_a_mean(width: int, columns: int, group: int | None) -> int:
    """Of an A of that width in a linear of that many inputs: the group, or 1 for plain LoRA."""
    return group if group is not None and width * group == columns else 1


def expanded(lora_a: Factor, group: int) -> NDArray[np.float32]:
    """[rank, K / group] → [rank, K]: A'[r, k] = A[r, k / group] · (K / group) / group."""
    with np.errstate(over="ignore"):  # refused where it is written or merged
        wide = lora_a.astype(np.float32) * np.float32(lora_a.shape[1] / group)
    return np.repeat(wide, group, axis=1)
