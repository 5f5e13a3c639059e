"""A virtual environment that holds chosen packages of this one, what they need, and nothing else.

Their files are linked to, so that it takes a second and no network, and what it lacks is lacking.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement


def needed(names: Sequence[str]) -> dict[str, Distribution]:
    """Installed distributions by name: these and all that they require here."""
    found: dict[str, Distribution] = {}
    waiting = [Requirement(name) for name in names]
    seen = set()
    while waiting:
        asked = waiting.pop()
        for extra in asked.extras or [""]:
            if (key := (asked.name, extra)) in seen:
                continue
            seen.add(key)
            found[asked.name] = dist = distribution(asked.name)
            for text in dist.requires or []:
                requirement = Requirement(text)
                marker = requirement.marker
                if marker is None or marker.evaluate({"extra": extra}):
                    waiting.append(requirement)
    return found


def make_environment(folder: Path, names: Sequence[str]) -> Path:
    """Make one; the path of its Python."""
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", "--symlinks", str(folder)], check=True
    )
    python = folder / "bin/python"
    (own,) = folder.glob("lib/python*/site-packages")
    there = Path(sysconfig.get_path("purelib"))
    for dist in needed(names).values():
        for file in dist.files or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (own / top).exists():
                (own / top).symlink_to(there / top)
        for entry in dist.entry_points.select(group="console_scripts"):
            script = folder / "bin" / entry.name
            call = f"from {entry.module} import {entry.attr}; raise SystemExit({entry.attr}())"
            script.write_text(f"#!{python}\n{call}\n")
            script.chmod(0o755)
    return python


def environment_of(python: Path) -> dict[str, str]:
    """Variables for a program of the environment: its own commands first, no hint of this one."""
    dropped = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
