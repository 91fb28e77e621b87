"""A text's way through a decoder, one projection at a time, for what it says of the weights."""

from edgelora.calibration.arithmetic import Arithmetic, Beside, Past, Weight
from edgelora.calibration.stream import Drift, Stream
from edgelora.calibration.text import CalibrationText, read_calibration, read_token_ids

__all__ = [
    "Arithmetic",
    "Beside",
    "CalibrationText",
    "Drift",
    "Past",
    "Stream",
    "Weight",
    "read_calibration",
    "read_token_ids",
]
