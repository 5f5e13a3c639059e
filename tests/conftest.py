"""What all tests share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from infra.local.object_store import ObjectStore

# Before anything imports MLflow: no test talks to a vendor.
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
# A shell that uses a stack or a cluster of its own has these; tests start theirs.
for name in [*os.environ]:
    if name.startswith(("AWS_", "MLFLOW_TRACKING_", "RAY_")) and name != "RAY_TMPDIR":
        del os.environ[name]
# Two processes of tests share two cores: threads of one would spin, waiting for the other's.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))  # infra is not installed


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start clusters go first: else one process ends minutes after the other."""
    clusters = {item.path for item in items if item.get_closest_marker("ray")}
    items.sort(key=lambda item: item.path not in clusters)


@pytest.fixture(scope="module", autouse=True)
def no_server_is_remembered() -> Iterator[None]:
    """MLflow keeps the server that it was last told of, in the environment, too."""
    yield
    if "mlflow" in sys.modules:
        sys.modules["mlflow"].set_tracking_uri(None)


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """An S3 server without buckets; a test puts its `environment` in place itself."""
    from infra.local.object_store import ObjectStore

    with ObjectStore(tmp_path_factory.mktemp("object_store")) as store:
        yield store
