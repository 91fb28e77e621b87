"""`python -m edgelora`: the same as `edgelora`."""

from edgelora.cli import main

main()
