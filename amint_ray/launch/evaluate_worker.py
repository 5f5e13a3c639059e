"""What Ray runs for an evaluation beside an attack's own parts: looks at images, a file each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import ray
import torch
from PIL import Image

from amint_ray.contracts import ScoreBatch
from amint_ray.data.images import perceptual_hash
from amint_ray.data.strangers import strange
from amint_ray.data.transforms import to_model_input
from amint_ray.evaluation.scores import CODE_COLUMNS, score
from amint_ray.launch.attack_worker import Arrays, Look, Part, images_of, keep, loaded
from amint_ray.model.joint import AuditedModel

GIVEN = "given"
"""Images that the user gave, among the kinds of strangers."""


def score_again(
    part: Part, looked_at: Look, name: str, data: Mapping[str, Any], model: Any
) -> dict[str, Any]:
    """Score samples as the run did at its end.

    Args:
        part: names the file.
        looked_at: which samples.
        name: not used.
        data: references for `attack_worker.images_of`.
        model: (architecture, weights).

    Returns:
        `seconds`. The file has `position`, and the columns of a `ScoreTable` that a model fills.
    """
    device = _device()
    place = {position: i for i, position in enumerate(looked_at.positions.tolist())}

    codes = ray.get(data["codes"])[:, : part.config.mint.keyed.bits] if "codes" in data else None

    def batches() -> Iterator[ScoreBatch]:
        for positions, images in images_of(part.config, data, looked_at.positions):
            rows = [place[position] for position in positions.tolist()]
            yield ScoreBatch(
                images=to_model_input([images], part.config.data),
                labels=torch.from_numpy(looked_at.labels[rows]),
                sample_id=positions.astype(np.str_),
                role=np.full(len(positions), ""),
                code=None if codes is None else codes[positions],
            )

    def work() -> Arrays:
        table = score(loaded(model, device), batches(), device)
        return {
            "position": table.sample_id.astype(np.int64),
            "label": table.label,
            "prediction": table.prediction,
            "task_loss": table.task_loss,
            "mint_logit": table.mint_logit,
            **{name: getattr(table, name) for name in CODE_COLUMNS if table.code_p is not None},
        }

    return keep(part, work)


def look_at_strangers(
    part: Part, looked_at: Look, name: str, data: Mapping[str, Any], model: Any
) -> dict[str, Any]:
    """Keep the MINT head's logits of images that are unlike those the model knows.

    Args:
        part: names the file.
        looked_at: which samples they are made of; its `edits` are the kinds, of which `GIVEN` are
            images that are taken as they are.
        name: not used.
        data: references for `images_of`, and `strangers` to the images that were given.
        model: (architecture, weights).

    Returns:
        `seconds`. The file has the logits by kind.
    """
    device = _device()
    size = part.config.evaluation.batch_size

    def shown(kind: str) -> Iterator[torch.Tensor]:
        if kind == GIVEN:
            yield from torch.split(torch.from_numpy(ray.get(data["strangers"])), size)
            return
        for number, (_, images) in enumerate(images_of(part.config, data, looked_at.positions)):
            yield strange(images, kind, seed=number)

    def work() -> Arrays:
        asked = loaded(model, device).eval()
        return {
            kind: np.concatenate(
                [
                    _logits(asked, to_model_input([images.to(device)], part.config.data))
                    for images in shown(kind)
                ]
            )
            for kind in looked_at.edits
        }

    return keep(part, work)


def hash_images(
    part: Part, looked_at: Look, name: str, data: Mapping[str, Any], model: Any
) -> dict[str, Any]:
    """Keep perceptual hashes of samples as the model is shown them.

    Args:
        part: names the file.
        looked_at: which samples.
        name: not used.
        data: references for `images_of`.
        model: not used.

    Returns:
        `seconds`. The file has `position` and `hash`; what could not be read is missing.
    """

    def work() -> Arrays:
        positions, hashes = [], []
        for some, images in images_of(part.config, data, looked_at.positions):
            positions += some.tolist()
            for image in images.numpy():
                grey = image.shape[0] == 1
                pixels = image[0] if grey else image.transpose(1, 2, 0)
                hashes.append(perceptual_hash(Image.fromarray(pixels)))
        return {"position": np.array(positions, np.int64), "hash": np.array(hashes, np.int64)}

    return keep(part, work)


@torch.inference_mode()
def _logits(model: AuditedModel, batch: torch.Tensor) -> Any:
    """(n,) float64; a head that reads the task loss is told what the model itself predicts."""
    labels = torch.zeros(len(batch), dtype=torch.int64, device=batch.device)
    logits, membership = model(batch, labels=labels)
    if "loss" in model.architecture.head.inputs:
        _, membership = model(batch, labels=logits.argmax(1))
    return model.parted(membership)[0].double().cpu().numpy()


def _device() -> torch.device:
    return torch.device("cuda" if ray.get_gpu_ids() else "cpu")
