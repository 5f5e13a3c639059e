"""Holds the rules of docs/architecture.md: who may import whom, read from the syntax trees."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "amint_ray"
ROOT = "amint_ray"
MAX_LINES = 400

ROOMS: dict[str, set[str]] = {
    "contracts": set(),
    "config": {"contracts"},
    "storage": {"contracts"},
    "data": {"contracts", "config", "storage"},
    "model": {"contracts", "config"},
    "train": {"contracts", "config", "model", "evaluation"},
    "evaluation": {"contracts", "config"},
    "attacks": {"contracts", "config", "model", "train", "evaluation"},
    # A registered model answers with p-values, hence evaluation.
    "tracking": {"contracts", "config", "storage", "model", "evaluation"},
    "audit": {"contracts", "config", "storage", "data", "evaluation", "tracking"},
    "display": {"contracts"},
    "tables": {"contracts"},
    # What objectives and parameters are called, on the screen as in the pictures, hence evaluation.
    "search_display": {"contracts", "display", "evaluation"},
    "search_tables": {"contracts", "tables", "evaluation"},
    "attack_tables": {"contracts", "tables"},
    "audit_tables": {"contracts", "tables"},
    "evaluate_tables": {"contracts", "tables"},
    "signals": set(),
}
ALL_BUT_SCREEN = {"launch", "__init__"}  # anything but cli and the screen
SCREEN = {
    *("display", "tables", "search_display", "search_tables"),
    *("attack_tables", "audit_tables", "evaluate_tables"),
}
ANYTHING = {"cli", "cli_audit", "cli_evaluate", "cli_key", "cli_tracking", "__main__"}

FORBIDDEN_LIBRARIES: dict[str, set[str]] = {
    "config/": {"torch", "ray", "mlflow"},
    "contracts.py": {"torch", "ray", "mlflow"},
    "data/roles.py": {"torch", "ray", "mlflow"},
    "data/keys.py": {"torch", "ray", "mlflow"},
    "evaluation/metrics.py": {"torch", "ray", "mlflow"},
    "evaluation/keyed": {"torch", "ray", "mlflow"},
    "evaluation/search": {"torch", "ray", "mlflow"},
    "evaluation/importance.py": {"torch", "ray", "mlflow"},
    "model/": {"ray", "mlflow"},
    "train/": {"ray", "mlflow"},
    "evaluation/": {"ray", "mlflow"},
    "attacks/": {"ray", "mlflow"},
    "audit/": {"ray"},
    "attacks/evidence.py": {"torch", "ray", "mlflow"},
    "attacks/method.py": {"torch", "ray", "mlflow"},
    "attacks/shadows.py": {"torch", "ray", "mlflow"},
    "": {"tests", "infra"},
}


@dataclass(frozen=True)
class Import:
    module: str
    """Dotted and absolute; `from a import b` gives `a.b`."""
    line: int


def imports(source: str, package: str) -> Iterator[Import]:
    """What a module imports when it runs, at any depth; `if TYPE_CHECKING:` never runs.

    Args:
        source: the module's text.
        package: dotted name of the package that relative imports start from.
    """

    def visit(node: ast.AST) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, base]).rstrip(".")
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.orelse:
                yield from visit(child)
        else:
            for child in ast.iter_child_nodes(node):
                yield from visit(child)

    yield from visit(ast.parse(source))


def violations(root: Path) -> list[str]:
    """Every broken rule in a package's source tree, as `path:line: what`."""
    found = []
    known = {*ROOMS, *ALL_BUT_SCREEN, *ANYTHING}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        room = relative.parts[0].removesuffix(".py")
        text = path.read_text(encoding="utf-8")
        if (lines := len(text.splitlines())) > MAX_LINES:
            found.append(f"{relative}:{lines}: more than {MAX_LINES} lines")
        if room not in known:
            found.append(f"{relative}:1: {room} is no room of the house")
            continue
        package = ".".join([ROOT, *relative.parent.parts])
        libraries: set[str] = set().union(
            *(
                banned
                for prefix, banned in FORBIDDEN_LIBRARIES.items()
                if relative.as_posix().startswith(prefix)
            )
        )
        for entry in imports(text, package):
            first, *rest = entry.module.split(".")
            where = f"{relative}:{entry.line}"
            if first != ROOT:
                if first in libraries:
                    found.append(f"{where}: imports {first}")
                continue
            target = rest[0] if rest else "__init__"
            if not (root / target).is_dir() and not (root / f"{target}.py").is_file():
                target = "__init__"  # a name of the package itself, such as __version__
            if target in (room, "__init__"):
                continue
            if room in ANYTHING or (room in ALL_BUT_SCREEN and target not in {*ANYTHING, *SCREEN}):
                continue
            if target not in ROOMS.get(room, set()):
                found.append(f"{where}: {room} imports {target}")
    return found


def test_package_keeps_the_rules() -> None:
    assert len(list(PACKAGE.rglob("*.py"))) > 20, "the package was not found"
    assert violations(PACKAGE) == []


