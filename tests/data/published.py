"""What tests of torchvision's sets share: no network, a server of our own, comparisons."""

from __future__ import annotations

import socket
import threading
import urllib.error
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from folder_trees import listed
from PIL import Image

from amint_ray.contracts import UserError
from amint_ray.data.sources import Source
from amint_ray.data.torchvision_sets import open_torchvision

Pixels = npt.NDArray[np.uint8]


def noise(*shape: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def labels_of(count: int, classes: int = 10, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, classes, count).tolist()


def opened(name: str, root: Path, limit: int | None = None) -> Source:
    return open_torchvision(name, str(root), limit=limit, where="data")


def refusal(name: str, root: Path) -> str:
    with pytest.raises(UserError) as caught:
        opened(name, root)
    text = str(caught.value)
    assert text.startswith(f"data: data.path={root}: torchvision cannot open {name}: ")
    assert len(text.splitlines()) == 1
    return text


def without_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torchvision reaches nothing; what it asks for is listed."""
    asked: list[str] = []

    def unreachable(request: Any, *args: Any, **keys: Any) -> None:
        assert socket.getdefaulttimeout() == 60, "it could wait without end"
        asked.append(request.full_url)
        print("torchvision tries")
        raise urllib.error.URLError("no route\nto host")

    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", unreachable)
    return asked


def images_of(source: Source) -> dict[str, Pixels]:
    found: dict[str, Pixels] = {}
    for number, shard in enumerate(source.shards):
        images = source.read(number, range(shard.rows))
        for name, image in zip(source.sample_ids(number), images, strict=True):
            assert isinstance(image, Image.Image)
            found[name] = np.asarray(image)
    return found


def check(source: Source, name: str, splits: dict[str, tuple[Pixels, list[int]]]) -> None:
    """Every image and label of an in-memory set, by its id."""
    images, found = images_of(source), listed(source)
    assert len(images) == sum(len(label) for _, label in splits.values())
    for split, (pixels, label) in splits.items():
        for i, (expected, number) in enumerate(zip(pixels, label, strict=True)):
            assert (images[f"{name}/{split}/{i}"] == expected).all()
            assert found[f"{name}/{split}/{i}"] == (number, split == "test")


class serving:  # noqa: N801
    """A folder on a local port."""

    def __init__(self, folder: Path) -> None:
        class Handler(SimpleHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))

    def __enter__(self) -> str:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}"

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()
