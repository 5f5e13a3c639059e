"""What an attack consists of: whom it looks at, and which models it trains for that."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from amint_ray.attacks.evidence import EDITS, PLAIN
from amint_ray.attacks.shadows import POOL, assign, shadow_roles
from amint_ray.config.attack import AttackSettings
from amint_ray.config.load import training_fingerprint
from amint_ray.config.schema import Config
from amint_ray.contracts import Role, UserError
from amint_ray.data.roles import Manifest
from amint_ray.evaluation.outputs import Outputs
from amint_ray.evaluation.views import VIEWS
from amint_ray.launch.attack_parts import (
    Function,
    Task,
    code_fingerprint,
    fingerprint_of,
    is_done,
)
from amint_ray.launch.attack_worker import (
    Look,
    Part,
    look_at,
    look_blindly,
    train_and_look,
    train_head_and_look,
)
from amint_ray.storage import Location

_AT_ONCE = 20_000
"""Images that one look takes: large pools are looked at by several tasks."""
_BYTES_A_NUMBER = 4
_OUTPUTS = len(fields(Outputs))
_BESIDE = 4
"""The MINT head's logit and the hash of the pixels, in numbers of that size."""


@dataclass(frozen=True)
class AttackPlan:
    """All parts of an attack.

    Attributes:
        config: of the run, settled.
        settings: of the attack.
        manifest: all samples and their roles.
        positions: (n,) samples that are looked at, in the order of all results.
        edits: what they are shown after; the first is none.
        place: the attack's folder.
        own: what the audited model says, in parts of `positions`.
        passive: a head trained afterwards; None: not asked for.
        blind: a classifier that never sees the model; None: not asked for.
        snapshots: the run's earlier checkpoints, oldest first.
        twin: the same run with λ₂ = 0; None: not compared with.
        shadows: of the kind that attacks the audited model.
        twin_shadows: of the kind that attacks the twin.
        inside: (S, n) whether sample j of `positions` trains shadow i.
    """

    config: Config
    settings: AttackSettings
    manifest: Manifest
    positions: npt.NDArray[np.int64]
    edits: tuple[str, ...]
    place: Location
    own: list[Task]
    passive: Task | None
    blind: Task | None
    snapshots: list[Task]
    twin: Task | None
    shadows: list[Task]
    twin_shadows: list[Task]
    inside: npt.NDArray[np.bool_]

    @property
    def tasks(self) -> list[Task]:
        """All of them, each once, what is quick first."""
        single = [task for task in (self.blind, self.twin, self.passive) if task is not None]
        pairs = [*self.shadows]
        pairs += [task for task in self.twin_shadows if task not in self.shadows]
        return [*self.own, *self.snapshots, *single, *pairs]

    @property
    def bytes_needed(self) -> int:
        """Of storage, for what is not there yet."""
        numbers = sum(
            _numbers(task) * len(task.look.positions)
            for task in self.tasks
            if not is_done(task.part)
        )
        return numbers * len(self.edits) * _BYTES_A_NUMBER


def teaches_codes(config: Config, settings: AttackSettings, needs: Collection[str]) -> bool:
    """Whether shadow models learn images' codes as the run did, for which its key is needed.

    Args:
        config: the run's configuration.
        settings: of the attack.
        needs: what the methods read.
    """
    alike = settings.shadows > 0 and settings.shadow_loss == "same"
    return config.uses_key and alike and "shadows" in needs


def plan_attack(
    config: Config,
    settings: AttackSettings,
    manifest: Manifest,
    storage: Location,
    *,
    needs: Collection[str],
    model: str,
    checkpoints: Sequence[Location],
) -> AttackPlan:
    """Lay out all parts of an attack; nothing is run or written.

    Args:
        config: the run's configuration, settled.
        settings: of the attack.
        manifest: all samples with the run's roles.
        storage: what the results are kept in.
        needs: what the methods read (`attacks.method.Method.needs`).
        model: hash of the audited model.
        checkpoints: weights of the run's earlier checkpoints, oldest first.

    Raises:
        UserError: the pool is too small for shadow models.
    """
    positions = np.flatnonzero(np.isin(manifest.role, [role.value for role in POOL]))
    edits = (PLAIN, *EDITS) if settings.edits else (PLAIN,)
    config = _for_parts(config)
    depends_on = {
        "code": code_fingerprint(),
        "manifest": manifest.fingerprint,
        "order": fingerprint_of({"sample_id": manifest.sample_id.tolist()}),
        "edits": edits,
        "evaluation": config.data.model_dump(mode="json", include={"image_size", "crop_pct"}),
    }
    kept = {"model": model, "training": training_fingerprint(config), **depends_on}
    place = storage.below(f"attacks/{fingerprint_of(kept)}")
    labels = manifest.label[positions]

    everything = Look(positions, labels, edits)

    def whole(name: str, function: Function, look: Look = everything, **changes: Any) -> Task:
        part = Part(name=name, place=place, config=config)
        return Task(replace(part, **changes), look, function)

    own = []
    for number, start in enumerate(range(0, len(positions), _AT_ONCE)):
        at = slice(start, start + _AT_ONCE)
        look = Look(positions[at], labels[at], edits, VIEWS)
        own.append(whole(f"model-{number:03d}", look_at, look))

    def shadow_models(*, plain: bool) -> list[Task]:
        given = (config, settings, manifest, storage, positions, inside, depends_on, everything)
        return _shadows(*given, plain=plain)

    joint = config.loss.lambda_mint > 0
    compared = settings.compare_plain and joint
    epochs = config.train.epochs
    inside = np.zeros((0, len(positions)), np.bool_)
    shadows: list[Task] = []
    twin_shadows: list[Task] = []
    if settings.shadows and "shadows" in needs:
        inside = _inside(manifest, positions, settings)
        plain = not joint or settings.shadow_loss == "plain"
        shadows = shadow_models(plain=plain)
        twin_shadows = shadows if plain else shadow_models(plain=True) if compared else []
    return AttackPlan(
        config=config,
        settings=settings,
        manifest=manifest,
        positions=positions,
        edits=edits,
        place=place,
        own=own,
        passive=whole("passive", train_head_and_look, config=_told(config), epochs=epochs)
        if "passive" in needs and manifest.counts[Role.EXTERNAL.value]
        else None,
        blind=whole("blind", look_blindly, roles=_codes(manifest.role))
        if "blind" in needs
        else None,
        snapshots=[
            whole(f"snapshot-{weights.path.rsplit('/', 2)[-2]}", look_at, weights=weights)
            for weights in checkpoints
        ],
        twin=whole("twin", train_and_look, config=_plain(config), epochs=epochs)
        if compared
        else None,
        shadows=shadows,
        twin_shadows=twin_shadows,
        inside=inside,
    )


