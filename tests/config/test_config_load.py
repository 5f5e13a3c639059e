"""Loading: recipes, YAML files and overrides; every mistake is told in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from amint_ray.config.load import load_config, recipe_names, to_yaml
from amint_ray.config.schema import Config
from amint_ray.contracts import UserError


def refusal(recipe: str | Path, *overrides: str) -> str:
    """The one line that is said of a bad configuration."""
    with pytest.raises(UserError) as caught:
        load_config(str(recipe), overrides)
    text = str(caught.value)
    assert text.startswith("config: ")
    assert len(text.splitlines()) == 1, text
    return text


@pytest.mark.parametrize("recipe", recipe_names())
def test_recipe_loads_and_its_yaml_round_trips(recipe: str, tmp_path: Path) -> None:
    config = load_config(recipe, ["train.lr=1e-5", "data.limit=17", "tracking.experiment='é: #1'"])
    assert (config.name, config.train.lr, config.data.limit) == (recipe, 1e-5, 17)
    path = tmp_path / "whole.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    again = load_config(str(path))
    assert again == config
    assert again != load_config(recipe)


def test_yaml_round_trip_keeps_a_dollar_brace(tmp_path: Path) -> None:
    config = Config.model_validate({"storage": {"path": "runs/${USER}"}})
    path = tmp_path / "whole.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(str(path), ["name=custom"]) == config


def test_shipped_recipes_are_found() -> None:
    assert recipe_names() == sorted(recipe_names())
    assert {"digits", "cifar10_resnet50", "imagenet1k_vit_base"} <= set(recipe_names())


def test_file_with_overrides_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("train: {epochs: 3, lr: 0.5}\nmint: {taps: [a, b]}\n")
    config = load_config(str(path), ["train.epochs=4", "mint.taps=[c]", "train.epochs=5"])
    expected = Config().model_dump()
    expected["name"] = "mine"
    expected["train"] |= {"epochs": 5, "lr": 0.5}
    expected["mint"] |= {"taps": ("c",)}
    assert config.model_dump() == expected


def test_a_mapping_of_free_keys_takes_the_place_of_the_recipes() -> None:
    assert load_config("digits").model.options  # the recipe has some
    assert load_config("digits", ["model.options={}"]).model.options == {}
    overrides = ["model.options={patch_size: 2}", "model.options.depths=[1]"]
    assert load_config("digits", overrides).model.options == {"patch_size": 2, "depths": [1]}


def test_a_mapping_of_known_keys_leaves_the_others() -> None:
    shares = load_config("digits", ["data.shares={member: 0.10, external: 0.20}"]).data.shares
    before = load_config("digits").data.shares
    assert (shares.member, shares.external) == (0.1, 0.2)
    assert shares.test == before.test


def test_name_in_the_file_wins_over_the_file_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: other\n")
    assert load_config(str(path)).name == "other"


def test_int_is_good_for_a_float() -> None:
    config = load_config("digits", ["train.lr=1"])
    assert config.train.lr == 1.0
    assert isinstance(config.train.lr, float)


BAD_VALUES = {
    # wrong types
    "train.epochs=1.5": ("train.epochs = 1.5", "integer"),
    "train.epochs=abc": ("train.epochs = 'abc'", "integer"),
    "train.epochs=true": ("train.epochs = True", "integer"),
    "train.epochs=": ("train.epochs = None", "integer"),
    "train.lr='1e-3'": ("train.lr = '1e-3'", "number"),
    "train.lr=true": ("train.lr = True", "number"),
    "tracking.experiment=5": ("tracking.experiment = 5", "string"),
    "model.pretrained=1": ("model.pretrained = 1", "boolean"),
    "evaluation.fprs=0.1": ("evaluation.fprs = 0.1", "a list"),
    "train.optimizer_options=fast": ("train.optimizer_options = 'fast'", "mapping"),
    "data=5": ("data = 5", "mapping"),
    "train=null": ("train = None", "mapping"),
    # out of range
    "train.epochs=0": ("train.epochs = 0", "1"),
    "train.lr=0": ("train.lr = 0", "greater than 0"),
    "train.lr=.inf": ("train.lr = inf", "finite"),
    "data.shares.withheld=1.2": ("data.shares.withheld = 1.2", "less than or equal to 1"),
    "data.shares.withheld=-0.1": ("data.shares.withheld = -0.1", "greater than or equal to 0"),
    "data.split_seed=-1": ("data.split_seed = -1", "0"),
    "data.channels=2": ("data.channels = 2", "1 or 3"),
    "data.source=hub": ("data.source = 'hub'", "digits, folder, parquet, torchvision:MNIST"),
    "data.external.source=hub": ("data.external.source = 'hub'", "digits, folder"),
    "data.external.path=x": ("data.external.path", "needs data.external.source"),
    "data.augment_options={hflip: 0}": ("data.augment_options", "data.augment=timm"),
    "evaluation.fprs=[0.1,2]": ("evaluation.fprs.1 = 2", "less than 1"),
    "evaluation.fprs=[]": ("evaluation.fprs = []", "empty"),
    "mint.taps=[]": ("mint.taps = []", "empty"),
    "mint.views=both": ("mint.views = 'both'", "'plain' or 'task'"),
    "mint.inputs=logit": ("mint.inputs.0 = 'logit'", "'logits' or 'loss'"),
    "mint.inputs=[loss,labels]": ("mint.inputs.1 = 'labels'", "'logits' or 'loss'"),
    "mint.head=linear": ("mint.head = 'linear'", "'attention'", "'conv'", "'tokens'"),
    "data.augment=flip": ("data.augment = 'flip'", "'none', 'crop_flip' or 'timm'"),
    "loss.weighting=equal": ("loss.weighting = 'equal'", "'uncertainty'", "'gradnorm'"),
    "loss.ema_decay=1": ("loss.ema_decay = 1", "less than 1"),
    "train.schedule=linear": ("train.schedule = 'linear'", "'cosine'", "'tanh'"),
    "train.precision=half": ("train.precision = 'half'", "'bfloat16'", "'float16'"),
    "train.accumulate=0": ("train.accumulate = 0", "1"),
    "train.external_ratio=0": ("train.external_ratio = 0", "greater than 0"),
    "train.external_ratio=17": ("train.external_ratio = 17", "16"),
    "train.clip_grad=0": ("train.clip_grad = 0", "greater than 0"),
    "name=a.b": ("name = 'a.b'", "a name has letters from a to z, digits,"),
    "tracking.model_name=a/b": ("tracking.model_name = 'a/b'", "pattern"),
    # several values that do not go together
    "data.shares.member=0.5": ("data.shares", "1.34", "not to 1"),
    "mint.taps=[stages.1,stages.1]": ("mint.taps", "'stages.1'", "twice"),
    "mint.inputs=[loss,loss]": ("mint.inputs", "twice"),
    "model.options.num_classes=4": ("model.options", "'num_classes'", "leave it out"),
    "data.source=parquet": ("'parquet'", "data.path"),
    "data.path=somewhere": ("'digits'", "data.path"),
    # not an override at all
    "train.epochs": ("'train.epochs'", "key.path=value"),
    "=3": ("'=3'", "key.path=value"),
    "train.epochs=[1": ("override 'train.epochs=[1'",),
    "mint.taps.0=x": ("override 'mint.taps.0=x'",),
    "data.path=${nowhere}": ("'nowhere'", "not found"),
}


@pytest.mark.parametrize("override", BAD_VALUES)
def test_bad_value_names_key_and_value(override: str) -> None:
    text = refusal("digits", override)
    for part in BAD_VALUES[override]:
        assert part in text


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("mint.taps=[1]", "mint.taps.0 = 1"),
        ("evaluation.priors=[a]", "evaluation.priors.0 = 'a'"),
    ],
)
def test_only_bad_list_entry_is_told_once(override: str, part: str) -> None:
    assert part in refusal("digits", override)


@pytest.mark.parametrize(
    ("override", "key", "value", "nearest"),
    [
        ("train.epoch=3", "train.epoch", "3", "train.epochs"),
        ("epochs=3", "epochs", "3", "train.epochs"),
        ("lambda_mint=3", "lambda_mint", "3", "loss.lambda_mint"),
        ("data.shares.witheld=0.5", "data.shares.witheld", "0.5", "data.shares.withheld"),
        ("trian.epochs=3", "trian", "{'epochs': 3}", "train"),
        ("train.batchsize=x y", "train.batchsize", "'x y'", "train.batch_size"),
    ],
)
def test_unknown_key_names_the_nearest(override: str, key: str, value: str, nearest: str) -> None:
    text = refusal("digits", override)
    assert f"unknown key {key!r}" in text
    assert f"value {value}" in text
    assert f"did you mean {nearest!r}" in text


def test_unknown_key_lists_the_keys_there() -> None:
    text = refusal("digits", "loss.qqq=3")
    assert "lambda_task, lambda_mint, warmup_epochs, weighting, ema_decay" in text


def test_shares_must_add_up_to_one_and_hold_members() -> None:
    good = "{member: 0.5, withheld: 0.1, external: 0.2, calibration: 0.1, test: 0.1}"
    assert load_config("digits", [f"data.shares={good}"]).data.shares.member == 0.5
    assert "1.1, not to 1" in refusal("digits", f"data.shares={good.replace('0.2', '0.3')}")
    none = good.replace("0.5", "0").replace("0.2", "0.7")
    assert "member share is 0" in refusal("digits", f"data.shares={none}")


def test_mint_loss_needs_external_images() -> None:
    shares = "data.shares={member: 0.5, withheld: 0, external: 0, calibration: 0.25, test: 0.25}"
    text = refusal("digits", shares)
    assert "loss.lambda_mint" in text
    assert "data.shares.external" in text
    assert load_config("digits", [shares, "loss.lambda_mint=0"]).data.shares.external == 0


GRADNORM = "loss.weighting=gradnorm"


@pytest.mark.parametrize("switch", ["mint.detach", "train.compile"])
def test_gradnorm_needs_gradients_that_it_can_read(switch: str) -> None:
    text = refusal("digits", GRADNORM, f"{switch}=true")
    assert "loss.weighting=gradnorm" in text
    assert f"{switch}=true" in text
    load_config("digits", [GRADNORM])
    load_config("digits", [f"{switch}=true"])
    # Without a MINT loss nothing is balanced.
    load_config("digits", [GRADNORM, f"{switch}=true", "loss.lambda_mint=0"])


@pytest.mark.parametrize(
    ("override", "limit"),
    [
        ("train.warmup_epochs=7.5", "train.epochs=7"),
        ("loss.warmup_epochs=8", "train.epochs=7"),
        ("train.accumulate=11", "train.batch_size=10"),
    ],
)
def test_what_does_not_fit_into_the_run_is_refused(override: str, limit: str) -> None:
    text = refusal("digits", limit, override)
    for part in (override, limit):
        assert part.replace("=", " = ") in text


@pytest.mark.parametrize(
    "override",
    ["train.warmup_epochs=50", "loss.warmup_epochs=50", "train.accumulate=64"],
)
def test_the_largest_warm_up_and_accumulation_that_fit(override: str) -> None:
    load_config("digits", ["train.epochs=50", "train.batch_size=64", override])


@pytest.mark.parametrize(
    ("value", "taps"),
    [
        ("entry", ("entry",)),
        ("[entry]", ("entry",)),
        ("blocks.[37]", ("blocks.[37]",)),
        ("[stages.1,stages.2]", ("stages.1", "stages.2")),
        ("[output,'layer*']", ("output", "layer*")),
    ],
)
def test_taps_are_a_name_or_a_list(value: str, taps: tuple[str, ...]) -> None:
    config = load_config("digits", [f"mint.taps={value}"])
    assert config.mint.taps == taps
    assert Config.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("value", "inputs"),
    [("loss", ("loss",)), ("[logits,loss]", ("logits", "loss")), ("[]", ())],
)
def test_inputs_are_a_name_or_a_list(value: str, inputs: tuple[str, ...]) -> None:
    assert load_config("digits", [f"mint.inputs={value}"]).mint.inputs == inputs


def test_unknown_recipe_names_the_nearest_and_all() -> None:
    text = refusal("digit")
    assert "'digit'" in text
    assert "did you mean 'digits'" in text
    for name in recipe_names():
        assert name in text


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "list": (b"- a\n- b\n", "no mapping; write `key: value` lines"),
    "word": (b"hello\n", "no mapping"),
    "text": (b"'two words'\n", "no mapping"),
    "number": (b"3\n", "no mapping"),
    "false": (b"false\n", "no mapping"),
    "bracket": (b"train:\n  epochs: [1\nname: x\n", "line 3"),
    "tab": (b"train:\n\tepochs: 3\n", "line 2"),
    "twice": (b"name: a\ndata: {}\nname: b\n", "line 3"),
    "colon": (b"name: b: c\n", "line 1"),
    "object": (b"name: !!python/object:os.system x\n", "line 1"),
    "documents": (b"name: a\n---\nname: b\n", "line 2"),
    "binary": (b"\xff\xfe\x00", "cannot be read as text (it is not UTF-8); name a YAML"),
    "nul": (b"name: a\0b\n", "not valid YAML"),
}


@pytest.mark.parametrize(
    "name",
    list(BAD_FILES),
)
def test_bad_file_is_named_with_its_line(name: str, tmp_path: Path) -> None:
    content, part = BAD_FILES[name]
    path = tmp_path / f"{name}.yaml"
    path.write_bytes(content)
    text = refusal(path)
    assert str(path) in text
    assert part in text


def test_impossible_date_is_an_ordinary_bad_value(tmp_path: Path) -> None:
    path = tmp_path / "dated.yaml"
    path.write_text("train: {epochs: 2020-99-99}\n")
    assert "train.epochs = '2020-99-99'" in refusal(path)


@pytest.mark.parametrize("content", ["", "# only a comment\n", "---\n", "{}\n"])
def test_empty_file_means_the_defaults(content: str, tmp_path: Path) -> None:
    path = tmp_path / "custom.yaml"
    path.write_text(content)
    assert load_config(str(path)) == Config()


def test_missing_file_and_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder.yaml"
    folder.mkdir()
    for path in (tmp_path / "missing.yaml", folder, tmp_path):
        assert str(path) in refusal(path)
