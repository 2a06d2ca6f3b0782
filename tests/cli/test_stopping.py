"""Ctrl-C that Python would drop."""

import subprocess
import sys

LOST = """
import signal, sys, time
from assign.cli.stopping import repeat_lost_interrupts

class Interrupted:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        for _ in range(1000):
            pass

if sys.argv[1:]:
    repeat_lost_interrupts()
try:
    Interrupted()
    begin = time.monotonic()
    time.sleep(60 if sys.argv[1:] else 0.5)
    print("not stopped")
except KeyboardInterrupt:
    print("stopped" if time.monotonic() - begin < 59 else "stopped late")
"""


def run(*arguments):
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{LOST}"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)


def test_an_interrupt_in_a_destructor_stops_the_program_a_moment_later():
    alone, repeated = run(), run("repeat")
    assert (alone.stdout.strip(), "KeyboardInterrupt" in alone.stderr) == ("not stopped", True)  # Python by itself
    assert (repeated.stdout.strip(), repeated.stderr) == ("stopped", "")