def _numbers(task: Task) -> int:
    """That are kept of an image and edit: φ alone of a shadow, all outputs by view of others."""
    of_shadow = task.part.roles is not None
    return 1 if of_shadow else task.look.views * _OUTPUTS + _BESIDE


def _inside(
    manifest: Manifest, positions: npt.NDArray[np.int64], settings: AttackSettings
) -> npt.NDArray[np.bool_]:
    content, role = manifest.content[positions], manifest.role[positions]
    trained = np.isin(role, [each.value for each in Role if each.trains_task])
    try:
        return assign(
            content,
            inside=len(np.unique(content[trained])),
            shadows=settings.shadows,
            seed=settings.seed,
        )
    except UserError as error:
        raise UserError(f"attack.shadows = {settings.shadows}: {error}") from error


def _shadows(
    config: Config,
    settings: AttackSettings,
    manifest: Manifest,
    storage: Location,
    positions: npt.NDArray[np.int64],
    inside: npt.NDArray[np.bool_],
    depends_on: dict[str, Any],
    look: Look,
    *,
    plain: bool,
) -> list[Task]:
    """Trainings of the run's recipe on other images; kept by what they depend on, not by name.

    None depends on how many there are (`assign`): of more, those that are there are used again.
    """
    config = _plain(config) if plain else config
    seedless = config.model_copy(update={"train": config.train.model_copy(update={"seed": 0})})
    kept = {
        "training": training_fingerprint(seedless),
        "seed": settings.seed,
        **depends_on,
    }
    place = storage.below(f"shadows/{fingerprint_of(kept)}")
    # Numbers in the hashes' own order: each shadow sorts them, and texts take long to sort.
    _, content = np.unique(manifest.content, return_inverse=True)
    withheld = len(np.unique(content[manifest.role == Role.WITHHELD.value]))
    tasks = []
    for number, row in enumerate(inside):
        everywhere = np.zeros(len(manifest.role), np.bool_)
        everywhere[positions] = row
        seed = _seed(settings.seed, number)
        roles = shadow_roles(manifest.role, content, everywhere, withheld=withheld, seed=seed)
        train = config.train.model_copy(update={"seed": seed})
        part = Part(
            name=f"{'plain' if plain else 'joint'}-{number:03d}",
            place=place,
            config=config.model_copy(update={"train": train}),
            roles=_codes(roles),
            epochs=config.train.epochs,
        )
        tasks.append(Task(part, look, train_and_look))
    return tasks


def _codes(role: npt.NDArray[np.str_]) -> npt.NDArray[np.uint8]:
    """A byte a sample instead of a word."""
    return np.select([role == each.value for each in Role], range(len(Role))).astype(np.uint8)


def _seed(seed: int, number: int) -> int:
    """Of a shadow's weights and order; the same for both kinds, which makes them pairs."""
    digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1


def _for_parts(config: Config) -> Config:
    """The run's configuration for a training in one process that keeps no checkpoint."""
    train = config.train.model_copy(
        update={"checkpoint_every": config.train.epochs, "checkpoint_steps": None}
    )
    evaluation = config.evaluation.model_copy(update={"select_every": None})
    tracking = config.tracking.model_copy(update={"enabled": False})
    cluster = config.cluster.model_copy(update={"workers": 1})
    return config.model_copy(
        update={
            "train": train,
            "evaluation": evaluation,
            "tracking": tracking,
            "cluster": cluster,
        }
    )


def _plain(config: Config) -> Config:
    return config.model_copy(update={"loss": config.loss.model_copy(update={"lambda_mint": 0.0})})


def _told(config: Config) -> Config:
    """With a λ₂ that lets batches have E, where the run had none, and without codes."""
    mint = config.mint.model_copy(update={"objective": "binary"})
    loss = config.loss
    if loss.lambda_mint == 0:
        loss = loss.model_copy(update={"lambda_mint": 1.0})
    return config.model_copy(update={"mint": mint, "loss": loss})
