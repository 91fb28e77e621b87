"""The one exception that EdgeLoRA raises for bad input."""


class EdgeLoraError(Exception):
    """One line for the user: which file, what is wrong, what to do about it."""
