"""What an evaluation needs images and Ray for: scores made anew, and the controls of `--full`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from amint_ray.attacks.evidence import PLAIN
from amint_ray.attacks.shuffled import LOTS, Shuffled, over_lots, shuffle_roles, shuffled_figures
from amint_ray.config.attack import AttackSettings
from amint_ray.config.schema import Config
from amint_ray.contracts import Role, RunError, ScoreTable, Watcher, first_line
from amint_ray.data.near_duplicates import pairs_across
from amint_ray.data.roles import Manifest
from amint_ray.data.strangers import kinds_of, read_strangers
from amint_ray.evaluation.controls import (
    blind_figures,
    duplicate_figures,
    plain_figures,
    stranger_figures,
)
from amint_ray.evaluation.scores import CODE_COLUMNS, concatenate
from amint_ray.launch.attack_parts import (
    Done,
    Task,
    fingerprint_of,
    is_done,
    read_part,
    resources_of,
    run,
)
from amint_ray.launch.attack_plan import AttackPlan, plan_attack
from amint_ray.launch.attack_worker import Look, Part
from amint_ray.launch.claim import alone_at
from amint_ray.launch.cluster import address_of, connect
from amint_ray.launch.codes import keyless, with_key
from amint_ray.launch.dataset import find_source, index_on_ray, load_here
from amint_ray.launch.earlier import Earlier, check_same
from amint_ray.launch.evaluate_worker import GIVEN, hash_images, look_at_strangers, score_again
from amint_ray.launch.prepare import check, put_data, with_streams
from amint_ray.launch.room import wait_for_room
from amint_ray.launch.target import load_target, one_worker
from amint_ray.storage import Location, delete

DISTANCE = 4
"""Bits of 64 in which perceptual hashes of near-duplicates may differ."""
_AT_ONCE = 20_000
"""Images that one look takes."""
_MOST_STRANGERS = 5_000
_CODE = ("launch/evaluate_worker.py", "data/strangers.py", "data/images.py", "attacks/shuffled.py")
"""Whatever may change what a look comes to, beside what an attack's parts depend on."""


@dataclass(frozen=True)
class Asked:
    """What is to be found out with images.

    Attributes:
        anew: all samples scored again.
        full: the controls.
        ood: where images from elsewhere are; None: there are none.
    """

    anew: bool
    full: bool
    ood: str | None


@dataclass(frozen=True)
class Answered:
    """What was found out.

    Attributes:
        table: the new scores; None: not asked.
        controls: their figures; None: not asked.
    """

    table: ScoreTable | None
    controls: dict[str, Any] | None


@dataclass(frozen=True)
class _Plan:
    """Parts of one evaluation; None, or empty: not asked, or there is no such thing."""

    attack: AttackPlan
    lots: list[Shuffled]
    scores: list[Task]
    hashes: list[Task]
    heads: list[Task]
    strangers: Task | None

    @property
    def tasks(self) -> list[Task]:
        """All, what is quick first."""
        single = (self.strangers, self.attack.blind, self.attack.twin)
        quick = (*self.scores, *self.hashes, *self.heads)
        return [*quick, *(task for task in single if task is not None)]


