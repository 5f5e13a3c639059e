"""What Ray runs for each part of an attack: a training, or a look at images with a model.

Each part writes one `.npz` file to storage, whole or not at all, and is not done again where that
is there. None of them is a Ray Train run: a shadow model is one small training among many, on a
core or a share of a GPU, and what is kept of it is one number an image and edit.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import safetensors.torch
import torch

from amint_ray.attacks.blind import blind_scores
from amint_ray.attacks.passive_mint import train_head
from amint_ray.config.schema import Config
from amint_ray.contracts import Role, RunError, Streams
from amint_ray.data.edits import edited
from amint_ray.data.transforms import to_model_input
from amint_ray.evaluation.outputs import outputs_of, stack_views
from amint_ray.evaluation.views import view
from amint_ray.launch.progress import Sender
from amint_ray.launch.worker import open_streams
from amint_ray.model.joint import Architecture, AuditedModel
from amint_ray.storage import Location, open_input, write_atomically
from amint_ray.train.loop import train

_MOST_BLIND = 10_000
"""Images of each side that a blind classifier reads."""

_NOTHING_READ = "data: none of the images that the attack needs can be read"

Arrays = dict[str, npt.NDArray[Any]]
Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Look:
    """What is looked at once a model is there.

    Attributes:
        positions: (k,) samples, in the order of the results.
        labels: (k,) class indices.
        edits: done to each, one after another from the image itself.
        views: fixed views of each.
    """

    positions: Positions
    labels: npt.NDArray[np.int64]
    edits: tuple[str, ...]
    views: int = 1


@dataclass(frozen=True)
class Part:
    """One part of an attack.

    Attributes:
        name: of its file, and of what it tells of itself; unique in the attack.
        place: the folder of the file.
        config: of the training, or the run's.
        roles: (n,) uint8 of all samples, places in `list(Role)`; None: their own.
        epochs: that it trains for; 0 where it does not.
        weights: of the model that looks; None: those of the audited model.
    """

    name: str
    place: Location
    config: Config
    roles: npt.NDArray[np.uint8] | None = None
    epochs: int = 0
    weights: Location | None = None


class PartContext:
    """A `RunContext` for a training that keeps nothing but what it comes to."""

    rank = 0
    world_size = 1

    def __init__(self, name: str) -> None:
        self.device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        self._sender = Sender(name)

    def progress(self, event: Mapping[str, Any]) -> None:
        """Tell the driver where the training is; nothing else of it."""
        if event["phase"] == "train":
            self._sender.send(event)

    def report(
        self,
        metrics: Mapping[str, Any],
        write_checkpoint: Callable[[Path], None],
        *,
        everywhere: bool = False,
    ) -> bool:
        """Keep no checkpoint."""
        return True

    def latest_checkpoint(self) -> AbstractContextManager[Path | None]:
        """There is none."""
        return contextlib.nullcontext()


def train_and_look(
    part: Part, looked_at: Look, attack: str, data: Mapping[str, Any], model: Any
) -> dict[str, Any]:
    """Train a model from scratch and keep its confidence in each label: a shadow, or a twin.

    Args:
        part: what is trained on.
        looked_at: once it is trained.
        attack: names the news.
        data: references for `open_streams`.
        model: (architecture, weights); the weights are not used.

    Returns:
        `seconds`, and `failed`, why the training came to nothing.
    """
    architecture, _ = model
    context = PartContext(f"{attack}/{part.name}")

    def work() -> Arrays:
        with _streams(part, data, context) as streams:
            trained = train(part.config, architecture, streams, context, score=False).model
        looked = look(trained, looked_at, part.config, data, context.device)
        if part.roles is None:
            return looked
        # Of a shadow, one of many, no more than is read later.
        return {name: looked[name] for name in looked if name.endswith("/label_confidence")}

    return keep(part, work)


def train_head_and_look(
    part: Part, looked_at: Look, attack: str, data: Mapping[str, Any], model: Any
) -> dict[str, Any]:
    """Train a MINT head on the frozen model, and keep its scores.

    Args:
        part: as above.
        looked_at: as above.
        attack: as above.
        data: as above.
        model: (architecture, weights).
    """
    context = PartContext(f"{attack}/{part.name}")

    def work() -> Arrays:
        frozen = loaded(model, context.device)
        with _streams(part, data, context) as streams:
            passive = train_head(
                frozen, streams, part.config, context.device, progress=context.progress
            )
        found = look(passive, looked_at, part.config, data, context.device)
        return {name: values for name, values in found.items() if name.startswith("mint/")}

    return keep(part, work)


def look_at(
    part: Part, looked_at: Look, attack: str, data: Mapping[str, Any], model: Any
) -> dict[str, Any]:
    """Keep what a trained model says of images, and what it is that it was shown.

    Args:
        part: as above.
        looked_at: as above.
        attack: as above.
        data: as above.
        model: (architecture, weights).
    """
    device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")

    def work() -> Arrays:
        architecture, weights = model
        if part.weights is not None:
            with open_input(part.weights, "") as file:
                weights = safetensors.torch.load(file.read())
        asked = loaded((architecture, weights), device)
        return look(asked, looked_at, part.config, data, device)

    return keep(part, work)


def look_blindly(
    part: Part, looked_at: Look, attack: str, data: Mapping[str, Any], model: Any
) -> dict[str, Any]:
    """Keep the scores of a classifier that never sees the model.

    Args:
        part: as above; `roles` tell what was trained on.
        looked_at: as above; of many samples only some are read.
        attack: not used.
        data: as above.
        model: not used.
    """
    assert part.roles is not None
    roles = part.roles

    def work() -> Arrays:
        positions = looked_at.positions
        trained = np.isin(roles, [i for i, role in enumerate(Role) if role.trains_task])
        chosen = np.zeros(len(positions), np.bool_)
        random = np.random.default_rng(0)
        for side in (trained[positions], ~trained[positions]):
            chosen[random.permutation(np.flatnonzero(side))[:_MOST_BLIND]] = True
        place = {position: i for i, position in enumerate(positions.tolist())}
        size = part.config.data.image_size
        # They are gigabytes at ImageNet's size, and must not be there twice.
        images = np.empty((chosen.sum(), part.config.data.channels, size, size), np.uint8)
        rows: list[int] = []
        for some, found in images_of(part.config, data, positions[chosen]):
            images[len(rows) : len(rows) + len(some)] = found.numpy()
            rows += [place[position] for position in some.tolist()]
        if not rows:
            raise RunError(_NOTHING_READ)
        scores = blind_scores(images[: len(rows)], trained[positions[rows]], seed=0)
        return {"blind": _placed(scores, np.array(rows), len(positions))}

    return keep(part, work)


@contextlib.contextmanager
def _streams(part: Part, data: Mapping[str, Any], context: PartContext) -> Iterator[Streams]:
    """The part's data; where they are streamed, its process cannot read any a second time."""
    streams = open_streams(part.config, data, context, roles=part.roles)
    try:
        yield streams
    finally:
        streams.close()
        if part.config.data.mode == "streamed":
            # Ray ends this process without its clean-up; the fork server's socket would stay.
            shutil.rmtree(get_temp_dir(), ignore_errors=True)


