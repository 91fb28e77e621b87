"""Every single tensor of every kind of adapter counts: without it, with one more, misshapen or not
finite it is refused; changed by a little it changes what is exported.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import edgelora
from edgelora.errors import EdgeLoraError
from ledger_adapters import (
    KINDS,
    make,
    make_base,
    mode_of,
    outcome,
    tensors_of,
    with_tensors,
)

Tensors = dict[str, np.ndarray]
STRANGE = re.compile(r"(?<=\.layers\.)1(?=\.)")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(kind, base, tmp_path_factory.mktemp(kind) / "a")


def without(tensors: Tensors) -> Iterator[tuple[str, Tensors]]:
    """One of them, and all of one module."""
    for name in tensors:
        yield name, {each: values for each, values in tensors.items() if each != name}
    for module in {module_of(name) for name in tensors}:
        yield module, {each: v for each, v in tensors.items() if module_of(each) != module}


def module_of(name: str) -> str:
    return re.split(r"\.(?:lora_|ia3_l)", name)[0]


def with_another(tensors: Tensors) -> Iterator[tuple[str, Tensors]]:
    """Beside each of them, and one of a layer that the base does not have."""
    for name, values in tensors.items():
        strange = STRANGE.sub("9", name)
        others = {f"{name}.default", f"{name}2", strange} - {name}
        yield from ((other, tensors | {other: values.copy()}) for other in sorted(others))
    yield "stranger", tensors | {"stranger": np.ones(3, np.float32)}


def misshapen(tensors: Tensors) -> Iterator[tuple[str, Tensors]]:
    for name, values in tensors.items():
        rows = np.ones((len(values) + 1, *values.shape[1:]), values.dtype)
        for wrong in (rows, rows[1:][..., None]):
            yield name, tensors | {name: wrong}


def not_finite(tensors: Tensors) -> Iterator[tuple[str, Tensors]]:
    for name, values in tensors.items():
        if values.size:
            wrong = values.copy()
            wrong.flat[-1] = np.nan
            yield name, tensors | {name: wrong}


CHANGES = (without, with_another, misshapen, not_finite)


@pytest.mark.parametrize("change", CHANGES, ids=lambda each: each.__name__)
def test_a_wrong_tensor_is_refused_in_one_line_and_nothing_is_written(
    change: Callable[[Tensors], Iterator[tuple[str, Tensors]]],
    kind: str,
    base: Path,
    folder: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    taken = []
    for name, tensors in change(tensors_of(folder)):
        bad = with_tensors(folder, tmp_path / "bad", tensors)
        options = {"mode": mode_of(kind), "report": False}
        try:
            edgelora.export(base, out / "bundle", adapters={"a": bad}, force=True, **options)
            taken.append(name)
        except EdgeLoraError as error:
            assert str(error).startswith(f"{bad}: ") and "\n" not in str(error)
            assert list(out.iterdir()) == [] or taken
    assert taken == []


def test_every_tensor_changes_what_is_exported(
    kind: str, base: Path, folder: Path, tmp_path: Path
) -> None:
    whole = outcome(kind, base, folder)
    tensors, ignored = tensors_of(folder), []
    for name, values in tensors.items():
        if not values.size:
            continue
        for place in (0, -1):
            changed = values.copy()
            changed.flat[place] += values.dtype.type(0.25)
            other = with_tensors(folder, tmp_path / "other", tensors | {name: changed})
            if outcome(kind, base, other) == whole:
                ignored.append((name, place))
    assert ignored == []
