"""What is kept of a model's answers: against each image alone, looked at by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from training_setup import (
    CONVNEXT,
    COUNTS,
    RESNET,
    VIT,
    Backbone,
    architecture_of,
    config_of,
    data_set,
    streams_of,
)

from amint_ray.contracts import Role
from amint_ray.data.transforms import to_model_input
from amint_ray.evaluation.reference import (
    TAP_FEATURES,
    Reference,
    draw_projection,
    read_reference,
    write_reference,
)
from amint_ray.model.joint import AuditedModel, plan_architecture
from amint_ray.train.loop import LocalContext
from amint_ray.train.reference import take_reference

BACKBONES = pytest.mark.parametrize(
    "backbone", [VIT, CONVNEXT, RESNET], ids=lambda b: b[0].backbone
)


def model_of(backbone: Backbone) -> AuditedModel:
    torch.manual_seed(3)
    return AuditedModel(architecture_of(config_of(backbone)))


def take(
    model: AuditedModel, folder: Path, backbone: Backbone = VIT, *, most: int = 2000, lost: str = ""
) -> Reference:
    found = take_reference(
        model,
        streams_of(config_of(backbone)),
        LocalContext(folder),
        most=most,
        head_trained=True,
        lost=[lost] if lost else [],
    )
    assert found is not None
    return found


@BACKBONES
def test_rows_are_what_the_model_says_of_each_image(backbone: Backbone, tmp_path: Path) -> None:
    config, model = config_of(backbone), model_of(backbone)
    model.train()
    found = take(model, tmp_path, backbone)
    assert model.training
    model.eval()
    images, manifest = data_set()
    wanted = ("calibration", "member", "withheld")
    rows = [i for i in np.argsort(manifest.sample_id) if manifest.role[i] in wanted]
    assert found.role.tolist() == manifest.role[rows].tolist()
    assert found.label.tolist() == manifest.label[rows].tolist()
    for place, row in enumerate(rows[:7]):
        image = torch.from_numpy(images[row : row + 1])
        moved = [
            image,
            image.flip(3),
            torch.cat([image[..., :1], image[..., :-1]], 3),
            torch.cat([image[..., 1:], image[..., -1:]], 3),
            torch.cat([image[..., :1, :], image[..., :-1, :]], 2),
            torch.cat([image[..., 1:, :], image[..., -1:, :]], 2),
        ]
        label = int(manifest.label[row])
        for number, pixels in enumerate(moved):
            with torch.no_grad(), model.leaving_means() as means:
                logits, membership = model(to_model_input([pixels], config.data))
            p = logits[0].double().softmax(0)
            phi = torch.log(p) - torch.log1p(-p)
            told, untold = found.told, found.untold
            assert told.label_confidence[number, place] == pytest.approx(
                float(phi[label]), abs=1e-3
            )
            assert untold.label_confidence[number, place] == pytest.approx(
                float(phi[p.argmax()]), abs=1e-3
            )
            assert told.top_confidence[number, place] == pytest.approx(float(p.max()), abs=1e-4)
            assert told.right[number, place] == float(p.argmax() == label)
            assert untold.right[number, place] == 0
            if number == 0:
                assert found.prediction[place] == int(p.argmax())
                assert found.mint_logit[place] == pytest.approx(float(membership), abs=1e-4)
                expected = means[0][0].numpy() @ found.projection
                np.testing.assert_allclose(found.taps[place], expected, rtol=1e-3, atol=1e-4)


@BACKBONES
def test_means_and_membership_are_those_of_a_whole_pass(backbone: Backbone) -> None:
    model = model_of(backbone).train()
    images = torch.randn(5, 3, 16, 16)
    maps: dict[str, torch.Tensor] = {}
    for tap in model.architecture.taps:
        model.backbone.get_submodule(tap.name).register_forward_hook(
            lambda module, args, output, name=tap.name: maps.update({name: output})
        )
    with model.leaving_means() as means:
        alone = model.membership(images)
    assert model.training and model.backbone.training
    model.eval()
    with torch.no_grad(), model.leaving_means() as whole:
        _, membership = model(images)
    torch.testing.assert_close(alone, membership)
    torch.testing.assert_close(means[0], whole[0])
    by_hand = []
    for tap in model.architecture.taps:
        if tap.layout == "NLC":
            by_hand.append(maps[tap.name][:, tap.prefix :].mean(1))
        else:
            by_hand.append(maps[tap.name].mean((2, 3)))
    torch.testing.assert_close(means[0], torch.cat(by_hand, 1))


def test_nothing_behind_the_last_tap_is_run_for_membership_alone() -> None:
    model = model_of(VIT)
    ran = []
    for name in ("blocks.0", "blocks.3"):  # the last tap is blocks.2
        module = model.backbone.get_submodule(name)
        module.register_forward_hook(lambda m, args, output, name=name: ran.append(name))
    model.membership(torch.randn(2, 3, 16, 16))
    assert ran == ["blocks.0"]


def test_what_was_lost_is_left_out_and_no_role_has_more_than_asked_for(tmp_path: Path) -> None:
    model = model_of(VIT)
    whole, some = take(model, tmp_path), take(model, tmp_path, most=10)
    assert {role: int((whole.role == role).sum()) for role in set(whole.role.tolist())} == {
        role.value: COUNTS[role] for role in (Role.CALIBRATION, Role.MEMBER, Role.WITHHELD)
    }
    assert int((some.role == "member").sum()) == int((some.role == "calibration").sum()) == 10
    _, manifest = data_set()
    first = min(manifest.sample_id[manifest.role == "member"].tolist())
    fewer = take(model, tmp_path, lost=first)
    assert len(fewer) == len(whole) - 1
    gone = [row for row in whole.mint_logit if row not in fewer.mint_logit]
    assert gone == [whole.of(Role.MEMBER).mint_logit[0]]


def test_a_task_of_one_class_has_no_reference(tmp_path: Path) -> None:
    config = config_of(VIT)
    model = AuditedModel(plan_architecture(config, 1))
    context = LocalContext(tmp_path)
    assert take_reference(model, streams_of(config), context, most=5, head_trained=True) is None


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    model = model_of(CONVNEXT)
    written = take(model, tmp_path, CONVNEXT)
    write_reference(written, tmp_path / "r.safetensors")
    read = read_reference(tmp_path / "r.safetensors")
    for name in ("role", "label", "prediction", "mint_logit", "taps", "projection"):
        np.testing.assert_array_equal(getattr(read, name), getattr(written, name))
    for which in ("told", "untold"):
        for name, values in vars(getattr(written, which)).items():
            np.testing.assert_array_equal(getattr(getattr(read, which), name), values)


def _shorter(columns: dict[str, np.ndarray]) -> None:
    columns["label"] = columns["label"][1:]


def _without(columns: dict[str, np.ndarray]) -> None:
    del columns["taps"]


def _unknown_role(columns: dict[str, np.ndarray]) -> None:
    columns["role"][0] = 9


@pytest.mark.parametrize("damage", [_shorter, _without, _unknown_role])
def test_another_file_is_told(tmp_path: Path, damage: object) -> None:
    write_reference(take(model_of(VIT), tmp_path), tmp_path / "r.safetensors")
    columns = load_file(tmp_path / "r.safetensors")
    damage(columns)  # type: ignore[operator]
    save_file(columns, tmp_path / "r.safetensors")
    with pytest.raises(ValueError, match=r"r\.safetensors holds no reference"):
        read_reference(tmp_path / "r.safetensors")


def test_projection_keeps_distances_about() -> None:
    assert np.array_equal(draw_projection(TAP_FEATURES), np.eye(TAP_FEATURES))
    x = np.random.default_rng(1).standard_normal((200, 700))
    ratio = np.linalg.norm(x @ draw_projection(700), axis=1) / np.linalg.norm(x, axis=1)
    assert ratio.mean() == pytest.approx(1, abs=3 / math.sqrt(2 * TAP_FEATURES))
