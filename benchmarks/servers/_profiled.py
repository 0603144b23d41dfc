"""Run a server's file under cProfile; SIGUSR1 starts, the next one writes the statistics and ends the process.

python servers/_profiled.py STATISTICS SERVER [its options]
"""

import cProfile
import os
import runpy
import signal
import sys

profiler = cProfile.Profile()
is_running = False


def on_signal(number: int, frame: object) -> None:
    global is_running
    if is_running:
        profiler.disable()
        profiler.dump_stats(target)
        os._exit(0)
    is_running = True
    profiler.enable()


target = sys.argv[1]
del sys.argv[:2]
signal.signal(signal.SIGUSR1, on_signal)
runpy.run_path(sys.argv[0], run_name="__main__")