def ask_on_ray(
    uri: str, earlier: Earlier, table: ScoreTable, asked: Asked, watcher: Watcher, *, verbose: bool
) -> Answered:
    """Load model and images, and have Ray look at, and train, what is asked for.

    What an attack or an evaluation of the same model did before is used again, but for scores.

    Args:
        uri: of the model, as the user named it.
        earlier: its run.
        table: the saved scores.
        asked: what is wanted.
        watcher: is told how far it is.
        verbose: let Ray talk.

    Raises:
        UserError: the images are not there, or not the run's.
        RunError: a part failed.
    """
    import ray

    target = load_target(uri, earlier)
    config = one_worker(earlier.config)
    config = with_key(config) if asked.anew else config
    checked = check(config if asked.anew else keyless(config), watcher)
    given = None
    if asked.ood is not None:
        watcher.phase(f"reading {asked.ood}")
        given = read_strangers(asked.ood, config.data, most=_MOST_STRANGERS, where="--ood")
    config, source = find_source(config, watcher)
    dataset = load_here(config, source, watcher) if config.data.mode == "memory" else None
    address = address_of(config.cluster)
    watcher.phase("starting Ray")
    with connect(address, verbose=verbose):
        if address is not None:
            wait_for_room(config.cluster, watcher)
        if dataset is None:
            dataset = index_on_ray(config, source, checked.storage, watcher)
        manifest = dataset.index.manifest
        check_same(earlier, manifest)
        attack = _attack(with_streams(config, workers=1), manifest, checked.storage, target.digest)
        plan = _plan(attack, asked, given, checked.storage)
        # Scores made anew are files, too, which another evaluation would take for its own.
        with alone_at(attack.place, "evaluate", watcher):
            data = put_data(attack.config if asked.anew else keyless(attack.config), dataset)
            dataset = None  # Ray's object store then has the images, and this process no more
            if given is not None:
                data["strangers"] = ray.put(given)
            watcher.phase(f"training and asking {len(plan.tasks)} parts")
            settings = resources_of(attack.config, attack.settings)
            name = f"evaluate-{target.digest}"
            done = run(plan.tasks, name, data, ray.put(target.parts), settings, watcher)
            watcher.phase("measuring")
            anew = _scores(plan) if asked.anew else None
            controls = None
            if asked.full:
                scores = table if anew is None else anew
                controls = _controls(plan, scores, config, done)
            for task in plan.scores:  # the next time they are to be made anew, too
                _forget(task.part)
    return Answered(anew, controls)


def _attack(config: Config, manifest: Manifest, storage: Location, digest: str) -> AttackPlan:
    """Those parts of an attack that are controls; where one was made with edits, that one's."""
    plans = [
        plan_attack(
            config,
            AttackSettings(shadows=0, edits=edits),
            manifest,
            storage,
            needs={"blind", "passive"},
            model=digest,
            checkpoints=[],
        )
        for edits in (True, False)
    ]
    wanted = [task for task in (plans[0].twin, plans[0].blind) if task is not None]
    return plans[0] if all(is_done(task.part) for task in wanted) else plans[1]


def _plan(
    attack: AttackPlan,
    asked: Asked,
    given: npt.NDArray[np.uint8] | None,
    storage: Location,
) -> _Plan:
    manifest, config = attack.manifest, attack.config
    code = hashlib.sha256()
    for name in _CODE:
        code.update((Path(str(resources.files("amint_ray"))) / name).read_bytes())
    depends_on = {"attack": attack.place.path.rsplit("/", 1)[-1], "code": code.hexdigest()}
    place = storage.below(f"evaluations/{fingerprint_of(depends_on)}")

    def look(positions: npt.NDArray[np.int64], edits: tuple[str, ...] = (PLAIN,)) -> Look:
        return Look(positions, manifest.label[positions], edits)

    def portions() -> list[npt.NDArray[np.int64]]:
        everything = np.arange(len(manifest.role))
        return [everything[at : at + _AT_ONCE] for at in range(0, len(everything), _AT_ONCE)]

    if not asked.full:
        attack = replace(attack, blind=None, twin=None)
    lots, heads = [], []
    if asked.full and attack.passive is not None:
        lots = [shuffle_roles(manifest.role, manifest.content, seed=lot) for lot in range(LOTS)]
        is_shown = np.isin(manifest.role, [Role.MEMBER, Role.EXTERNAL, Role.TEST])
        shown = look(np.flatnonzero(is_shown))
        for number, lot in enumerate(lots):
            roles = np.array([list(Role).index(Role(role)) for role in lot.role.tolist()])
            part = replace(attack.passive.part, name=f"shuffled-{number}", place=place)
            part = replace(part, roles=roles.astype(np.uint8))
            heads.append(Task(part, shown, attack.passive.function))
    strangers = None
    if asked.full and config.trains_membership:
        test = np.flatnonzero(manifest.role == Role.TEST.value)
        test = np.sort(np.random.default_rng(0).permutation(test)[:_MOST_STRANGERS])
        kinds = kinds_of(config.data.channels)
        name = "strangers"
        if given is not None:
            kinds = (*kinds, GIVEN)
            name += f"-{hashlib.sha256(given.tobytes()).hexdigest()[:16]}"
        strangers = Task(Part(name, place, config), look(test, kinds), look_at_strangers)
    return _Plan(
        attack=attack,
        lots=lots,
        scores=[
            Task(Part(f"scores-{i:03d}", place, config), look(positions), score_again)
            for i, positions in enumerate(portions())
        ]
        if asked.anew
        else [],
        hashes=[
            Task(Part(f"hashes-{i:03d}", place, config), look(positions), hash_images)
            for i, positions in enumerate(portions())
        ]
        if asked.full
        else [],
        heads=heads,
        strangers=strangers,
    )


