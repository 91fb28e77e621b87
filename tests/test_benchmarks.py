"""The harness of tests/benchmarks: what it writes, whom it lets take part, what it makes of
figures.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import benchmarks.__main__ as main_module
import edgelora
from benchmarks import (
    bandwidth,
    contestants,
    limits,
    losses,
    paired,
    rounds,
    scaling,
    table,
    targets,
)
from benchmarks.contestants import LOADED, Contestant, Load
from benchmarks.figures import (
    SPEED,
    Row,
    append,
    latest,
    machine_folder,
    named_machine,
    read,
    spoken,
    stream_limits,
)
from benchmarks.folder import RANKS, SMOLLM2, Peers
from benchmarks.prepare import Step
from benchmarks.random_adapter import write_random_adapter
from benchmarks.roofline import points
from edgelora.adapter import read_adapter
from tiny import tiny_llama
from toy_bundle import ADAPTERS, write_toy_bundle

CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def a_row(**changes: Any) -> Row:
    fields: dict[str, Any] = {
        "run": "one", "round": 0, "model": SMOLLM2, "contestant": "EdgeLoRA int4",
        "version": "1.2", "threads": 2, "prompt_tokens": 128, "new_tokens": 64,
        "prefill": 800.0, "decode": 150.25, "weight_bytes": 80_000_000, "bandwidth": 20.0,
        "machine": "2 × CPU", "isa": "avx2", "commit": "abcdef0",
    }  # fmt: skip
    return Row(**fields | changes)


def a_contestant(tmp_path: Path, code: str, name: str = "some peer") -> Contestant:
    """Runs `code`, which finds threads, prompt and new tokens in sys.argv."""
    weights = tmp_path / "weights"
    weights.write_bytes(bytes(1 << 16))

    def command(load: Load) -> list[object]:
        return [sys.executable, "-c", code, load.threads, load.prompt_tokens, load.new_tokens]

    def parse(said: str) -> tuple[float, float]:
        prefill, decode = json.loads(said)
        return prefill, decode

    return Contestant(name, (weights,), command, parse, lambda: "7.0")


# ---- the CSV and the README ----


def test_readme_and_architecture_say_what_follows_from_the_committed_csvs() -> None:
    found = list(main_module.generated(SPEED))
    assert len(found) == 7
    for path, name, tables in found:
        text = path.read_text()
        assert table.inserted(text, name, tables) == text, "run ./dev bench table"


def test_csv_gives_back_its_rows(tmp_path: Path) -> None:
    rows = [a_row(), a_row(round=1, bandwidth=None, weight_bytes=None, contestant='a, "b"')]
    for row in rows:
        append(tmp_path / "new" / "speed.csv", row)
    assert read(tmp_path / "new" / "speed.csv") == rows
    append(tmp_path / "new" / "speed.csv", a_row())
    with pytest.raises(ValueError, match="1 rounds have a contestant twice"):
        read(tmp_path / "new" / "speed.csv")


def test_csv_with_other_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "speed.csv").write_text("contestant,decode\nEdgeLoRA,1\n")
    with pytest.raises(ValueError, match="columns"):
        read(tmp_path / "speed.csv")


def test_latest_is_the_last_run_of_each_model_and_number_of_threads() -> None:
    old, single = a_row(run="old"), a_row(run="old", threads=1)
    assert latest([old, single, a_row(), a_row(round=1)]) == {
        (SMOLLM2, 2): [a_row(), a_row(round=1)],
        (SMOLLM2, 1): [single],
    }


def test_table_shows_medians_the_best_and_the_limit() -> None:
    peer = {"contestant": "peer int4", "weight_bytes": 100_000_000, "version": "3"}
    long = {"prompt_tokens": 512, "new_tokens": 8}
    rows = [
        *(a_row(round=i, prefill=p, decode=d) for i, (p, d) in enumerate([(1, 9), (3, 8), (2, 7)])),
        *(a_row(round=i, prefill=5 + i, decode=4 + i, **peer) for i in range(3)),
        *(a_row(round=i, prefill=300, decode=999, **long) for i in range(3)),
    ]
    rows[1] = replace(rows[1], bandwidth=24.0)
    lost = [losses.Loss(SMOLLM2, "peer int4", 0.25, 1.5, 0.7, 31.0, 100, "test.txt")]
    elsewhere = a_row(machine="1 × Other", prefill=7, decode=6)
    single = a_row(threads=1)
    first, second = table.tables([elsewhere, *rows, single], lost, 2).split("\n\n**")
    assert "1 × Other" in first
    assert "**" + second == (
        "**SmolLM2-135M**, 2 threads of 2 × CPU, avx2, "
        "streams of 20.0 to 24.0 GB/s (median 20.0), "
        "medians of 3 interleaved rounds, commit abcdef0 (EdgeLoRA 1.2, peer 3)\n\n"
        "| tokens/s | MB | KL | rounds | prefill 128 | prefill 512 | decode at 128 |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| EdgeLoRA int4 | 80 |  | 3 | 2.0 | **300** | **8.0** |\n"
        "| peer int4 | 100 | 0.250 | 3 | **6.0** |  | 5.0 |\n"
        "| limit: median, best stream ÷ weights of EdgeLoRA int4 |  |  |  |  |  | 250, 300 |\n"
    )


def test_a_text_without_the_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="mark"):
        table.inserted("# EdgeLoRA\n", "speed", "")


def test_a_new_run_of_some_needs_a_csv_of_its_own() -> None:
    found = CliRunner().invoke(main_module.main, ["run", "--only", "EdgeLoRA"])
    assert found.exit_code == 2 and "say --csv FILE, or --run" in found.output


# ---- targets ----


def test_the_smallest_bundle_that_loses_no_more_than_q4_0_stands_for_its_model() -> None:
    sizes = {"int4": 80, "nf4": 90, "int4, balanced": 100}
    rows = [a_row(contestant=f"EdgeLoRA {name}", weight_bytes=n) for name, n in sizes.items()]
    kl = {"EdgeLoRA int4": 0.4, "EdgeLoRA nf4": 0.3, "EdgeLoRA int4, balanced": 0.1}
    assert losses.smallest_allowed(rows, kl | {"llama.cpp Q4_0": 0.3}) == "EdgeLoRA nf4"
    assert losses.smallest_allowed(rows, kl | {"llama.cpp Q4_0": 0.2}) == "EdgeLoRA int4, balanced"
    assert losses.smallest_allowed(rows, {}) == "EdgeLoRA int4", "nothing is known: the default"


def test_targets_are_met_or_missed() -> None:
    peer = {"contestant": "llama.cpp Q4_0", "decode": 50.0, "prefill": 600.0}
    rows = [
        a_row(contestant=name, decode=decode, prefill=prefill)
        for name, decode, prefill in (
            ("EdgeLoRA int4", 110.0, 800.0),
            ("EdgeLoRA nf4", 100.0, 800.0),
            ("EdgeLoRA int4, rank 16 merged", 100.0, 800.0),
            ("EdgeLoRA int4 + rank 16", 96.0, 768.0),
        )
    ]
    in_turn = [  # on a machine that is half as fast in each round as in the one before
        replace(row, round=number, decode=row.decode / 2**number, prefill=row.prefill / 2**number)
        for row in rows
        for number in range(3)
    ]
    said = targets.tables([*rows, a_row(**peer), a_row(**peer, threads=1)], [], in_turn)
    assert "| decode at 128, 2 threads (1) | 2.0 | 2.20 met: llama.cpp Q4_0, 1 rounds |" in said
    assert "| the same ÷ the stream just before |  | 0.44 |" in said
    assert "| prefill 128, 2 threads (1) | 1.5 | 1.33 missed: llama.cpp Q4_0, 1 rounds |" in said
    assert "| prefill 512, 2 threads (1) | 1.5 |  |" in said
    assert "| nf4 beside int4 | ≥ 0.95 | 0.91, 1.00 missed |  |" in said
    assert "| rank 16 beside merged | ≥ 0.95 | 0.96, 0.96 met |  |" in said
    assert said.startswith("**2 × CPU, avx2**\n")
    other = {"machine": "2 × Other (R) CPU @ 3GHz", "isa": "neon"}
    both = [*rows, *(replace(row, **other) for row in rows)]
    said = targets.tables(both, [], in_turn)
    assert said.count("| prefill 128,") == 2
    assert said.count("| nf4 beside int4 |") == 1, "no pairs were measured there"
    in_turn += [replace(row, **other) for row in in_turn]
    assert targets.tables(both, [], in_turn).count("| nf4 beside int4 |") == 2
    single = [replace(row, threads=1, decode=row.decode / 2) for row in rows]
    said = targets.tables([*rows, a_row(**peer), *single, a_row(**peer, threads=1)], [], [])
    assert (
        "| decode at 128, 2 threads (1) | 2.0 | 2.20 (1.10) missed: llama.cpp Q4_0, 1 rounds |"
        in said
    )
    said = targets.tables([*single, a_row(**peer, threads=1)], [], [])
    assert "| decode at 128, 2 threads (1) | 2.0 | – (1.10) missed |" in said


def test_ours_beside_ours_is_measured_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = write_toy_bundle(tmp_path / "bundle")
    sides = {"a": (bundle, None), "b": (bundle, ADAPTERS[0])}
    monkeypatch.setattr(paired, "sides", lambda peers, model: sides)
    opened = []

    def load(bundle: Path, *, threads: int) -> edgelora.Model:
        opened.append(bundle)
        return edgelora.load(bundle, threads=threads)

    monkeypatch.setattr(paired, "load", load)
    setting = rounds.Setting("one", "CPU", "avx2", "abcdef0")
    rows = list(paired.measure(Peers(tmp_path), SMOLLM2, Load(1, 8, 3), 4, setting))
    assert sorted((row.round, row.contestant) for row in rows) == [
        (number, name) for number in range(4) for name in "ab"
    ]
    assert {row.contestant for row in rows[::2]} == {*"ab"}, "not always the same one first"
    assert all(row.prefill > 0 and row.decode > 0 and row.threads == 1 for row in rows)
    assert len(opened) == 1, "a bundle is opened once"
    sides[paired.UNLOADED] = bundle, None
    list(paired.measure(Peers(tmp_path), SMOLLM2, Load(1, 8, 3), 1, setting))
    assert len(opened) == 3, "but for the side that has no adapters loaded"


def test_sides_are_the_bundles_that_are_there(tmp_path: Path) -> None:
    bundle = Peers(tmp_path).model(SMOLLM2) / "edgelora-adapters"
    bundle.mkdir(parents=True)
    named = paired.sides(Peers(tmp_path), SMOLLM2)
    ranks = [f"EdgeLoRA int4 + rank {rank}" for rank in RANKS]
    assert [*named] == [LOADED, *ranks, paired.UNLOADED]
    assert named["EdgeLoRA int4 + rank 16"] == (bundle, "rank16")


# ---- losses ----


def test_quality_table_has_llama_cpp_s_formats_of_the_same_model() -> None:
    ours = {"format": "nf4", "mean_kl": "0.28", "kl_99_percent": "1.281"}
    ours |= {"same_top_token": "0.708", "perplexity": "30.826", "weight_megabytes": "85.3"}
    lost = [
        losses.Loss(model, name, 0.0045, 0.021, 0.959, 24.0, 100, "test.txt", 142.96)
        for model, name in (
            (SMOLLM2, "llama.cpp Q8_0"),
            (SMOLLM2, "EdgeLoRA nf4"),
            ("m", "llama.cpp"),
        )
    ]
    assert table.quality([ours], [ours | {"mean_kl": "0.5"}], lost).splitlines()[2:] == [
        "| nf4, double-quantized | 0.280 | 1.28 | 70.8 % | 30.83 | 85.3 MB | 0.500 |",
        "| llama.cpp Q8_0 | 0.004 | 0.02 | 95.9 % | 24.00 | 143.0 MB |  |",
    ]


def test_losses_of_others_are_kept(tmp_path: Path) -> None:
    old = [losses.Loss("m", name, 0.25, 1.5, 0.7, 31.0, 100, "test.txt") for name in "ab"]
    losses.write(tmp_path / "losses.csv", old)
    new = replace(old[1], mean_kl=0.125)
    losses.write(tmp_path / "losses.csv", [new])
    assert losses.read(tmp_path / "losses.csv") == [old[0], new]
    assert losses.mean_kl(losses.read(tmp_path / "losses.csv"), "m") == {"a": 0.25, "b": 0.125}
    assert losses.read(tmp_path / "none.csv") == []


# ---- rounds ----


def test_only_those_whose_files_are_there_take_part(tmp_path: Path) -> None:
    peers = Peers(tmp_path)
    assert list(rounds.turns(peers, [SMOLLM2], [Load(1, 128, 8)], ())) == []
    for name in ("edgelora-int4", "openvino-int4"):
        (peers.model(SMOLLM2) / name).mkdir(parents=True)
    (peers.model(SMOLLM2) / "edgelora-int4" / "model.onnx.data").write_bytes(b"x")
    (peers.model(SMOLLM2) / "openvino-int4" / "openvino_model.bin").write_bytes(b"x")
    [turn] = rounds.turns(peers, [SMOLLM2], [Load(1, 128, 8)], ())
    assert turn.contestant.name == "EdgeLoRA int4", "OpenVINO has a model but no environment"


def test_adapters_are_not_measured_behind_long_prompts(tmp_path: Path) -> None:
    files = [
        path for each in contestants.contestants(Peers(tmp_path), SMOLLM2) for path in each.weights
    ]
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    found = list(rounds.turns(Peers(tmp_path), [SMOLLM2], [Load(1, 2000, 8)], ()))
    kinds = ["int4", "nf4", "int4, block 128", "int4, balanced", "int4, balanced, block 128"]
    assert [turn.contestant.name for turn in found] == [f"EdgeLoRA {kind}" for kind in kinds]
    found = list(rounds.turns(Peers(tmp_path), [SMOLLM2], [Load(1, 512, 8)], ("INT4 + rank",)))
    assert [turn.contestant.name[-2:].strip() for turn in found] == [str(rank) for rank in RANKS]


def test_each_round_has_an_order_of_its_own_within_a_load(tmp_path: Path) -> None:
    everyone = [a_contestant(tmp_path, "", name) for name in "abcdef"]
    turns = [rounds.Turn("m", each, Load(2, p, 4)) for p in (3, 5) for each in everyone]
    orders = [list(rounds.shuffled(turns, number)) for number in range(3)]
    for order in orders:
        assert (
            sorted(order, key=lambda turn: (turn.load.prompt_tokens, turn.contestant.name)) == turns
        )
        assert [turn.load.prompt_tokens for turn in order] == [3] * 6 + [5] * 6
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_rounds_interleave_and_go_on_after_a_failure(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good = a_contestant(tmp_path, "import sys; print([100 * int(sys.argv[2]), 5])", "good")
    bad = a_contestant(tmp_path, "raise SystemExit('no such CPU')", "bad")
    turns = [rounds.Turn("m", each, Load(2, 3, 4)) for each in (bad, good)]
    setting = rounds.Setting("now", "2 × CPU", "avx2", "abcdef0")
    failures = rounds.measure(Peers(tmp_path), turns, 2, setting, tmp_path / "speed.csv")
    assert len(failures) == 2 and all("no such CPU" in each for each in failures)
    rows = read(tmp_path / "speed.csv")
    assert [row.round for row in rows] == [0, 1]
    for row in rows:
        assert (row.prefill, row.decode, row.version) == (300, 5, "7.0")
        assert row.weight_bytes == 1 << 16 and row.bandwidth
    best = max(row.bandwidth or 0 for row in rows)
    found = stream_limits(rows, "good", 3)
    assert found and found[1] == pytest.approx(1e9 * best / (1 << 16)) and 0 < found[0] <= found[1]


def test_a_run_that_is_gone_on_with_counts_its_rounds_on(tmp_path: Path) -> None:
    turn = rounds.Turn("m", a_contestant(tmp_path, "print([1, 2])"), Load(1, 3, 4))
    for run in ("one", "two", "one"):
        setting = rounds.Setting(run, "2 × CPU", "avx2", "abcdef0")
        assert not rounds.measure(Peers(tmp_path), [turn], 2, setting, tmp_path / "speed.csv")
    found = [(row.run, row.round) for row in read(tmp_path / "speed.csv")]
    assert found[2:4] == [("two", 0), ("two", 1)]
    assert found[:2] + found[4:] == [("one", number) for number in range(4)]


@pytest.mark.parametrize("threads", [1, 3])
def test_streaming_reads_a_file(tmp_path: Path, threads: int) -> None:
    (tmp_path / "weights").write_bytes(bytes(3_000_000))
    assert bandwidth.streamed(bandwidth.build(tmp_path), tmp_path / "weights", threads) > 0


# ---- what the programs say ----


def named(tmp_path: Path, name: str) -> Contestant:
    everyone = contestants.contestants(Peers(tmp_path), SMOLLM2)
    return next(each for each in everyone if each.name == name)


def test_llama_cpps_last_line_counts(tmp_path: Path) -> None:
    said = '{"pp": 128, "speed_pp": 1.0, "speed_tg": 2.0}\nx\n{"speed_pp": 3.5, "speed_tg": 4.5}\n'
    assert named(tmp_path, "llama.cpp Q4_0").parse(said) == (3.5, 4.5)


def test_llama_cpps_timings_with_an_adapter_are_found(tmp_path: Path) -> None:
    said = (
        "p: prompt eval time =     240.00 ms /   128 tokens "
        "(    1.88 ms per token,   533.33 tokens per second)\n"
        "p:        eval time =     640.00 ms /    64 runs   "
        "(   10.00 ms per token,   100.00 tokens per second)\n"
    )
    assert named(tmp_path, "llama.cpp Q4_0 + rank 16").parse(said) == (533.33, 100.0)


def test_kernels_benchs_lines_become_points() -> None:
    said = (
        "decode   avx2         int4     b32   576x576         1t    9.0 GB/s of   12.0 ( 75 %)"
        "  2t   18.0 GB/s of   20.0 ( 90 %)\n"
        "prefill  avx2         nf4      b64   2048x2048      M=128"
        "   1t   50.0 GMAC/s (best   55.0)\n"
    )
    decode, both, prefill = points(said)
    assert (decode.threads, both.threads, prefill.threads) == (1, 2, 1)
    assert decode.macs_per_byte == pytest.approx(32 / 18)
    assert both.rate == pytest.approx(18.0 * 32 / 18) and both.bandwidth == 20.0
    assert prefill.macs_per_byte == pytest.approx(128 * 64 / 34) and prefill.rate == 50.0


# ---- limits ----


def test_percentile_is_one_of_the_values() -> None:
    assert limits.percentile(range(1000, 0, -1), 99) == 990
    assert limits.percentile([3, 1, 2], 50) == 2
    assert limits.percentile([5], 99) == limits.percentile([4, 5], 100) == 5


def test_memorys_lines_become_bytes() -> None:
    said = "weights: 123 B\nkv_cache: 45 B\nVmHWM:\t    2048 kB\nRssFile:\t       1 kB\n"
    assert limits.memory(said) == {
        "weights": 123, "kv_cache": 45, "VmHWM": 2 << 20, "RssFile": 1024,
    }  # fmt: skip


def test_a_limit_says_whether_its_target_is_met() -> None:
    assert limits.Limit("m", "load", 99.5, "ms", 100).line == "m load: 99.5 ms (target 100: met)"
    assert limits.Limit("", "size", 2, "MB", 1.5).line == "size: 2 MB (target 1.5: missed)"
    assert limits.Limit("m", "step", 7, "µs").line == "m step: 7 µs"


def test_limits_are_appended_below_one_head(tmp_path: Path) -> None:
    for target in (100.0, None):
        limits.append(tmp_path / "limits.csv", [limits.Limit("m", "load", 12.25, "ms", target)])
    head, *lines = (tmp_path / "limits.csv").read_text().splitlines()
    assert head == "when,machine,isa,commit,versions,model,what,value,unit,target"
    assert [line.partition(",m,")[2] for line in lines] == ["load,12.25,ms,100", "load,12.25,ms,"]


def test_limits_of_each_machines_newest_commit_become_a_table(tmp_path: Path) -> None:
    path = tmp_path / "limits.csv"
    line = "2026-11-30T12:00Z,{0},{1},edgelora 1,{2}\n"
    path.write_text(
        "when,machine,isa,commit,versions,model,what,value,unit,target\n"
        + line.format("CPU,", "a", "m,load,1,ms,100")
        + line.format("CPU,avx2", "a", "m,load,2,ms,100")
        + line.format("CPU,avx2", "a", "m,gone,2,ms,100")
        + line.format("CPU,avx2", "b", "m,load,101.4,ms,100")
        + line.format("CPU,avx2", "b", "m,median,3,ms,")
        + line.format("CPU,avx2", "b", ",size,1.2,MB,1.5")
    )
    assert limits.tables(limits.read(path)) == (
        "**CPU, avx2, commit b**\n\n"
        "| what | target | m |\n| --- | --- | --- |\n"
        "| load | 100 ms | 101 missed |\n| size | 1.5 MB | 1.2 met |\n"
    )


def test_a_fingerprint_is_measured_by_a_refusal(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    write_random_adapter(base, 4, tmp_path / "a")
    edgelora.export(base, tmp_path / "bundle", adapters={"a": tmp_path / "a"}, report=False)
    found = list(limits.fingerprint("m", tmp_path / "bundle"))
    assert [each.what for each in found] == [
        "fingerprint check, median",
        "fingerprint check, p99",
    ]
    assert 0 < found[0].value <= found[1].value


# ---- preparation ----


def test_sequences_of_a_batch_decode_alike(tmp_path: Path) -> None:
    edgelora.export(tiny_llama(tmp_path / "base"), tmp_path / "bundle")
    three = scaling.Batch(tmp_path / "bundle", 3)
    assert three.run(40) > 0
    assert three.decode() > 0
    logits = three.logits()
    assert logits.shape[:2] == (3, 1)
    assert np.abs(logits).max() > 0
    assert (logits == logits[:1]).all()


def test_scaling_is_written_and_drawn(tmp_path: Path) -> None:
    points = [scaling.Point("context", n, 1, 2, 100.0, 10.0) for n in (128, 512)]
    scaling.write(points, "bundle, CPU", tmp_path)
    lines = (tmp_path / "scaling.csv").read_text().splitlines()
    assert lines[1:] == [f'context,{n},1,2,100.0,10.0,"bundle, CPU"' for n in (128, 512)]
    assert "tokens of prompt" in (tmp_path / "scaling.svg").read_text()


def test_a_step_that_fails_leaves_no_product(tmp_path: Path) -> None:
    def half(path: Path) -> None:
        path.mkdir()
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        Step(tmp_path / "new" / "product", half).run()
    assert not (tmp_path / "new" / "product").exists()
    Step(tmp_path / "new" / "product", Path.mkdir).run()
    Step(tmp_path / "new" / "product", half).run()  # it exists: nothing is made
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["product"]


def test_a_random_adapter_has_its_rank_on_all_linears(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    write_random_adapter(tmp_path, 4, tmp_path / "adapter")
    features = {
        "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64),
        "self_attn.o_proj": (64, 64), "mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64),
        "mlp.down_proj": (64, 96),
    }  # fmt: skip
    targets = {f"model.layers.{i}.{name}": features[name] for i in range(2) for name in features}
    adapter = read_adapter(tmp_path / "adapter", targets)
    assert set(adapter.branches) == set(targets)
    for branch in adapter.branches.values():
        assert branch.lora_a.shape[0] == branch.lora_b.shape[1] == 4 and np.any(branch.lora_b)


# ---- plots ----


@pytest.fixture
def draw() -> Callable[..., Any]:
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    return plots.draw


def test_plots_are_drawn_and_are_the_same_each_time(
    tmp_path: Path, draw: Callable[..., Any]
) -> None:
    rows = [
        a_row(contestant=name, prompt_tokens=prompt)
        for name in ("EdgeLoRA int4", "EdgeLoRA int4 + rank 16", "llama.cpp Q4_0")
        for prompt in (128, 512)
    ]
    once = {path: path.read_bytes() for path in draw(rows, tmp_path)}
    names = [f"{kind}-{SMOLLM2}-2t.svg" for kind in ("bars", "context", "rank")]
    assert [*once] == [tmp_path / "2-cpu-avx2" / name for name in names]
    assert once == {path: path.read_bytes() for path in draw(rows, tmp_path)}


def test_a_machine_s_folder_has_its_name() -> None:
    xeon = "2 × Intel(R) Xeon(R) Processor @ 2.80GHz"
    assert machine_folder(named_machine(xeon, "avx512_vnni")) == "2-intel-xeon-2-80ghz-avx512-vnni"
    assert machine_folder(named_machine("2 × AMD EPYC", "avx2")) == "2-amd-epyc-avx2"
    assert spoken(named_machine("2 × AMD EPYC", "avx2")) == "2 × AMD EPYC (Zen 3), avx2"
    assert spoken("1 × Other, neon") == "1 × Other, neon"


# ---- the command ----


def test_without_a_command_all_is_done_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    for name in ("steps", "turns", "measure", "plots.draw", "read", "generated"):
        place: Any = main_module
        *outer, last = name.split(".")
        for part in outer:
            place = getattr(place, part)
        monkeypatch.setattr(place, last, lambda *_, name=name: done.append(name) or [])
    monkeypatch.setattr(main_module, "turns", lambda *_: done.append("turns") or ["a turn"])
    found = CliRunner().invoke(main_module.main, [])
    assert found.exit_code == 0, found.output
    assert done == ["steps", "turns", "measure", "read", "read", "plots.draw", "generated"]