PLANTED = {
    "contracts.py": ("from amint_ray.config import schema", "contracts imports config"),
    "config/schema.py": ("import torch.nn as nn", "imports torch"),
    "config/load.py": ("from amint_ray import data", "config imports data"),
    "data/roles.py": ("def f():\n    import torch", "imports torch"),
    "data/loading.py": ("from amint_ray.model.joint import AuditedModel", "data imports model"),
    "model/joint.py": ("from amint_ray.data import loading", "model imports data"),
    "model/taps.py": ("try:\n    import ray\nexcept ImportError:\n    pass", "imports ray"),
    "train/loop.py": ("class A:\n    from amint_ray import storage", "train imports storage"),
    "train/step.py": ("def f():\n    from ..storage import x", "train imports storage"),
    "evaluation/metrics.py": ("from torch import nn", "imports torch"),
    "evaluation/scores.py": ("import mlflow.pyfunc", "imports mlflow"),
    "evaluation/report.py": ("from .. import tracking", "evaluation imports tracking"),
    "attacks/lira.py": ("import ray", "imports ray"),
    "attacks/evidence.py": ("def f():\n    import torch", "imports torch"),
    "attacks/table.py": ("from amint_ray.data import roles", "attacks imports data"),
    "tracking/registry.py": ("import amint_ray.launch.context", "tracking imports launch"),
    "tracking/run_log.py": ("from amint_ray.train import loop", "tracking imports train"),
    "audit/verdict.py": ("from amint_ray.train.loop import x", "audit imports train"),
    "audit/ask.py": ("import ray", "imports ray"),
    "launch/run.py": ("from amint_ray.cli import main", "launch imports cli"),
    "launch/watch.py": ("def f():\n    from amint_ray import display", "launch imports display"),
    "launch/show.py": ("from amint_ray.tables import interval", "launch imports tables"),
    "tracking/order.py": ("from amint_ray import cli_tracking", "tracking imports cli_tracking"),
    "display.py": ("import amint_ray.config.schema", "display imports config"),
    "tables.py": ("from amint_ray.launch import runs", "tables imports launch"),
    "search_tables.py": ("from amint_ray.train import loop", "search_tables imports train"),
    "attack_tables.py": ("from amint_ray.attacks import lira", "attack_tables imports attacks"),
    "launch/look.py": ("from amint_ray.search_tables import x", "launch imports search_tables"),
    "evaluation/search.py": ("import torch", "imports torch"),
    "storage.py": ("import tests.conftest", "imports tests"),
    "attic/junk.py": ("", "attic is no room of the house"),
    "recipes/code.py": ("", "recipes is no room of the house"),
    "launch/long.py": ("x = 1\n" * 401, "more than 400 lines"),
    "model/typed.py": (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import torch\nelse:\n    import mlflow",
        "imports mlflow",
    ),
}
ALLOWED = {
    "cli.py": "from amint_ray.launch import run\nimport ray\nfrom amint_ray import cli_tracking",
    "cli_tracking.py": "from amint_ray.launch import run\nfrom amint_ray.tables import interval",
    "__init__.py": "def f():\n    from amint_ray.tracking import registry",
    "config/fine.py": (
        "import typing\nif typing.TYPE_CHECKING:\n    import torch\n"
        "from amint_ray.contracts import Role"
    ),
    "tracking/fine.py": (
        "import amint_ray\nfrom amint_ray import __version__\n"
        "from amint_ray.evaluation import calibration\nimport mlflow"
    ),
    "launch/fine.py": "from amint_ray.train import loop\nfrom amint_ray.tracking import fine",
    "launch/short.py": "x = 1\n" * 400,
    "train/fine.py": "from . import step\nfrom ..model import joint\nimport torch, rayon",
}


def test_the_page_names_every_module_and_files_beside_the_package_stay_short() -> None:
    page = (PACKAGE.parent / "docs/architecture.md").read_text()
    for path in PACKAGE.rglob("*.py"):
        assert path.name in page or path.name == "__init__.py", path
    for folder in ("infra", "benchmarks"):
        for path in (PACKAGE.parent / folder).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= MAX_LINES, path


def test_checker_finds_each_planted_violation_and_nothing_else(tmp_path: Path) -> None:
    sources = {name: code for name, (code, _) in PLANTED.items()} | ALLOWED
    for name, code in sources.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
    found = violations(tmp_path)
    by_file = {line.split(":")[0]: line.split(": ", 1)[1] for line in found}
    assert by_file == {name: message for name, (_, message) in PLANTED.items()}
    assert len(found) == len(PLANTED)


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (
            "contracts config.schema config.load data.roles data.keys evaluation.metrics "
            "evaluation.keyed evaluation.keyed_collection evaluation.search "
            "evaluation.importance evaluation.by_group evaluation.seeds evaluation.controls "
            "search_display search_tables attack_tables audit_tables evaluate_tables "
            "attacks.evidence attacks.method attacks.shadows attacks.lira attacks.rmia "
            "audit.verdict",
            "torch ray mlflow",
        ),
        (
            "data.loading data.sources evaluation.report attacks.methods attacks.leak "
            "attacks.table",
            "ray mlflow",
        ),
        # Each worker's process imports it, and SciPy takes half a second.
        ("train.loop evaluation.scores", "ray mlflow scipy"),
    ],
)
def test_rooms_import_where_libraries_are_missing(modules: str, absent: str) -> None:
    """Also through what they import in turn: None in sys.modules makes an import fail."""
    code = (
        f"import sys, importlib\nsys.modules.update(dict.fromkeys({absent.split()!r}))\n"
        f"for name in {modules.split()!r}: importlib.import_module('{ROOT}.' + name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
