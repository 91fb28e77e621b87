"""What a plain read of the weights reaches at this moment: stream.c, compiled for this CPU."""

import subprocess
from pathlib import Path

SOURCE = Path(__file__).parent / "stream.c"
MIN_BYTES = 2_000_000_000  # read in one measurement, so that it takes some tenths of a second


def build(folder: Path) -> Path:
    """The program, compiled anew when its source is newer."""
    program = folder / "stream"
    if not program.exists() or program.stat().st_mtime < SOURCE.stat().st_mtime:
        folder.mkdir(parents=True, exist_ok=True)
        options = ["-O3", "-march=native", "-pthread", "-std=gnu11"]
        subprocess.run(["cc", *options, SOURCE, "-o", program], check=True)
    return program


def streamed(program: Path, weights: Path, threads: int) -> float:
    """GB/s (10⁹ bytes a second): the median of at least five passes over the file."""
    passes = max(5, MIN_BYTES // weights.stat().st_size)
    command = [str(program), str(weights), str(threads), str(min(passes, 1000))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)
