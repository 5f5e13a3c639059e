"""Sources: what is decoded, how duplicates are treated, and what is said of bad files."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from amint_ray.config.schema import Data, Shares
from amint_ray.contracts import UserError
from amint_ray.data.roles import Manifest, build_manifest, content_hash, role_of
from amint_ray.data.sources import ImageSet, load_source

Pixels = npt.NDArray[np.uint8]
SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
NO_TEST = Shares(member=0.4, withheld=0.1, external=0.3, calibration=0.2, test=0.0)


def noise(count: int, *shape: int, seed: int = 0) -> list[Pixels]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8))


def encoded(pixels: Pixels, file_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format, **options)
    return buffer.getvalue()


def write_hub(
    path: Path,
    images: Sequence[Pixels | bytes | None],
    labels: Sequence[Any] | None = None,
    *,
    image_column: str = "image",
    label_column: str = "label",
    class_names: list[str] | None = None,
) -> Path:
    """A Parquet file as the hub publishes them."""
    cells = [
        {"bytes": encoded(i) if isinstance(i, np.ndarray) else i, "path": None} for i in images
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            image_column: pa.array(cells, type=kind),
            label_column: pa.array([0] * len(cells) if labels is None else labels),
        }
    )
    if class_names is not None:
        feature = {"_type": "ClassLabel", "names": class_names}
        info = {"info": {"features": {image_column: {"_type": "Image"}, label_column: feature}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def load(path: Path, **keys: Any) -> ImageSet:
    return load_source(Data(source="parquet", path=str(path), **{"image_size": 8, **keys}))


def split(images: ImageSet, *, seed: int, shares: Shares = NO_TEST) -> Manifest:
    return build_manifest(
        images.sample_id,
        images.content,
        images.label,
        images.official_test,
        shares=shares,
        seed=seed,
    )


def refusal(path: Path, **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(path, **keys)
    text = str(caught.value)
    assert text.startswith("data: ")
    assert len(text.splitlines()) == 1, text
    return text


# --- digits ---------------------------------------------------------------------------------------


def test_digits_are_scikit_learns() -> None:
    seen: list[tuple[int, int]] = []
    images = load_source(
        Data(image_size=8, channels=1), lambda done, total: seen.append((done, total))
    )
    reference = load_digits()
    assert images.images.shape == (1797, 1, 8, 8)
    assert images.images.dtype == np.uint8
    np.testing.assert_allclose(images.images[:, 0] / 255, reference.images / 16, atol=0.5 / 255)
    assert (images.label == reference.target).all()
    assert images.class_names == [str(c) for c in range(10)]
    assert len(set(images.sample_id)) == 1797
    assert not images.official_test.any()
    assert seen == [(1000, 1797)]


def test_limit_takes_the_first() -> None:
    whole, part = (load_source(Data(image_size=8, limit=limit)) for limit in (None, 50))
    assert (part.images == whole.images[:50]).all()
    assert part.content == whole.content[:50]
    assert part.class_names == whole.class_names


# --- who is a duplicate of whom -------------------------------------------------------------------


def test_duplicates_share_a_role_and_copies_of_test_images_are_test(tmp_path: Path) -> None:
    train, held = noise(120, 10, 12, 3), noise(20, 10, 12, 3, seed=1)
    # Copies in another file, with another label, and encoded differently.
    copies = [encoded(train[3], "BMP"), encoded(train[7], compress_level=1), train[7]]
    write_hub(tmp_path / "train-00000.parquet", train[:60], [0] * 60)
    write_hub(tmp_path / "train-00001.parquet", [*copies, *train[60:], train[9]], [1] * 64)
    write_hub(
        tmp_path / "test-00000.parquet", [*held, encoded(train[5], "BMP"), train[9]], [2] * 22
    )
    images = load(tmp_path)
    names = {name: i for i, name in enumerate(images.sample_id)}
    first, second, test = "train-00000.parquet#", "train-00001.parquet#", "test-00000.parquet#"
    planted = {f"{first}5", f"{test}20", f"{first}9", f"{second}63", f"{test}21"}
    seen = set()
    for seed in range(20):
        manifest = split(images, seed=seed)
        role = {name: manifest.role[i] for name, i in names.items()}
        assert role[f"{first}3"] == role[f"{second}0"]
        assert role[f"{first}7"] == role[f"{second}1"] == role[f"{second}2"]
        assert {name for name in names if role[name] == "test"} == planted | {
            f"{test}{i}" for i in range(22)
        }
        seen.add((role[f"{first}3"], role[f"{first}7"]))
    assert len(seen) > 5  # the duplicates do change their role, together
    assert split(images, seed=0).duplicates == 6


def test_content_is_of_the_published_pixels_not_of_the_resized(tmp_path: Path) -> None:
    originals = noise(30, 9, 15, 3)
    write_hub(tmp_path / "train.parquet", originals)
    small, gray = load(tmp_path, image_size=4), load(tmp_path, image_size=12, channels=1)
    assert small.content == gray.content == [content_hash(pixels) for pixels in originals]
    expected = [role_of(content_hash(pixels), NO_TEST, 5).value for pixels in originals]
    assert split(small, seed=5).role.tolist() == expected


def test_exif_rotation_and_gray_storage_do_not_hide_a_duplicate(tmp_path: Path) -> None:
    (turned,) = noise(1, 6, 9, 3)
    upright = np.rot90(turned, k=-1)  # orientation 6: turn it clockwise to show it
    exif = Image.Exif()
    exif[0x0112] = 6
    (gray,) = noise(1, 8, 8, seed=2)
    rows = [encoded(turned, exif=exif), upright, turned, gray, np.repeat(gray[..., None], 3, 2)]
    write_hub(tmp_path / "train.parquet", rows)
    content = load(tmp_path).content
    assert content[0] == content[1]
    assert content[3] == content[4]
    assert len(set(content)) == 3


# --- which files and rows -------------------------------------------------------------------------


def test_official_split_limit_and_names(tmp_path: Path) -> None:
    pictures = noise(11, 8, 8, 3)
    write_hub(tmp_path / "train-0.parquet", pictures[:2], [0, 1])
    write_hub(tmp_path / "train-1.parquet", pictures[2:7], [2, 3, 0, 1, 2])
    write_hub(tmp_path / "validation-0.parquet", pictures[7:], [3, 2, 1, 0])
    whole = load(tmp_path)
    assert whole.sample_id == [
        *(f"train-0.parquet#{i}" for i in range(2)),
        *(f"train-1.parquet#{i}" for i in range(5)),
        *(f"validation-0.parquet#{i}" for i in range(4)),
    ]
    assert whole.label.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 2, 1, 0]
    assert whole.official_test.tolist() == [False] * 7 + [True] * 4
    assert (whole.images == np.stack(pictures).transpose(0, 3, 1, 2)).all()
    limited = load(tmp_path, limit=3)
    kept = [0, 1, 2, 7, 8, 9]
    assert limited.sample_id == [whole.sample_id[i] for i in kept]
    assert (limited.images == whole.images[kept]).all()
    single = load(tmp_path / "train-1.parquet")
    assert (single.images == whole.images[2:7]).all()


def test_class_names_come_from_the_hubs_metadata(tmp_path: Path) -> None:
    names = ["ant", "bee", "cat"]
    write_hub(tmp_path / "a" / "t.parquet", noise(2, 8, 8, 3), [0, 1], class_names=names)
    assert load(tmp_path / "a").class_names == names
    write_hub(
        tmp_path / "b" / "t.parquet",
        noise(2, 8, 8, 3),
        [0, 1],
        class_names=names,
        label_column="fine",
    )
    assert load(tmp_path / "b", label_column="fine").class_names == names
    write_hub(tmp_path / "c" / "t.parquet", noise(2, 8, 8, 3), [0, 3])
    assert load(tmp_path / "c").class_names == ["0", "1", "2", "3"]


@pytest.mark.parametrize("text", ["{not json", "[]", '{"info": null}', '{"info": {"features": 1}}'])
def test_strange_hub_metadata_is_no_reason_to_fail(text: str, tmp_path: Path) -> None:
    path = write_hub(tmp_path / "t.parquet", noise(2, 8, 8, 3), [0, 1])
    pq.write_table(pq.read_table(path).replace_schema_metadata({"huggingface": text}), path)
    assert load(path).class_names == ["0", "1"]


def test_image_column_is_found_among_others(tmp_path: Path) -> None:
    path = write_hub(tmp_path / "t.parquet", noise(2, 8, 8, 3), image_column="img")
    table = pq.read_table(path).append_column("tags", [[["x"], ["y"]]])
    pq.write_table(table.append_column("size", [[{"w": 8}, {"w": 8}]]), path)
    assert (load(path).images == load(path, image_column="img").images).all()
    pq.write_table(table.append_column("mask", table["img"]), path)
    text = refusal(path)
    assert "data.image_column" in text
    assert "img, label, tags, mask" in text


# --- pixels ---------------------------------------------------------------------------------------


def test_gray_becomes_rgb_and_rgb_becomes_gray(tmp_path: Path) -> None:
    (gray,), (colour,) = noise(1, 8, 8), noise(1, 8, 8, 3, seed=1)
    write_hub(tmp_path / "t.parquet", [gray, colour])
    assert (load(tmp_path, channels=3).images[0] == np.stack([gray] * 3)).all()
    one = load(tmp_path, channels=1).images
    assert one.shape == (2, 1, 8, 8)
    assert (one[0, 0] == gray).all()
    luma = colour @ np.array([0.299, 0.587, 0.114])  # ITU-R 601
    np.testing.assert_allclose(one[1, 0], luma, atol=1)


def test_other_sizes_are_cropped_to_the_centre_and_scaled(tmp_path: Path) -> None:
    (wide,), (tall,), (square,) = (
        noise(1, 8, 24, 3),
        noise(1, 20, 8, 3, seed=1),
        noise(1, 16, 16, 3, seed=2),
    )
    write_hub(tmp_path / "t.parquet", [wide, tall, square])
    images = load(tmp_path, image_size=8).images.transpose(0, 2, 3, 1)
    assert (images[0] == wide[:, 8:16]).all()
    assert (images[1] == tall[6:14]).all()
    scaled = Image.fromarray(square).resize((8, 8), Image.Resampling.BICUBIC)
    assert (images[2] == np.asarray(scaled)).all()


# --- what is said of bad sources ------------------------------------------------------------------


def test_missing_path_and_empty_folder(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    assert f"data.path={missing}" in refusal(missing)
    (tmp_path / "readme.txt").write_text("hello")
    text = refusal(tmp_path)
    assert f"data.path={tmp_path}" in text
    assert "*.parquet" in text
    write_hub(tmp_path / "none.parquet", [], np.zeros(0, dtype=np.int64))  # type: ignore[arg-type]
    assert "no rows" in refusal(tmp_path)


def test_file_that_is_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"not parquet at all")
    text = refusal(tmp_path)
    assert "broken.parquet" in text
    assert "not a Parquet file" in text


def test_damaged_page_names_the_file(tmp_path: Path) -> None:
    path = write_hub(tmp_path / "damaged.parquet", noise(4, 8, 8, 3))
    content = path.read_bytes()
    body = len(content) - 8 - int.from_bytes(content[-8:-4], "little") - 4  # between magic, footer
    path.write_bytes(content[:4] + bytes(body) + content[4 + body :])
    assert "damaged.parquet" in refusal(path)


@pytest.mark.parametrize("key", ["image_column", "label_column"])
def test_wrong_column_lists_those_there(key: str, tmp_path: Path) -> None:
    write_hub(tmp_path / "t.parquet", noise(1, 8, 8, 3), image_column="img", label_column="fine")
    text = refusal(tmp_path, **{"label_column": "fine", key: "typo"})
    assert "'typo'" in text
    assert f"data.{key}" in text
    assert "img, fine" in text


def test_no_image_column_lists_those_there(tmp_path: Path) -> None:
    pq.write_table(pa.table({"photo": [1, 2], "label": [0, 1]}), tmp_path / "t.parquet")
    text = refusal(tmp_path)
    assert "photo, label" in text
    assert "data.image_column" in text


WHOLE = encoded(noise(1, 8, 8, 3)[0])


@pytest.mark.parametrize(
    "cell",
    [
        b"",
        b"no image",
        WHOLE[:60],
        None,
        WHOLE[:33] + (5).to_bytes(4, "big") + WHOLE[37:],  # the pixels' chunk, its length wrong
    ],
    ids=["empty", "text", "truncated", "null", "bad-chunk"],
)
def test_undecodable_image_names_file_and_row(cell: bytes | None, tmp_path: Path) -> None:
    write_hub(tmp_path / "train-7.parquet", [*noise(2, 8, 8, 3), cell])
    assert "train-7.parquet#2:" in refusal(tmp_path)


@pytest.mark.parametrize("label", [-1, 3])
def test_label_out_of_range_names_the_sample(label: int, tmp_path: Path) -> None:
    names = ["ant", "bee", "cat"]
    write_hub(tmp_path / "t.parquet", noise(3, 8, 8, 3), [0, 2, label], class_names=names)
    text = refusal(tmp_path)
    assert f"label {label}" in text and "t.parquet" in text
    assert "0 to 2" in text or "0 and up" in text


@pytest.mark.parametrize("labels", [[0, None], [0.0, 1.5], ["a", "b"]])
def test_label_that_is_no_index_is_refused(labels: list[Any], tmp_path: Path) -> None:
    write_hub(tmp_path / "t.parquet", noise(2, 8, 8, 3), labels)
    assert "must hold class indices" in refusal(tmp_path)


def test_a_test_file_whose_labels_are_kept_back_is_left_out(tmp_path: Path) -> None:
    write_hub(tmp_path / "train.parquet", noise(4, 8, 8, 3), [0, 1, 2, 0])
    write_hub(tmp_path / "test.parquet", noise(2, 8, 8, 3), [-1, -1])
    loaded = load(tmp_path)
    assert [name.split("#")[0] for name in loaded.sample_id] == ["train.parquet"] * 4
    write_hub(tmp_path / "test.parquet", noise(2, 8, 8, 3), [-1, 1])
    assert "label -1 is not a class index" in refusal(tmp_path)


def test_too_much_memory_is_refused_before_decoding(tmp_path: Path) -> None:
    write_hub(tmp_path / "t.parquet", [b"never decoded"] * 1024)
    # 1024 images of 3 × 32 × 32 bytes are 3 MiB.
    text = refusal(tmp_path, image_size=32, memory_gib=2.99 / 1024)
    assert "data.memory_gib" in text
    assert "data.limit" in text
    assert "cannot be decoded" in refusal(tmp_path, image_size=32, memory_gib=3.01 / 1024)


# --- real data, where it is -----------------------------------------------------------------------


CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"


@pytest.mark.parametrize(
    ("folder", "size", "channels", "names"),
    [("mnist", 28, 1, "0 1 2 3 4 5 6 7 8 9"), ("cifar10", 32, 3, CIFAR10)],
)
def test_real_hub_files(folder: str, size: int, channels: int, names: str) -> None:
    root = SHARED / folder
    if not root.is_dir():
        pytest.skip(f"{root} is not there")
    images = load(root, limit=200, image_size=size, channels=channels)
    assert images.images.shape == (400, channels, size, size)
    assert images.official_test.sum() == 200
    assert images.class_names == names.split()
    assert set(images.label.tolist()) == set(range(10))
    file = "train-00000-of-00002.parquet"
    for i, row in enumerate(next(pq.ParquetFile(root / file).iter_batches(10)).to_pylist()):
        at = images.sample_id.index(f"{file}#{i}")
        cell = row["img"] if "img" in row else row["image"]
        pixels = np.asarray(Image.open(io.BytesIO(cell["bytes"])))
        assert (images.images[at].transpose(1, 2, 0) == pixels.reshape(size, size, -1)).all()
        assert images.label[at] == row["label"]
    counts = split(images, seed=0).counts
    assert counts["test"] >= 200
    assert min(counts.values()) > 0
