"""What a part of an attack keeps, without Ray: it gets its images and its training from here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch

from amint_ray.attacks.evidence import EDITS, PLAIN
from amint_ray.config.load import load_config
from amint_ray.contracts import RunError
from amint_ray.data.edits import edited
from amint_ray.data.transforms import to_model_input
from amint_ray.evaluation.outputs import outputs_of
from amint_ray.evaluation.views import VIEWS, view
from amint_ray.launch import attack_worker
from amint_ray.launch.attack_parts import read_part
from amint_ray.launch.attack_worker import Look, Part, look, train_and_look, train_head_and_look
from amint_ray.model.joint import AuditedModel, plan_architecture
from amint_ray.storage import locate

CONFIG = load_config("digits", ["evaluation.batch_size=5", "data.mode=memory"])
N = 14
IMAGES = np.random.default_rng(0).integers(0, 256, (N, 1, 8, 8), dtype=np.uint8)
IMAGES[9] = IMAGES[2]
LABELS = np.arange(N) % 10
POSITIONS = np.array([12, 2, 9, 0, 5, 7, 3])
WANTED = Look(POSITIONS, np.where(POSITIONS == 7, -1, LABELS[POSITIONS]), (PLAIN, *EDITS), VIEWS)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", lambda what: what)
    monkeypatch.setattr(ray, "get_gpu_ids", list)


@pytest.fixture(scope="module")
def model() -> AuditedModel:
    torch.manual_seed(0)
    return AuditedModel(plan_architecture(CONFIG, num_classes=10)).eval()


def part(folder: Path, **changes: Any) -> Part:
    return Part(name="joint-000", place=locate(str(folder), "test"), config=CONFIG, **changes)


def test_each_image_is_shown_in_all_edits_and_views_in_the_order_asked_for(
    model: AuditedModel,
) -> None:
    found = look(model, WANTED, CONFIG, {"images": IMAGES}, CPU)
    images = torch.from_numpy(IMAGES[POSITIONS])
    for edit in WANTED.edits:
        for number in range(VIEWS):
            shown = to_model_input([view(edited(images, edit), number)], CONFIG.data)
            with torch.inference_mode():
                logits, mint = model(shown, labels=torch.from_numpy(WANTED.labels).clamp(min=0))
            expected = outputs_of(logits.double().numpy(), WANTED.labels)
            for field, values in vars(expected).items():
                np.testing.assert_allclose(
                    found[f"{edit}/{field}"][number], values[0], atol=2e-4, err_msg=field
                )
            if number == 0:
                np.testing.assert_allclose(found[f"mint/{edit}"], mint, atol=2e-4)
    pixels = found[f"pixels/{PLAIN}"]
    assert pixels[1] == pixels[2] and len(set(pixels.tolist())) == len(POSITIONS) - 1
    assert (found["pixels/jpeg_50"] != pixels).all()


def test_what_could_not_be_had_is_not_a_number(
    model: AuditedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = look(model, WANTED, CONFIG, {"images": IMAGES}, CPU)
    there = [0, 2, 3, 6]

    def some(*_: object) -> list[tuple[np.ndarray, torch.Tensor]]:
        """Of two batches, one in another order than asked for."""
        batches = [POSITIONS[there[:2]][::-1].copy(), POSITIONS[there[2:]]]
        return [(chosen, torch.from_numpy(IMAGES[chosen])) for chosen in batches]

    monkeypatch.setattr(attack_worker, "images_of", some)
    found = look(model, WANTED, CONFIG, {}, CPU)
    gone = np.setdiff1d(np.arange(len(POSITIONS)), there)
    for name, values in found.items():
        np.testing.assert_allclose(values[..., there], whole[name][..., there], atol=2e-4)
        assert (
            (values[..., gone] == 0).all()
            if name.startswith("pixels")
            else np.isnan(values[..., gone]).all()
        )
    monkeypatch.setattr(attack_worker, "images_of", lambda *_: [])
    with pytest.raises(RunError, match="none of the images that the attack needs can be read"):
        look(model, WANTED, CONFIG, {}, CPU)


class Trained:
    """In the place of training and streams; tells whether these were closed."""

    def __init__(self, patch: pytest.MonkeyPatch, model: AuditedModel | None) -> None:
        self.closed = 0
        self._model = model
        for name in ("train", "train_head"):
            patch.setattr(attack_worker, name, self.train)
        patch.setattr(attack_worker, "Sender", lambda name: None)
        patch.setattr(attack_worker, "open_streams", lambda *_, **__: self)

    def train(self, *_: object, **__: object) -> Any:
        if self._model is None:
            raise FloatingPointError("epoch 2, step 9: the task's loss is nan")
        return SimpleNamespace(model=self._model)

    def close(self) -> None:
        self.closed += 1


def test_of_a_shadow_one_number_an_image_and_edit_is_kept(
    tmp_path: Path, model: AuditedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = Trained(monkeypatch, model)
    shadow = part(tmp_path, roles=np.zeros(N, np.uint8), epochs=3)
    told = train_and_look(shadow, WANTED, "a", {"images": IMAGES}, (model.architecture, None))
    kept = read_part(shadow)
    assert kept.keys() == {"seconds", *(f"{edit}/label_confidence" for edit in WANTED.edits)}
    assert told == {"seconds": float(kept["seconds"])}
    assert streams.closed == 1
    twin = part(tmp_path, epochs=3)
    train_and_look(twin, WANTED, "a", {"images": IMAGES}, (model.architecture, None))
    assert f"{PLAIN}/entropy" in read_part(twin)


@pytest.mark.parametrize("function", [train_and_look, train_head_and_look])
def test_a_training_that_diverges_says_why_and_is_done(
    tmp_path: Path, model: AuditedModel, monkeypatch: pytest.MonkeyPatch, function: Any
) -> None:
    streams = Trained(monkeypatch, None)
    weights = (model.architecture, model.state_dict())
    told = function(part(tmp_path, epochs=3), WANTED, "a", {"images": IMAGES}, weights)
    assert told["failed"] == "epoch 2, step 9: the task's loss is nan"
    kept = read_part(part(tmp_path))
    assert kept.keys() == {"seconds", "failed"} and str(kept["failed"]) == told["failed"]
    assert streams.closed == 1
