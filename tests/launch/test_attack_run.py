"""`amint attack` as a user runs it: killed, and gone on with; and `amint evaluate` of its model."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import psutil
import pytest
from launch.commands import Command
from launch.silent import Silent

from amint_ray.attacks.evidence import Evidence
from amint_ray.attacks.methods import METHODS
from amint_ray.attacks.table import QUESTIONS, measure_scores, read_attack_scores
from amint_ray.config.load import load_config
from amint_ray.contracts import UserError, leaves
from amint_ray.data.keys import write_key
from amint_ray.launch import attack_run

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SHADOWS = 4
RECIPE = [
    *("digits", "train.epochs=2", "cluster.workers=1", "data.confounder_check=false"),
    # Half of the pool is D: each image is in two of four shadow models.
    "data.shares={member: 0.3, withheld: 0.1, external: 0.2, calibration: 0.15, test: 0.25}",
]
CODES = ["mint.objective=both", "mint.key_file=audit.key"]
SETTINGS = [f"attack.shadows={SHADOWS}", "attack.edits=false"]
PARTS = {"model-000", "blind", "passive", "twin"} | {
    f"{kind}-{number:03d}" for kind in ("joint", "plain") for number in range(SHADOWS)
}


def parts(folder: Path) -> dict[str, int]:
    """What is done, and when it was written."""
    found = (folder / "amint_runs").glob("[as]*/*/*.npz")
    return {path.stem: path.stat().st_mtime_ns for path in found}


@contextmanager
def standing_still(command: Command) -> Iterator[None]:
    """The tasks of an attack are held up, its driver is not."""
    held = command.descendants("ray::train_and_look")
    for process in held:
        process.suspend()
    try:
        yield
    finally:
        for process in held:
            try:
                process.resume()
            except psutil.NoSuchProcess:
                continue


def refused_beside(folder: Path, run_id: str) -> str:
    """What a second attack is told; it does not come as far as Ray."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as told:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        patch.setattr(attack_run, "connect", lambda *_, **__: nullcontext())
        patch.setattr(attack_run, "_run", lambda *_: pytest.fail("both are at work"))
        attack_run.run_attack(run_id, "all", SETTINGS, Silent())
    return str(told.value)


