"""`extends`: a configuration on top of others."""

from __future__ import annotations

from pathlib import Path

import pytest

from amint_ray.config.load import load_config
from amint_ray.contracts import UserError


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_own_keys_win_over_later_bases_over_earlier_ones(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "train: {epochs: 3, lr: 0.1}\nmint: {taps: [x, y, z]}\n")
    write(tmp_path, "b.yaml", "extends: digits\nname: other\ntrain: {lr: 0.2, seed: 5}\n")
    mine = write(
        tmp_path, "mine.yaml", "extends: [b.yaml, a.yaml]\ntrain: {seed: 7}\nmint: {taps: [q]}\n"
    )
    config = load_config(mine, ["train.batch_size=16"])
    assert config.name == "mine"  # not a base's
    assert (config.train.epochs, config.train.lr, config.train.seed) == (3, 0.1, 7)
    assert config.train.batch_size == 16
    assert config.mint.taps == ("q",)  # a list is replaced
    assert config.data.source == "digits"
    assert config.model == load_config("digits").model


def test_a_shipped_recipe_is_what_its_parts_say() -> None:
    vit, resnet = load_config("mnist_vit"), load_config("cifar10_resnet50")
    assert vit.model.options["img_size"] == vit.data.image_size == 28
    assert load_config("tiny_imagenet_vit").model.options["img_size"] == 64
    assert (vit.mint.head, resnet.mint.head, resnet.mint.pool) == ("tokens", "conv", None)
    assert (resnet.train.lr, resnet.loss.weighting) == (1e-4, "initial")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("extends: digts", "there is no recipe 'digts', did you mean 'digits'"),
        ("extends: nowhere.yaml", "there is no file"),
        ("extends: {a: 1}", "name a recipe, a file, or a list of them"),
        ("extends: 3", "name a recipe, a file, or a list of them"),
        ("extends:", "name a recipe, a file, or a list of them"),
        ("extends: [1]", "name a recipe, a file, or a list of them"),
        ("extends: mine.yaml", "in a circle; take one `extends` out"),
    ],
)
def test_a_wrong_base_is_told_in_one_line(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says) as refused:
        load_config(write(tmp_path, "mine.yaml", text))
    assert "\n" not in str(refused.value)


def test_a_circle_over_two_files_is_named(tmp_path: Path) -> None:
    mine = write(tmp_path, "mine.yaml", "extends: yours.yaml")
    write(tmp_path, "yours.yaml", "extends: mine.yaml")
    with pytest.raises(UserError, match=r"mine.yaml extends .*yours.yaml extends .*mine.yaml"):
        load_config(mine)
