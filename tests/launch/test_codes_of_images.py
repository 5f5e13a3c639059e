"""What codes are made of: the same content however the images are read, and what it survives."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from amint_ray.config.data_schema import Data
from amint_ray.config.load import (
    fingerprint,
    load_config,
    load_run,
    to_yaml,
    training_fingerprint,
)
from amint_ray.config.search import load_search
from amint_ray.contracts import UserError
from amint_ray.data.images import decode, perceptual_hash
from amint_ray.data.index import index_here
from amint_ray.data.index_folder import IndexFolder
from amint_ray.data.keys import image_content, key_fingerprint, new_key, write_key
from amint_ray.data.memory import load_memory
from amint_ray.data.sources import open_source
from amint_ray.data.transforms import Views
from amint_ray.launch.codes import codes_of, keyless, with_key
from amint_ray.launch.dataset import Dataset
from amint_ray.launch.search_plan import with_its_key
from amint_ray.storage import locate


def photograph(seed: int) -> Image.Image:
    """Smooth shapes and edges, as a camera sees them, 96×80."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:80, 0:96] / 80
    channels = []
    for _ in range(3):
        waves = sum(
            rng.normal() * np.sin(2 * np.pi * (rng.uniform(0, 3) * x + rng.uniform(0, 3) * y))
            for _ in range(6)
        )
        disc = ((x - rng.uniform(0, 1)) ** 2 + (y - rng.uniform(0, 1)) ** 2) < 0.06
        channels.append(waves + 2 * rng.normal() * disc)
    pixels = np.stack(channels, axis=2)
    pixels = 255 * (pixels - pixels.min()) / np.ptp(pixels)
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return decode(buffer.getvalue(), max_megapixels=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(12):
        place = tmp_path / "images" / f"class{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        photograph(i).save(place / f"{i:02d}.png")
    return tmp_path / "images"


def of_folder(folder: Path, **more: object) -> Data:
    return Data.model_validate(
        {"source": "folder", "path": str(folder), "image_size": 24, "crop_pct": 0.9, **more}
    )


@pytest.mark.parametrize("hashes", ["content", "perceptual"])
def test_images_read_once_or_anew_have_the_same_contents(
    folder: Path, tmp_path: Path, hashes: str
) -> None:
    config = load_config(None, [f"mint.keyed.code_from={hashes}", "mint.objective=keyed"])
    key = tmp_path / "key"
    write_key(key, new_key())
    data = of_folder(folder)
    mint = config.mint.model_copy(update={"key_file": str(key)})
    config = with_key(config.model_copy(update={"data": data, "mint": mint}))
    source = open_source(data)
    images, index = load_memory(source, data, readers=1, hashes=hashes)  # type: ignore[arg-type]
    kept = IndexFolder(locate(str(tmp_path / "runs"), "x"), source, data, hashes)  # type: ignore[arg-type]
    for chunk in kept.missing():
        kept.write(chunk, source, data)
    streamed = kept.read(source, data)
    held = codes_of(config, Dataset(source, index, images))
    key.write_text(new_key().hex())  # the key that was checked is the run's
    anew = codes_of(config, Dataset(source, streamed, None))
    assert held is not None and anew is not None
    assert held.shape == (12, 64)
    assert np.array_equal(held, anew)
    assert len({row.tobytes() for row in held}) == 12


def test_a_code_knows_no_label(tmp_path: Path) -> None:
    """One image in two classes is one content, with one code and one role."""
    picture = photograph(1)
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        picture.save(tmp_path / "data" / name / "same.png")
        photograph(2 + len(name) + (name == "dog")).save(tmp_path / "data" / name / "own.png")
    write_key(tmp_path / "key", new_key())
    data = of_folder(tmp_path / "data")
    settings = ["mint.objective=keyed", f"mint.key_file={tmp_path / 'key'}"]
    config = with_key(load_config(None, settings).model_copy(update={"data": data}))
    source = open_source(data)
    images, index = load_memory(source, data, readers=1)
    held = codes_of(config, Dataset(source, index, images))
    same = [name.endswith("same.png") for name in index.manifest.sample_id.tolist()]
    assert held is not None and sum(same) == 2
    assert len(np.unique(held[same], axis=0)) == 1
    assert len(set(index.manifest.role[same].tolist())) == 1
    assert len(set(index.manifest.label[same].tolist())) == 2
    assert len(np.unique(held, axis=0)) == 3


def test_an_index_for_roles_alone_is_not_taken_for_codes(folder: Path, tmp_path: Path) -> None:
    data, runs = of_folder(folder), locate(str(tmp_path / "runs"), "x")
    source = open_source(data)
    places = {IndexFolder(runs, source, data).location.path}
    places |= {IndexFolder(runs, source, data, hashes).location.path for hashes in _HASHES}
    other_size = data.model_copy(update={"image_size": 32})
    places |= {IndexFolder(runs, source, other_size, "content").location.path}
    assert len(places) == 4
    assert index_here(source, data, readers=1).scored is None


_HASHES = ("content", "perceptual")

HANDLED: dict[str, Callable[[Image.Image], Image.Image]] = {
    "PNG": lambda image: encoded(image, "PNG"),
    "WebP without loss": lambda image: encoded(image, "WEBP", lossless=1),
    "JPEG 90": lambda image: encoded(image, "JPEG", quality=90),
    "JPEG 75": lambda image: encoded(image, "JPEG", quality=75),
    "JPEG 50": lambda image: encoded(image, "JPEG", quality=50),
    "JPEG to PNG": lambda image: encoded(encoded(image, "JPEG", quality=90), "PNG"),
    "0.9 and back": lambda image: image.resize((86, 72), Image.Resampling.BICUBIC).resize(
        image.size, Image.Resampling.BICUBIC
    ),
    "shift": lambda image: image.transform(image.size, Image.Transform.AFFINE, (1, 0, 1, 0, 1, 0)),
    "crop": lambda image: image.crop((10, 8, 86, 72)).resize(image.size),
    "flip": ImageOps.mirror,
    "brightness": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
}
SURVIVE = {
    "content": {"PNG": 1.0, "WebP without loss": 1.0},
    # Shares of the pictures at least; what is not named has nearly none.
    "perceptual": {
        "PNG": 1.0,
        "WebP without loss": 1.0,
        "JPEG 90": 0.8,
        "JPEG 75": 0.7,
        "JPEG 50": 0.5,
        "JPEG to PNG": 0.8,
        "0.9 and back": 0.8,
        "brightness": 0.5,
        "shift": 0.02,
    },
}


def survivors(content: str, handling: str, pictures: int) -> float:
    """Share of pictures whose content is what it was before."""
    views = Views(Data.model_validate({"image_size": 24}))

    def of(image: Image.Image) -> object:
        if content == "perceptual":
            return perceptual_hash(image)
        return image_content(views.plain(image).numpy())

    kept = [of(each) == of(HANDLED[handling](each)) for each in map(photograph, range(pictures))]
    return float(np.mean(kept))


@pytest.mark.parametrize("handling", HANDLED)
@pytest.mark.parametrize("content", _HASHES)
def test_what_a_content_survives(content: str, handling: str) -> None:
    share, least = survivors(content, handling, 60), SURVIVE[content].get(handling)
    if least is None:
        assert share <= 0.1
    else:
        assert share >= least


def test_the_key_belongs_to_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, other = new_key(), new_key()
    write_key(tmp_path / "key", key)
    settings = ["mint.objective=keyed", f"mint.key_file={tmp_path / 'key'}"]
    config = with_key(load_config("digits", settings))
    assert config.mint.keyed.fingerprint == key_fingerprint(key)
    assert key.hex() not in config.model_dump_json()
    wanted = f"mint.keyed.fingerprint={key_fingerprint(other)}"
    with pytest.raises(UserError, match=r"mint\.key_file.*fingerprint.*mint\.keyed\.fingerprint"):
        with_key(load_config("digits", [*settings, wanted]))
    with pytest.raises(UserError, match="no key is given"):
        with_key(load_config("digits", ["mint.objective=both"]))
    monkeypatch.setenv("AUDIT_KEY", other.hex())
    by_name = load_config("digits", ["mint.objective=both", "mint.key_env=AUDIT_KEY"])
    assert with_key(by_name).mint.keyed.fingerprint == key_fingerprint(other)
    # Processes that are started from here on do not inherit it, and this one still has it.
    assert "AUDIT_KEY" not in os.environ
    assert with_key(by_name).mint.keyed.fingerprint == key_fingerprint(other)
    assert training_fingerprint(with_key(by_name)) != training_fingerprint(config)
    (tmp_path / "moved").write_text((tmp_path / "key").read_text())
    moved = load_config("digits", [settings[0], f"mint.key_file={tmp_path / 'moved'}"])
    assert training_fingerprint(with_key(moved)) == training_fingerprint(config)
    assert fingerprint(with_key(moved)) == fingerprint(config)
    another = load_config("digits", [settings[0], "mint.key_env=AUDIT_KEY"])
    assert training_fingerprint(with_key(another)) != training_fingerprint(config)
    assert fingerprint(with_key(another)) != fingerprint(config)
    plain = load_config("digits", [*settings, "loss.lambda_mint=0"])
    assert with_key(plain).mint.keyed.fingerprint == key_fingerprint(key)
    assert not plain.uses_key
    assert with_key(load_config("digits")).mint.keyed.fingerprint is None


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["mint.objective=keyed", "mint.keyed.bits=0"], r"mint\.keyed\.bits"),
        (["mint.objective=keyed", "mint.keyed.bits=1000"], r"mint\.keyed\.bits"),
        (["mint.objective=secret"], r"mint\.objective"),
        (["mint.key_file=a", "mint.key_env=B"], "give one of them"),
        (["mint.objective=keyed", "mint.keyed.head=fixed", "mint.detach=true"], "no parameters"),
        (["mint.objective=keyed", "mint.keyed.head=fixed", "mint.inputs=[logits]"], "features"),
        (["mint.objective=both", "mint.keyed.head=fixed", "loss.weighting=gradnorm"], "last tap"),
        (["mint.objective=both", "data.shares.external=0", "data.shares.member=0.3"], "keyed"),
    ],
)
def test_what_does_not_fit_is_said(settings: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        load_config("digits", settings)


def test_a_run_names_no_key_that_it_would_not_use() -> None:
    """A search may: some of its trials use it."""
    named = ["mint.key_file=there"]
    with pytest.raises(UserError, match=r"mint\.key_file names a key.*mint\.objective=keyed"):
        load_run("digits", named)
    with pytest.raises(UserError, match=r"mint\.key_env names a key"):
        load_run("digits", ["mint.key_env=KEY"])
    assert not load_config("digits", named).mint.coded
    for objective in ("keyed", "both"):
        assert load_run("digits", [*named, f"mint.objective={objective}"]).mint.coded


def test_a_keyed_head_gives_the_share_of_e_to_members() -> None:
    binary, keyed = load_config("digits"), load_config("digits", ["mint.objective=keyed"])
    before, after = binary.data.shares, keyed.data.shares
    assert (after.external, after.member) == (0, pytest.approx(before.member + before.external))
    assert (after.withheld, after.calibration, after.test) == (
        before.withheld,
        before.calibration,
        before.test,
    )
    told = ["data.shares.member=0.2", "data.shares.external=0.1"]
    kept = load_config("digits", ["mint.objective=keyed", *told]).data.shares
    assert (kept.member, kept.external) == (0.2, 0.1)
    assert load_config("digits", ["mint.objective=both"]).data.shares == before


def test_a_keyed_head_is_weighed_less_than_a_recipes_binary_one() -> None:
    for recipe, settings, weight in (
        ("cifar10_resnet50", [], 0.3),
        ("digits", [], 0.03),  # the recipe's own is less
        ("cifar10_resnet50", ["loss.lambda_mint=1"], 1.0),
        ("cifar10_resnet50", ["loss={lambda_mint: 0.7}"], 0.7),
        ("cifar10_resnet50", ["mint.objective=both"], 1.0),
    ):
        config = load_config(recipe, ["mint.objective=keyed", *settings])
        assert config.loss.lambda_mint == weight
    with pytest.raises(UserError, match="loss"):
        load_config("digits", ["mint.objective=keyed", "loss=3"])


def test_shares_that_a_user_or_a_run_wrote_stay_as_they_are(tmp_path: Path) -> None:
    told = ["mint.objective=keyed", "data.shares.member=0.2", "data.shares.external=0.1"]
    saved = load_config("digits", told)
    (tmp_path / "saved.yaml").write_text(to_yaml(saved))
    again = load_config(str(tmp_path / "saved.yaml"))
    assert again.data.shares == saved.data.shares
    assert fingerprint(again) == fingerprint(saved)
    whole = (
        "data={shares: {member: 0.2, external: 0.1, withheld: 0.04, calibration: 0.08, test: 0.58}}"
    )
    mapped = load_config("digits", ["mint.objective=keyed", whole])
    assert mapped.data.shares.external == 0.1
    # The recipe's own, but given: two objectives are compared on one D.
    own = load_config("digits").data.shares
    for given in (
        [f"data.shares={json.dumps(own.model_dump())}"],
        [f"data.shares.member={own.member}"],
    ):
        assert load_config("digits", ["mint.objective=keyed", *given]).data.shares == own


def test_what_may_be_a_key_is_not_repeated() -> None:
    secret = new_key().hex()
    for setting in (
        f"mint.key={secret}",
        f"mint.key_env=0{secret}",
        f"mint.keyed.fingerprint={secret}0",
    ):
        with pytest.raises(UserError) as told:
            load_config("digits", ["mint.objective=keyed", setting])
        assert secret not in str(told.value)


def test_a_search_for_codes_has_one_key_for_all_trials(tmp_path: Path) -> None:
    write_key(tmp_path / "key", new_key())
    search = tmp_path / "search.yaml"
    text = "recipe: digits\nspace: {{{}}}\nbudget: {{trials: 2}}\n"
    search.write_text(text.format("mint.keyed.code_from: {choice: [content, perceptual]}"))
    with pytest.raises(UserError, match="codes are made once for all trials"):
        load_search(str(search))
    search.write_text(text.format("mint.objective: {choice: [binary, keyed]}"))
    with pytest.raises(UserError, match="no key is given"):
        with_its_key(load_search(str(search)))
    named = with_its_key(load_search(str(search), [f"mint.key_file={tmp_path / 'key'}"]))
    own = key_fingerprint(bytes.fromhex((tmp_path / "key").read_text()))
    trial = named.config({"mint.objective": "keyed"})
    assert named.base.mint.keyed.fingerprint == trial.mint.keyed.fingerprint == own
    assert named.base.wants_codes
    assert trial.data.shares == named.base.data.shares


@pytest.mark.parametrize("value", ["0a" * 32, "no key"])
def test_where_no_key_is_needed_none_is_left_to_other_processes(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("SPARE_KEY", value)
    config = load_config("digits", ["mint.objective=both", "mint.key_env=SPARE_KEY"])
    assert config.wants_codes and not keyless(config).wants_codes
    assert ("SPARE_KEY" in os.environ) == (value == "no key")
    by_file = load_config("digits", ["mint.objective=both", "mint.key_file=nowhere"])
    assert by_file.wants_codes and not keyless(by_file).wants_codes