class Attacked:
    """A model, and an attack on it: killed with another one beside it, and gone on with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_key(folder / "audit.key", bytes(range(32)))
        self.run = Command(folder, ["train", *RECIPE, *CODES, "--json"]).document()
        arguments = ["attack", self.run["model_uri"], *SETTINGS, "--json"]
        self.killed = Command(folder, arguments)
        self.killed.wait_until(lambda: any(name.startswith("joint-") for name in parts(folder)))
        with standing_still(self.killed):
            self.beside = refused_beside(folder, self.run["run_id"])
            self.killed.process.send_signal(signal.SIGKILL)
            self.killed.process.wait()
        self.left = self.killed.leftovers()
        self.before = parts(folder)
        self.command = Command(folder, arguments)
        self.document = self.command.document()
        self.after = parts(folder)

    @property
    def kept(self) -> Path:
        return self.folder / self.document["kept"]


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Attacked:
    return Attacked(tmp_path_factory.mktemp("attacked"))


def test_document_has_the_keys_that_scripts_rely_on(attacked: Attacked) -> None:
    document = attacked.document
    assert set(document) == {
        *("model", "run_id", "attack", "settings", "methods", "leak", "shadows", "counts"),
        *("confidence", "seeds", "compared", "seconds", "artifacts", "kept", "recorded"),
    }
    assert document["model"] == attacked.run["model_uri"] == "models:/amint-digits/1"
    assert document["run_id"] == attacked.run["run_id"]
    assert document["compared"] == ["member vs test", "withheld vs test"]
    assert document["shadows"] == {"asked": 4, "used": 4, "failed": {}, "loss": "same"}
    counts = {name: n for name, n in attacked.run["counts"].items() if name != "external"}
    assert document["counts"] == counts
    assert list(document["methods"]) == [m for m in METHODS if m != "output_attack_snapshots"]
    for name, method in document["methods"].items():
        assert (method["title"], method["source"]) == (METHODS[name].title, METHODS[name].source)
        assert method["robustness"] == {}
        trains = METHODS[name].needs & {"shadows", "passive"}
        assert (method["cost"]["core_hours"] > 0) == bool(trains)


def test_every_method_answers_both_questions(attacked: Attacked) -> None:
    for name, method in attacked.document["methods"].items():
        for question in ("member", "withheld"):
            figures = method[question]
            area, compared = figures["auc"], figures["compared"]
            assert 0 <= area["low"] <= area["value"] <= area["high"] <= 1, (name, question)
            for side, role in (("positives", question), ("negatives", "test")):
                told = compared[f"n_{side}"] + compared["left_out"][side]
                assert told == attacked.document["counts"][role], (name, question)
    methods = attacked.document["methods"]
    for question in ("member", "withheld"):
        assert methods["hash_list"][question]["auc"]["value"] == 1.0
    assert methods["output_attack"]["member"]["compared"]["left_out"]["positives"] > 100
    assert methods["yeom"]["member"]["compared"]["left_out"]["positives"] == 0


def test_the_audited_head_scores_as_its_own_run_says(attacked: Attacked) -> None:
    for question in ("member", "withheld"):
        own = attacked.run["membership"][question]["auc"]["value"]
        found = attacked.document["methods"]["mint"][question]["auc"]["value"]
        assert found == pytest.approx(own, abs=1e-3)


def test_every_figure_can_be_computed_again_from_the_stored_scores(attacked: Attacked) -> None:
    table = read_attack_scores(attacked.kept / "attack_scores.parquet")
    evidence = Evidence(table.sample_id, table.role, table.label, outputs={}, known=table.known)
    config = load_config("digits").evaluation
    for name, method in attacked.document["methods"].items():
        found = measure_scores(METHODS[name], evidence, table.scores[name], config, why=None)
        for question in QUESTIONS:
            stored = json.loads(json.dumps(found[question.value]))
            assert method[question.value] == stored, (name, question)


def test_this_model_is_compared_with_one_of_another_loss(attacked: Attacked) -> None:
    leak = attacked.document["leak"]
    assert list(leak["pair"]) == ["yeom", "lira_online_fixed", "rmia_online"]
    for name, found in leak["pair"].items():
        difference = found["difference"]["auc"]
        apart = found["joint"]["auc"]["value"] - found["plain"]["auc"]["value"]
        assert difference["value"] == pytest.approx(apart)
        assert difference["low"] <= difference["value"] <= difference["high"]
        assert found["compared"]["n_positives"] > 500
        assert len(leak["trainings"][name]["joint"]) == SHADOWS
    over = leak["trainings"]["yeom"]["auc"]
    assert over["pairs"] == SHADOWS and over["low"] <= over["value"] <= over["high"]


def test_the_models_run_has_table_scores_pictures_and_figures(attacked: Attacked) -> None:
    import mlflow

    document = attacked.document
    client = mlflow.MlflowClient(f"sqlite:///{attacked.folder / 'mlflow.db'}")
    assert document["recorded"]
    names = {"attack.json", "attack.csv", "attack_scores.parquet"}
    names |= {"roc_member.png", "roc_withheld.png"}
    listed = client.list_artifacts(document["run_id"], document["artifacts"])
    assert {file.path.rpartition("/")[2] for file in listed} == names
    for name in names:
        (copy,) = attacked.folder.glob(f"**/artifacts/{document['artifacts']}/{name}")
        assert copy.read_bytes() == (attacked.kept / name).read_bytes()
    stored = json.loads((attacked.kept / "attack.json").read_text())
    assert stored["methods"].keys() == document["methods"].keys()
    data = client.get_run(document["run_id"]).data
    assert data.tags["amint.attacked"] == document["artifacts"]
    for name, method in document["methods"].items():
        for question in ("member", "withheld"):
            for figure, value in leaves(method[question]).items():
                assert data.metrics[f"attack.{name}.{question}.{figure}"] == value
    assert (
        data.metrics["membership.member.auc"]
        == (attacked.run["membership"]["member"]["auc"]["value"])
    )


def test_a_killed_attack_goes_on_with_what_was_done(attacked: Attacked) -> None:
    assert attacked.left == []
    assert 0 < len(attacked.before) < len(PARTS)
    assert attacked.document["seconds"]["reused"] == len(attacked.before)
    assert set(attacked.after) == PARTS
    assert {name: attacked.after[name] for name in attacked.before} == attacked.before
    done_now = attacked.document["seconds"]["parts_by_name"].keys()
    assert done_now == PARTS - attacked.before.keys()
    assert "Traceback" not in attacked.command.stderr


def test_two_at_once_on_one_model(attacked: Attacked) -> None:
    """Whichever of its names the model is called by."""
    place = f"amint_runs/attacks/{attacked.document['attack']}"
    assert attacked.beside.startswith(f"attack: another process is at work on {place};")
    assert "\n" not in attacked.beside


def test_controls_use_what_the_attack_did_and_scores_are_made_anew(attacked: Attacked) -> None:
    command = Command(
        attacked.folder, ["evaluate", attacked.run["model_uri"], "--full", "--anew", "--json"]
    )
    (model,) = command.document()["models"]
    saved = attacked.run["counts"]
    assert model["counts"] == saved
    anew = model["anew"]
    assert (anew["compared"], anew["missing"]) == (sum(saved.values()), 0)
    assert (anew["different"], anew["predictions"]) == (0, 0)
    for role in ("member", "withheld"):
        own = attacked.run["membership"][role]["auc"]["value"]
        assert model["lines"][role]["value"] == pytest.approx(own, abs=1e-3)
    controls = model["controls"]
    blind = attacked.document["methods"]["blind"]["member"]["auc"]
    assert controls["blind"]["member"] == model["lines"]["blind"] == blind
    plain = controls["plain"]
    apart = plain["accuracy"]["value"] - plain["plain_accuracy"]["value"]
    assert plain["n"] == saved["test"]
    assert plain["difference"]["value"] == pytest.approx(apart)
    assert controls["shuffled"]["chance"] is True
    assert controls["shuffled"]["lots"] == 3
    assert controls["near_duplicates"]["compared"] == sum(saved.values())
    assert set(controls["strangers"]) == {"noise", "inverted", "blurred"}
    for found in controls["strangers"].values():
        assert found["n"] == saved["test"] and found["realised_fpr"]["value"] is not None
    # What is trained is kept; what was to be made anew is not.
    kept = (attacked.folder / "amint_runs/evaluations").glob("*/*")
    assert {path.name for path in kept} == {
        *("hashes-000.npz", "strangers.npz"),
        *(f"shuffled-{lot}.npz" for lot in range(3)),
    }
    assert parts(attacked.folder) == attacked.after
    assert command.leftovers() == []


def test_nothing_is_left_beside_what_is_kept(attacked: Attacked) -> None:
    left = {path.name for path in attacked.kept.parent.iterdir()}
    assert left == {attacked.kept.name, "model-000.npz", "blind.npz", "passive.npz", "twin.npz"}
    assert attacked.command.leftovers() == []


def test_only_who_teaches_codes_needs_the_key(attacked: Attacked) -> None:
    elsewhere = [attacked.run["model_uri"], *SETTINGS, "mint.key_file=nowhere.key"]
    arguments = ["attack", *elsewhere, "--json"]
    taught = Command(attacked.folder, [*arguments, "--methods=lira_offline"])
    untaught = Command(attacked.folder, [*arguments, "--methods=yeom"])
    assert taught.wait() == 2
    assert "amint: key file 'nowhere.key': is not there" in taught.stderr
    assert "starting Ray" not in taught.stderr
    document = untaught.document()
    assert list(document["methods"]) == ["yeom"]
    for question in ("member", "withheld"):
        before = attacked.document["methods"]["yeom"][question]
        assert document["methods"]["yeom"][question] == before
    assert document["seconds"]["parts_by_name"] == {}
