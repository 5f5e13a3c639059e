"""`amint taps`: what it prints, and how it takes mistakes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from amint_ray.cli import main


def document(capfd: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The one JSON document on stdout."""
    assert main(["taps", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capfd.readouterr().out)
    return found


def test_json_of_a_cnn_at_its_own_size(capfd: pytest.CaptureFixture[str]) -> None:
    found = document(capfd, "resnet18")
    assert found["input_shape"] == [3, 224, 224]
    modules = {module["name"]: module for module in found["modules"]}
    assert {"layer1", "layer1.0", "layer2", "layer3", "layer4"} <= modules.keys()
    assert "layer1.0.conv1" not in modules
    assert modules["layer3"]["shape"] == [256, 14, 14]
    assert modules["layer3"]["layout"] == "NCHW"
    assert modules["layer3"]["placements"] == ["middle", "output"]
    depths = [module["depth"] for module in found["modules"]]
    assert depths == sorted(depths)
    assert found["placements"]["output"]["taps"] == ["layer3", "layer4"]
    for placement in found["placements"].values():
        deepest = modules[placement["taps"][-1]]["depth"]
        assert placement["early_exit"]
        # The stem's first convolution needs no gradient of its input, and the head costs something.
        assert placement["flop_ratio"] == pytest.approx(1 + deepest, abs=0.05)


def test_options_size_and_all_modules_of_a_vit(capfd: pytest.CaptureFixture[str]) -> None:
    options = "model.options={img_size: 32, patch_size: 8, embed_dim: 32, depth: 4, num_heads: 2}"
    few = document(capfd, "vit_tiny_patch16_224", options)
    assert few["input_shape"] == [3, 32, 32]
    assert [module["name"] for module in few["modules"]] == [f"blocks.{i}" for i in range(4)]
    assert all(module["shape"] == [17, 32] for module in few["modules"])
    assert all(module["prefix_tokens"] == 1 for module in few["modules"])
    every = document(capfd, "vit_tiny_patch16_224", options, "--all")
    assert {"blocks.0.mlp.fc1", "norm"} <= {module["name"] for module in every["modules"]}
    nested = document(capfd, "resnet18", "data={image_size: 64}", "train.external_ratio=0.25")
    assert nested["input_shape"] == [3, 64, 64]
    assert nested["placements"]["output"]["flop_ratio"] == pytest.approx(1.25, abs=0.02)
    recipe = document(capfd, "mnist_vit")
    assert recipe["input_shape"] == [1, 28, 28]
    assert recipe["backbone"] == "vit_tiny_patch16_224"
    gray = document(capfd, "resnet18", "data.image_size=64", "data.channels=1")
    assert gray["input_shape"] == [1, 64, 64]


def test_the_table_names_modules_and_placements(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["taps", "resnet18", "data.image_size=32"]) == 0
    out = capfd.readouterr().out
    row = next(line for line in out.splitlines() if "│ layer2 " in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        *("layer2", "Sequential", "128×4×4", "NCHW"),
        *(row.split("│")[5].strip(), "entry, middle"),
    ]
    assert "output  layer3, layer4: E leaves there" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["resnt18"], "near names: resnet18"),
        (["resnet18", "data.image_sise=32"], "did you mean 'data.image_size'"),
        (["resnet18", "mint.taps=entry"], "shows all placements"),
        (["resnet18", "32"], "not of the form key.path=value"),
        (["vit_tiny_patch16_224", "data.image_size=50"], "the backbone cannot take such images"),
        (["resnet18", "model.options.depth=3"], "timm cannot build"),
        (["vit_tiny_patch16_224", "model.options.global_pool=''"], "gives no class logits"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["taps", *arguments]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert says in captured.err
