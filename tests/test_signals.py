"""Signals that come at the wrong moment still end a command in order."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# A run in which something happens where a signal comes.
PROGRAM = """
import os, signal, sys, time
import amint_ray.cli as cli
def run_training(config, watcher, resume, verbose):
    try:
        happens()
        print("went on", file=sys.stderr)
        watcher.heartbeat()
        print("not here", file=sys.stderr)
    finally:
        print("cleaned up", file=sys.stderr)
import amint_ray.launch.train_run
amint_ray.launch.train_run.run_training = run_training
"""


def stopped(what_happens: str, folder: Path) -> str:
    """What a run that is stopped says; it must end with the exit code of SIGINT."""
    program = f"{PROGRAM}\n{what_happens}\nsys.exit(cli.main(['train', 'digits']))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=folder, timeout=120
    )
    assert done.returncode == 130, done.stderr
    assert "cleaned up" in done.stderr and "not here" not in done.stderr
    assert done.stderr.rstrip().endswith("stopped by SIGINT")
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_signal_that_python_swallows_stops_the_run_at_the_next_heartbeat(tmp_path: Path) -> None:
    """What a signal raises in a finaliser is dropped by Python, which would print a traceback."""
    finaliser = """
class Swallows:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
happens = Swallows
"""
    assert "went on" in stopped(finaliser, tmp_path)


def test_a_signal_within_an_import_waits_for_its_end(tmp_path: Path) -> None:
    """An exception there could leave the module's lock held, and whoever imports it waiting."""
    module = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nprint('whole', flush=True)\n"
    (tmp_path / "interrupted.py").write_text(module)
    importing = """
sys.path.insert(0, os.getcwd())
def happens():
    import interrupted
    time.sleep(60)
    print("slept", file=sys.stderr)
"""
    said = stopped(importing, tmp_path)
    assert "whole" in said  # on stderr, where all goes that is no result
    assert "went on" not in said and "slept" not in said
