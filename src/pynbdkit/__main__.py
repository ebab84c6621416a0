"""`python -m pynbdkit`: the same as the command `pynbdkit`."""

from pynbdkit.cli.main import run

run()
