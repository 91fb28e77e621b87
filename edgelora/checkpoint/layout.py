"""Whether a file holds the tensors that its config wants."""

from collections.abc import Collection, Mapping
from pathlib import Path

from edgelora import layout
from edgelora.config import ModelConfig
from edgelora.errors import EdgeLoraError

EMBEDDING = f"{layout.EMBEDDING}.weight"
HEAD = "lm_head.weight"
_IGNORED = ".rotary_emb.inv_freq"  # older checkpoints store it; it follows from rope_theta

Shape = tuple[int, ...]


def check_layout(found: Mapping[str, Shape], config: ModelConfig, source: Path) -> None:
    """Raises EdgeLoraError that names every missing, extra or wrongly shaped tensor.

    A tied head that the file holds nevertheless is no extra; its bytes are the reader's to compare.
    """
    if config.num_hidden_layers > len(found):  # before a list of that length is made
        raise EdgeLoraError(
            f"{source}: {len(found)} tensors cannot be {config.num_hidden_layers} layers"
        )
    expected = layout.expected_tensors(config)
    extra = {name for name in found.keys() - expected.keys() if not name.endswith(_IGNORED)}
    if config.tie_word_embeddings:
        extra.discard(HEAD)
    wrong = [
        f"{name} is {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = _named("missing tensors", expected.keys() - found.keys())
    problems += _named("tensors that this architecture does not have", extra)
    problems += _named("wrong shapes", wrong)
    if problems:
        raise EdgeLoraError(
            f"{source}: {'; '.join(problems)}; the weights do not belong to this config "
            f"({config.architecture})"
        )


def _named(what: str, names: Collection[str]) -> list[str]:
    if not names:
        return []
    ordered = sorted(names)
    return [f"{what}: {', '.join(ordered)}"]
