"""Tables of the rotary embedding (Su et al. 2021), with Llama 3's frequency scaling."""

import math

import numpy as np
from numpy.typing import NDArray

from edgelora.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig) -> NDArray[np.float32]:
    """theta^(−2i/head_dim), float32 [head_dim / 2]; rounded where transformers rounds."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    powers = np.power(np.float64(config.rope_theta), exponents).astype(np.float32)
    frequencies: NDArray[np.float32] = (np.float32(1.0) / powers).astype(np.float32)
    if config.rope_scaling is None:
        return frequencies
    return scale_llama3(frequencies, config.rope_scaling)


def scale_llama3(frequencies: NDArray[np.float32], scaling: RopeScaling) -> NDArray[np.float32]:
    """Long wavelengths are slowed by `factor`, short ones kept, those between interpolated."""
    original = scaling.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    slowed = frequencies / np.float32(scaling.factor)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    share = (original / wavelengths - scaling.low_freq_factor) / span
    between = (1 - share) * slowed + share * frequencies
    scaled = np.where(wavelengths > original / scaling.low_freq_factor, slowed, between)
    scaled = np.where(wavelengths < original / scaling.high_freq_factor, frequencies, scaled)
    return scaled.astype(np.float32)


def rotary_tables(
    config: ModelConfig, positions: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin, float32 [positions, head_dim / 2]."""
    angles = np.outer(np.arange(positions, dtype=np.float32), inverse_frequencies(config))
    return np.cos(angles, dtype=np.float32), np.sin(angles, dtype=np.float32)
