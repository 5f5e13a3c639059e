"""Joint batches of D and E from images in memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import numpy.typing as npt
import torch

from amint_ray.config.schema import Config
from amint_ray.contracts import Batch, Role, ScoreBatch, UserError
from amint_ray.data.roles import Manifest
from amint_ray.data.transforms import crop_and_flip, to_model_input

Positions = npt.NDArray[np.int64]


class MemoryStreams:
    """One rank's part of an in-memory data set; a `contracts.Streams`.

    A global batch is the same whatever the number of workers: rank r takes its rows r, r + w, ….
    The order is a function of seed, epoch and step alone, so a resumed run goes on exactly.
    """

    def __init__(
        self,
        images: npt.NDArray[np.uint8],
        manifest: Manifest,
        config: Config,
        *,
        rank: int,
        world_size: int,
    ) -> None:
        self._images = images
        self._manifest = manifest
        self._config = config
        self._rank = rank
        self._world_size = world_size
        role = manifest.role
        self._told = role != Role.WITHHELD.value
        self._d = np.flatnonzero(np.isin(role, [r.value for r in Role if r.trains_task]))
        self._e = np.flatnonzero(role == Role.EXTERNAL.value)
        self._external_rows = config.external_rows
        self._round: tuple[int, Positions] = (-1, self._e)
        self.steps_per_epoch = len(self._d) // config.train.batch_size

    def train_batches(self, epoch: int) -> Iterator[Batch]:
        """The joint batches of one epoch: D once (less a last incomplete batch), E in step with it.

        E goes round on its own: it is shuffled anew whenever it was seen in full.
        """
        size, seed = self._config.train.batch_size, self._config.train.seed
        order = _shuffled(self._d, seed, "task", epoch)
        for step in range(self.steps_per_epoch):
            d = order[step * size : (step + 1) * size]
            e = self._external(epoch * self.steps_per_epoch + step)
            yield self._batch(d, e, epoch * self.steps_per_epoch + step)

    def score_batches(self, roles: Collection[Role]) -> Iterator[ScoreBatch]:
        """This rank's part of the samples with these roles, in the manifest's order."""
        wanted = np.flatnonzero(np.isin(self._manifest.role, [role.value for role in roles]))
        mine = wanted[self._rank :: self._world_size]
        size = self._config.evaluation.batch_size
        for start in range(0, len(mine), size):
            rows = mine[start : start + size]
            yield ScoreBatch(
                images=to_model_input(self._pixels(rows), self._config.data),
                labels=torch.from_numpy(self._manifest.label[rows]),
                sample_id=self._manifest.sample_id[rows],
                role=self._manifest.role[rows],
            )

    def _external(self, global_step: int) -> Positions:
        """The E rows of one global step: the next stretch of an endless chain of permutations."""
        if self._external_rows == 0:
            return np.empty(0, dtype=np.int64)
        wanted = np.arange(self._external_rows) + global_step * self._external_rows
        rounds = wanted // len(self._e)
        return np.concatenate(
            [
                self._external_round(int(r))[wanted[rounds == r] % len(self._e)]
                for r in np.unique(rounds)
            ]
        )

    def _external_round(self, number: int) -> Positions:
        """E in the order of its `number`-th pass; kept, since many steps share a pass."""
        if self._round[0] != number:
            seed = self._config.train.seed
            self._round = (number, _shuffled(self._e, seed, "external", number))
        return self._round[1]

    def _batch(self, d: Positions, e: Positions, global_step: int) -> Batch:
        """This rank's rows of a global batch: D as the task sees it, D plain if that differs, E."""
        config, mine = self._config, slice(self._rank, None, self._world_size)
        with_head = config.loss.lambda_mint > 0
        plain_rows = config.plain_rows
        mine_d, mine_e = d[mine], e[mine]
        task, of_head = self._pixels(mine_d), [mine_d, mine_e] if plain_rows else [mine_e]
        others = self._pixels(np.concatenate(of_head))
        if config.data.augment == "crop_flip":
            task = self._augmented(task, "task", len(d), global_step)
            if not plain_rows:
                others = self._augmented(others, "external", len(e), global_step)
        rows = np.concatenate([mine_d, *of_head])
        read = np.concatenate([mine_d, mine_e])
        told = int(self._told[d].sum()) + len(e) if with_head else 0
        return Batch(
            images=to_model_input(torch.cat([task, others]), config.data),
            labels=torch.from_numpy(self._manifest.label[rows]),
            n_task=len(mine_d),
            head_from=len(mine_d) if plain_rows else 0,
            membership=torch.cat([torch.ones(len(mine_d)), torch.zeros(len(mine_e))]),
            told=torch.from_numpy(self._told[read]),
            sample_id=self._manifest.sample_id[rows],
            task_per_worker=len(d) / self._world_size,
            told_per_worker=told / self._world_size,
        )

    def _augmented(
        self, images: torch.Tensor, stream: str, rows: int, global_step: int
    ) -> torch.Tensor:
        """This rank's images, moved by what is drawn for all `rows` of the global batch."""
        random = _random(self._config.train.seed, f"augment {stream}", global_step)
        reach = max(1, self._config.data.image_size // 8)
        shift = random.integers(-reach, reach + 1, (rows, 2))[self._rank :: self._world_size]
        flip = (random.random(rows) < 0.5)[self._rank :: self._world_size]
        return crop_and_flip(images, shift=torch.from_numpy(shift), flip=torch.from_numpy(flip))

    def _pixels(self, rows: Positions) -> torch.Tensor:
        return torch.from_numpy(self._images[rows])


def check_roles(manifest: Manifest, config: Config) -> None:
    """Whether the split can be trained and measured on at all.

    Raises:
        UserError: a role that is needed is empty, or a batch would lack D or E.
    """
    if config.loss.lambda_mint > 0 and config.external_rows == 0:
        raise UserError(
            f"train.external_ratio = {config.train.external_ratio:g}: less than one image of E for "
            f"the {config.train.batch_size} of D in a batch; make one of the two larger"
        )
    needed = [Role.MEMBER, Role.CALIBRATION, Role.TEST]
    if config.loss.lambda_mint > 0:
        needed.append(Role.EXTERNAL)
    counts = manifest.counts
    for role in needed:
        if counts[role.value] == 0:
            raise UserError(
                f"data: no image has the role {role.value!r} (counts: {counts}); bring other"
                f" images or an official test split, or raise data.shares.{role.value} and lower "
                "another (the five add up to 1)"
            )
    d = sum(counts[role.value] for role in Role if role.trains_task)
    if d < config.train.batch_size:
        raise UserError(
            f"data: D has {d} images, fewer than train.batch_size = {config.train.batch_size}; "
            "make the batch smaller or the shares of member and withheld larger"
        )


def _shuffled(positions: Positions, seed: int, stream: str, number: int) -> Positions:
    """A permutation that is a function of its arguments alone."""
    return _random(seed, stream, number).permutation(positions)


def _random(seed: int, stream: str, number: int) -> np.random.Generator:
    return np.random.default_rng([seed, int.from_bytes(stream.encode(), "little"), number])