def _scores(plan: _Plan) -> ScoreTable:
    manifest = plan.attack.manifest
    tables = []
    for task in plan.scores:
        part = read_part(task.part)
        position = part["position"]
        tables.append(
            ScoreTable(
                sample_id=manifest.sample_id[position],
                role=manifest.role[position],
                label=part["label"],
                prediction=part["prediction"],
                task_loss=part["task_loss"],
                mint_logit=part["mint_logit"],
                **{name: part[name] for name in CODE_COLUMNS if name in part},
            )
        )
    return concatenate(tables)


def _forget(part: Part) -> None:
    try:
        delete(part.place, f"{part.name}.npz")
    except OSError as error:
        raise RunError(f"{part.place.uri}: {first_line(error)}") from error


def _controls(plan: _Plan, table: ScoreTable, config: Config, done: Done) -> dict[str, Any]:
    """Each control's figures, or in `note` why there are none."""
    evaluation, attack = config.evaluation, plan.attack
    manifest = attack.manifest
    pool = manifest.sample_id[attack.positions]
    found: dict[str, Any] = {}
    if attack.twin is None:
        found["plain"] = {"note": "the model itself was trained with λ₂ = 0"}
    elif attack.twin.part.name in done.failed:
        found["plain"] = {"note": f"λ₂ = 0: {done.failed[attack.twin.part.name]}"}
    else:
        right = read_part(attack.twin.part)[f"{PLAIN}/right"][0]
        found["plain"] = plain_figures(
            table, dict(zip(pool.tolist(), right.tolist(), strict=True)), evaluation
        )
    found["shuffled"] = _shuffled(plan, config, done)
    assert attack.blind is not None
    blind = read_part(attack.blind.part)["blind"]
    found["blind"] = blind_figures(manifest.role[attack.positions], blind, evaluation)
    found["near_duplicates"] = _near_duplicates(plan, table, config)
    if plan.strangers is None:
        found["strangers"] = {
            "note": "codes have one error rate for all images; there is nothing to test"
            if config.uses_key
            else "the MINT head was not trained (loss.lambda_mint = 0)"
        }
    else:
        looked = read_part(plan.strangers.part)
        kinds = {kind: looked[kind] for kind in plan.strangers.look.edits}
        found["strangers"] = stranger_figures(table, kinds, evaluation)
    return found


def _shuffled(plan: _Plan, config: Config, done: Done) -> dict[str, Any]:
    if not plan.heads:
        return {"note": "no image is external: no head can be trained"}
    role, found = plan.attack.manifest.role, []
    for lot, task in zip(plan.lots, plan.heads, strict=True):
        if task.part.name in done.failed:
            continue
        logit = np.full(len(role), np.nan)
        logit[task.look.positions] = read_part(task.part)[f"mint/{PLAIN}"]
        confidence = config.evaluation.confidence
        found.append(shuffled_figures(lot, role, logit, confidence=confidence))
    if not found:
        return {"note": next(iter(done.failed.values()))}
    return over_lots(found)


def _near_duplicates(plan: _Plan, table: ScoreTable, config: Config) -> dict[str, Any]:
    manifest = plan.attack.manifest
    parts = [read_part(task.part) for task in plan.hashes]
    position, hashes = (
        np.concatenate([part[name] for part in parts]) for name in ("position", "hash")
    )
    roles = list(Role)
    number = np.array([roles.index(Role(role)) for role in manifest.role[position].tolist()])
    pairs, near = pairs_across(hashes, number, roles=len(roles), distance=DISTANCE)
    return {"distance": DISTANCE} | duplicate_figures(
        table,
        manifest.sample_id[position],
        number,
        pairs,
        near,
        config.evaluation,
        head_trained=config.loss.lambda_mint > 0,
    )
