"""Runs a call again and again, killed (SIGKILL) before its first, second, third … step on the disk,
until it ends by itself.
"""

import subprocess
import sys
from pathlib import Path

DRIVER = """
import itertools, os, shutil, signal, sys
from pathlib import Path
import edgelora
from edgelora import adding, bundle, exporter, whole_folder
from edgelora.manifest import read_manifest

STEPS = [
    (os, "fsync"), (shutil, "rmtree"), (whole_folder, "_exchange"), (bundle.WeightFile, "add"),
    *((Path, name) for name in ("mkdir", "rename", "unlink", "write_bytes")),
]

def kill_before(step):
    count = itertools.count(1)
    def hook(original):
        def hooked(*arguments, **options):
            if next(count) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)
        return hooked
    for owner, name in STEPS:
        setattr(owner, name, hook(getattr(owner, name)))

{definitions}

for step in itertools.count(1):
    child = os.fork()
    if child == 0:
        kill_before(step)
        call()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0, status
    check()
    if status == 0:
        print(step - 1)
        break
"""


def kill_at_every_step(definitions: str, *arguments: Path) -> int:
    """`definitions` are those of call() and check(), which reads what a kill left; sys.argv[1:] are
    the arguments. Returns the number of kills.
    """
    program = DRIVER.replace("{definitions}", definitions)
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)
