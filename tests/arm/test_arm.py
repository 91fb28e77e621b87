"""The whole runtime as an aarch64 program, beside the same bundle on this machine.

The float path computes the same numbers, up to the order of float32 additions. The int8 path
rounds activations: a value within float noise of a half goes to either side, and the layers spread
that until the two machines' errors are two samples of one noise. So each is held against the float
path, and no more is asked of ARM than that its error is of the size of this machine's.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated import BUILD, ROOT, Machine, run

import edgelora
import oracle
import tiny
from elf import MACHINES, check_release
from test_float_oracle import make_adapter
from test_quantized_oracle import FORMATS
from test_selfcheck import edit_adapter, zero_b
from test_smollm2 import NEAR_TIE, SHARE

pytestmark = pytest.mark.slow
CPUS = {"cortex-a53": "neon", "cortex-a76": "neon_dotprod", "max": "neon_i8mm"}
NOISE = 1.5  # of this machine's int8 error, root mean square
PROMPT = "The sea is"
RESULTS = [["-", "float"], ["a", "float"], ["-", "int8"], ["a", "int8"]]
TOKENS = [5, 9, 120, 300, 7, 64]
CARRIED: dict[str, dict[str, Any]] = {  # codes of a bitsandbytes base
    "fp4": {"quant_type": "fp4"},
    "fp4_plain": {"quant_type": "fp4", "double_quant": False},
    "nf4_bfloat16": {"dtype": "bfloat16"},
}


def expected_isa(cpu: str) -> str:
    built = (ROOT / "runtime" / "kernels" / "kernels.inc").read_text()
    return CPUS[cpu] if f"EDGELORA_ISA({CPUS[cpu]}," in built else "scalar"


def answer(
    bundle: Path, adapter: str | None, accuracy: str, prompt: list[int], n: int
) -> list[int]:
    """Greedy, on this machine."""
    with (
        edgelora.load(bundle, threads=1, accuracy=accuracy) as model,
        model.session(adapter=adapter) as session,
    ):
        session.prefill(prompt)
        return list(session.decode(n, ignore_eos=True))


def logits(bundle: Path, adapter: str | None, accuracy: str, ids: list[int]) -> np.ndarray:
    with edgelora.load(bundle, threads=1, accuracy=accuracy) as model:
        return model.logits(ids, adapter=adapter)


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def check_choices(rows: np.ndarray, others: list[int], tokens: list[int]) -> None:
    """Where ARM takes another token, the float path's logits of the two nearly tie."""
    for row, other, token in zip(rows, others, tokens, strict=True):
        gap = float(row[token] - row[other])
        assert gap <= NEAR_TIE * np.abs(row).max(), f"{other} instead of {token}: gap {gap:.3f}"


def first_difference(one: list[int], other: list[int]) -> int:
    pairs = enumerate(zip(one, other, strict=True))
    return next((i for i, pair in pairs if pair[0] != pair[1]), len(one))


def test_wheel_is_for_aarch64_and_small(wheel: Path, machine: Machine) -> None:
    assert wheel.stem.endswith("-py3-none-linux_aarch64")
    library = check_release(machine.library, MACHINES["aarch64"])
    usual = {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "ld-linux-aarch64.so.1"}
    assert library.needed <= usual


def test_native_tests_pass(wheel: Path) -> None:
    """All but the kernels', which run on each CPU model by themselves, and the crew's: emulated
    threads take turns and see memory as this machine's do.
    """
    command = ("ctest", "--test-dir", BUILD, "--exclude-regex", "^(kernels|crew)", "--parallel", 2)
    assert "100% tests passed" in run(*command, EDGELORA_TEST_ONE_IN="7")


@pytest.mark.parametrize("kind", [*FORMATS, *CARRIED])
def test_tiny_bundle_is_computed_alike(machine: Machine, kind: str, tmp_path: Path) -> None:
    """Every format, with an adapter, in float; in int8 the self-check."""
    base, path = tmp_path / "base", tmp_path / "base"
    if kind in CARRIED:
        tiny.tiny_bitsandbytes(path, **CARRIED[kind])
        base = path.with_name("base-source")
    else:
        tiny.tiny_llama(path)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules="all-linear")
    options = FORMATS.get(kind, {})
    plan = edgelora.export(path, tmp_path / "bundle", adapters={"a": adapter}, **options).plan
    assert kind not in CARRIED or plan.format == kind.partition("_")[0]
    said = answer(tmp_path / "bundle", "a", "float", TOKENS, 8)
    ours = logits(tmp_path / "bundle", "a", "float", TOKENS + said)
    theirs = machine.speak("max", tmp_path / "bundle", "a", "float", TOKENS, said)
    oracle.assert_close(theirs.logits, ours, SHARE)
    assert theirs.token_ids == said
    results = machine.selfcheck("max", tmp_path / "bundle")
    assert [line.split()[:2] for line in results] == RESULTS


def test_changed_bundle_fails_its_selfcheck(machine: Machine, tmp_path: Path) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules="all-linear")
    edgelora.export(base, tmp_path / "bundle", adapters={"a": adapter}, report=False)
    edit_adapter(tmp_path / "bundle", zero_b)
    with pytest.raises(AssertionError, match='adapter "a" computes other logits'):
        machine.selfcheck("max", tmp_path / "bundle")


def test_smollm2_passes_its_selfcheck(machine: Machine, smollm2: Path) -> None:
    results = machine.selfcheck("max", smollm2)
    assert [line.split()[:2] for line in results] == [
        [name, accuracy] for accuracy in ("float", "int8") for name in ("-", "pirate")
    ]


@pytest.mark.parametrize(
    ("cpu", "adapter"), [("cortex-a53", None), ("cortex-a76", "pirate"), ("max", "pirate")]
)
def test_smollm2_speaks_as_on_this_machine(
    machine: Machine, smollm2: Path, cpu: str, adapter: str | None
) -> None:
    with edgelora.load(smollm2) as model:
        prompt = list(model.text.encode(PROMPT))
    said = answer(smollm2, adapter, "int8", prompt, 10)
    exact = logits(smollm2, adapter, "float", prompt + said)
    ours = logits(smollm2, adapter, "int8", prompt + said)
    theirs = machine.speak(cpu, smollm2, adapter, "int8", prompt, said)
    assert theirs.isa == expected_isa(cpu)
    assert rms(theirs.logits - exact) <= NOISE * rms(ours - exact)
    rows = exact[len(prompt) - 1 : -1]
    check_choices(rows, theirs.logits[len(prompt) - 1 : -1].argmax(-1).tolist(), said)
    common = first_difference(theirs.token_ids, said) + 1  # behind it the texts are two
    check_choices(rows[:common], theirs.token_ids[:common], said[:common])


def test_smollm2_in_float_is_the_same(machine: Machine, smollm2: Path) -> None:
    with edgelora.load(smollm2) as model:
        prompt = list(model.text.encode(PROMPT))
    said = answer(smollm2, "pirate", "float", prompt, 2)
    ours = logits(smollm2, "pirate", "float", prompt + said)
    theirs = machine.speak("max", smollm2, "pirate", "float", prompt, said)
    oracle.assert_close(theirs.logits, ours, SHARE)
    assert theirs.token_ids == said
