"""The rows of an audit's report: which image each is, and which are shown."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audit.audit_population import Population
from launch.silent import Silent
from PIL import Image

from amint_ray.audit.suspects import Suspects
from amint_ray.audit.verdict import Judgement
from amint_ray.audit.yardstick import Yardstick
from amint_ray.config.audit import AuditSettings
from amint_ray.config.data_schema import Data
from amint_ray.contracts import UserError
from amint_ray.evaluation.outputs import Outputs
from amint_ray.launch import audit_images
from amint_ray.launch.audit_images import SCHEMA, Images, Read, read_parts
from amint_ray.launch.audit_suspects import find_suspects
from amint_ray.launch.audit_worker import UNTOLD, Asked
from amint_ray.storage import locate

CLASSES = ["cat", "dog"]
FILES = 300  # in shards of 256


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    folder = tmp_path_factory.mktemp("suspects")
    for number in range(FILES):
        of = folder / CLASSES[number % 2]
        of.mkdir(exist_ok=True)
        Image.new("L", (4, 4), number % 256).save(of / f"{number:03}.png")
    return Asked(
        found=find_suspects(str(folder), AuditSettings(), CLASSES, Silent()),
        data=Data(image_size=4, channels=1),
        evidence="both",
        batch_size=16,
        projection=np.eye(6, dtype=np.float32),
        needs_labels=True,
        place=locate(str(folder.parent / "audits"), "test"),
    )


def names_of(asked: Asked) -> list[str]:
    source = asked.found.source
    return [name for shard in range(len(source.shards)) for name in source.sample_ids(shard)]


def images_of(asked: Asked, problems: dict[int, tuple[int, str]], **columns: Any) -> Images:
    """Of images that were found what the columns say, and NaN or −1 elsewhere."""
    n = FILES - len(problems)
    found = {name: np.full(n, np.nan) for name in SCHEMA.names[4:12]}
    found |= {name: np.full(n, -1) for name in ("label", "prediction", "duplicate_of")}
    found |= {"flagged": np.zeros(n, bool), **columns}
    place = np.array([i for i in range(FILES) if i not in problems])
    read = Read(None, place, problems)  # type: ignore[arg-type]
    return Images(asked, read, Judgement({}, found), CLASSES)


def test_a_row_says_which_image_it_is_and_what_was_found(asked: Asked) -> None:
    n, names = FILES - 1, names_of(asked)
    p = np.linspace(0.01, 0.99, n)
    p[5] = np.nan
    label, copy = np.full(n, -1), np.full(n, -1)
    label[0], copy[299 - 1] = 1, 7
    flagged = np.arange(n) == 0
    images = images_of(
        asked, {3: (1, "torn")}, p_value=p, label=label, duplicate_of=copy, flagged=flagged
    )
    rows = images.every()
    assert [row["image"] for row in rows] == names
    assert rows[3] == dict.fromkeys(SCHEMA.names) | {
        "image": names[3],
        "label": 1,
        "class_name": None,
        "problem": "torn",
    }
    nothing = dict.fromkeys(SCHEMA.names)
    assert rows[0] == nothing | {
        "image": names[0],
        "label": 1,
        "class_name": "dog",
        "p_value": 0.01,
        "decision": "member",
    }
    # The fourth was torn: from there on a row is one further than what was found of it.
    assert rows[6] == nothing | {
        "image": names[6],
        "decision": "undecided",
        "problem": "has no label, which the model's head needs",
    }
    assert rows[299]["duplicate_of"] == names[8]
    assert rows[299]["p_value"] == 0.99
    assert sum(row["duplicate_of"] is not None for row in rows) == 1
    batches = list(images.batches())
    assert [batch.schema for batch in batches] == [SCHEMA] * len(batches)
    assert images.at(np.array([299, 3, 0])) == [rows[299], rows[3], rows[0]]


def test_of_many_the_utmost_and_some_that_cannot_be_judged_are_shown(asked: Asked) -> None:
    problems = dict.fromkeys(range(40, 60), (-1, "torn"))
    n = FILES - 20
    p = np.random.default_rng(0).permutation(n) / n + 0.001
    p[:4] = 0.0005  # whose scores decide
    head = np.zeros(n)
    head[:4] = [1, 3, np.nan, 2]
    p[4] = np.nan
    copy = np.full(n, -1)
    copy[np.argsort(p)[4]] = 9
    images = images_of(asked, problems, p_value=p, head_score=head, duplicate_of=copy)
    assert len(images.chosen(FILES)) == FILES
    chosen = images.at(images.chosen(100))
    told = [image["p_value"] for image in chosen[:90]]
    expected = np.sort(p[(copy < 0) & np.isfinite(p)])
    assert told == [*expected[:45], *expected[-45:]]
    assert [image["problem"] is not None for image in chosen[90:]] == [True] * 10
    assert chosen[90]["image"] == names_of(asked)[4]
    assert [image["head_score"] for image in chosen[:4]] == [3, 2, 1, None]


def test_pictures_are_of_the_utmost(asked: Asked) -> None:
    p = np.linspace(0.01, 0.99, FILES)
    images, names = images_of(asked, {}, p_value=p), names_of(asked)
    found = images.pictures(images.chosen(), 3)
    assert found.keys() == {*names[:3], *names[-3:]}
    for name, png in found.items():
        shade = int(name[-7:-4]) % 256
        assert np.asarray(Image.open(io.BytesIO(png)).convert("L")).max() == shade
    assert images.pictures(images.chosen(), 0) == {}


def test_each_file_is_read_once_and_measured_as_it_is_read(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rng = Population(), np.random.default_rng(0)
    yardstick = Yardstick(model.reference(rng, calibration=60, member=30, withheld=30))
    suspects = model.suspects(rng, test=40)
    usable = np.arange(50) % 5 != 1
    for name, rows in (("a", slice(0, 30)), ("b", slice(30, 50))):
        write(asked, name, suspects, usable, np.arange(50)[rows])
    opened: Counter[str] = Counter()
    whole = audit_images.read_arrays

    def counted(place: Any, name: str) -> Any:
        opened[name] += 1
        return whole(place, name)

    monkeypatch.setattr(audit_images, "read_arrays", counted)
    read = read_parts(asked, ["a", "b"], yardstick, trained=True)
    assert opened == {"a": 1, "b": 1}
    assert read.place.tolist() == np.flatnonzero(usable).tolist()
    assert read.problems == dict.fromkeys(np.flatnonzero(~usable).tolist(), (-1, "torn"))
    for name, values in vars(yardstick.measure(suspects)).items():
        np.testing.assert_array_equal(getattr(read.measured, name), values, err_msg=name)
    write(asked, "c", suspects, np.zeros(50, bool), np.arange(3))
    with pytest.raises(UserError, match="none of the 3 images can be read; the first: torn"):
        read_parts(asked, ["c"], yardstick, trained=True)


def write(
    asked: Asked, name: str, suspects: Suspects, usable: np.ndarray, rows: np.ndarray
) -> None:
    """What a process leaves of some rows, of which the usable ones are the suspects in order."""
    some = (np.cumsum(usable) - 1)[rows][usable[rows]]
    label = np.full(len(rows), -1)
    label[usable[rows]] = suspects.label[some]
    content = np.zeros(len(rows), np.uint64)
    content[usable[rows]] = suspects.content[some]
    columns: dict[str, Any] = {
        "label": label,
        "problem": np.where(usable[rows], "", "torn"),
        "content": content,
    }
    if len(some):
        for key in ("prediction", "mint_logit", "taps", "finite"):
            columns[key] = getattr(suspects, key)[some]
        assert isinstance(suspects.told, Outputs) and suspects.untold is not None
        columns |= {f"told.{key}": values[:, some] for key, values in vars(suspects.told).items()}
        columns[UNTOLD] = suspects.untold.label_confidence[:, some]
    Path(asked.place.path).mkdir(exist_ok=True)
    np.savez(Path(asked.place.path) / f"{name}.npz", **columns)
