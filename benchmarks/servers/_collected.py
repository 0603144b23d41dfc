"""Run a server's file with its cyclic collector under control.

python servers/_collected.py COUNT SERVER [its options]

SIGUSR1 collects, and writes to the file COUNT how many unreachable objects there were. SIGUSR2 switches off the
collections that come by themselves.
"""

import gc
import os
import runpy
import signal
import sys


def on_collect(number: int, frame: object) -> None:
    found = gc.collect()
    with open(f"{count}.new", "w") as file:
        file.write(str(found))
    os.replace(f"{count}.new", count)  # whoever waits for it never sees half of it


def on_switch_off(number: int, frame: object) -> None:
    gc.disable()


count = sys.argv[1]
del sys.argv[:2]
signal.signal(signal.SIGUSR1, on_collect)
signal.signal(signal.SIGUSR2, on_switch_off)
runpy.run_path(sys.argv[0], run_name="__main__")