def loaded(
    model: tuple[Architecture, Mapping[str, torch.Tensor]], device: torch.device
) -> AuditedModel:
    """The model, on the device where it is asked."""
    architecture, weights = model
    built = AuditedModel(architecture)
    built.load_state_dict(weights)
    return built.to(device)


@torch.inference_mode()
def look(
    model: AuditedModel,
    wanted: Look,
    config: Config,
    data: Mapping[str, Any],
    device: torch.device,
) -> Arrays:
    """What a model says of samples, in evaluation mode.

    Returns:
        By name `EDIT/FIELD` the arrays of `Outputs`, (views, k) each; `mint/EDIT`, (k,) logits of
        the MINT head; and `pixels/EDIT`, (k,) 64-bit hashes of what the model was shown.
    """
    model.eval()
    place = {position: i for i, position in enumerate(wanted.positions.tolist())}
    parts: list[tuple[Positions, Arrays]] = []
    for positions, images in images_of(config, data, wanted.positions):
        rows = np.array([place[position] for position in positions.tolist()])
        found: Arrays = {}
        for edit in wanted.edits:
            found |= _shown(model, edited(images, edit), edit, wanted, rows, config, device)
        parts.append((rows, found))
    if not parts:
        raise RunError(_NOTHING_READ)
    order = np.concatenate([rows for rows, _ in parts])
    return {
        name: _placed(np.concatenate([found[name] for _, found in parts], -1), order, len(place))
        for name in parts[0][1]
    }


def _shown(
    model: AuditedModel,
    images: torch.Tensor,
    edit: str,
    wanted: Look,
    rows: Positions,
    config: Config,
    device: torch.device,
) -> Arrays:
    """What a model says of some edited images."""
    labels = wanted.labels[rows]
    told = torch.from_numpy(labels).clamp(min=0).to(device)
    views, mint = [], []
    for number in range(wanted.views):
        batch = to_model_input([view(images, number).to(device)], config.data)
        logits, membership = model(batch, labels=told)
        views.append(outputs_of(logits.double().cpu().numpy(), labels))
        mint.append(model.parted(membership)[0].double().cpu().numpy())
    outputs = vars(stack_views(views)).items()
    return {
        **{f"{edit}/{field}": values for field, values in outputs},
        f"mint/{edit}": mint[0],
        f"pixels/{edit}": _hashes(images),
    }


def _placed(values: npt.NDArray[Any], order: Positions, n: int) -> npt.NDArray[Any]:
    """Results in the order that was asked for; NaN, or 0, where an image could not be had."""
    whole = np.zeros((*values.shape[:-1], n), values.dtype)
    if values.dtype.kind == "f":
        whole[:] = np.nan
    whole[..., order] = values
    return whole


def images_of(
    config: Config, data: Mapping[str, Any], positions: Positions
) -> Iterator[tuple[Positions, torch.Tensor]]:
    """Images as they are scored, some at a time: which, and (k, channels, size, size) uint8."""
    size = config.evaluation.batch_size
    if config.data.mode == "memory":
        images = ray.get(data["images"])
        for start in range(0, len(positions), size):
            some = positions[start : start + size]
            yield some, torch.from_numpy(images[some])
        return
    from amint_ray.data.reading import plain_batches

    source, rows = ray.get([data["source"], data["rows"]])
    yield from plain_batches(source, rows, config.data, positions, size=size)


def _hashes(images: torch.Tensor) -> npt.NDArray[np.uint64]:
    digests = [
        hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in images.cpu().numpy()
    ]
    return np.frombuffer(b"".join(digests), np.uint64)


def keep(part: Part, work: Callable[[], Arrays]) -> dict[str, Any]:
    """Write down what a part comes to; of a training that diverges, why it does."""
    started = time.perf_counter()
    try:
        arrays = work()
    except FloatingPointError as error:
        arrays = {"failed": np.array(str(error))}
    seconds = time.perf_counter() - started
    buffer = io.BytesIO()
    np.savez(buffer, **{"seconds": np.array(seconds), **arrays})  # type: ignore[arg-type]
    with write_atomically(part.place, f"{part.name}.npz") as file:
        file.write(buffer.getvalue())
    failed = {"failed": str(arrays["failed"])} if "failed" in arrays else {}
    return {"seconds": seconds, **failed}
