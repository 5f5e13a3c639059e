"""What Ray runs of an audit: a process that has the model, and looks at chunks of the suspects.

Each chunk becomes one file in storage, whole or not at all: what is there is not done again.
"""

from __future__ import annotations

import hashlib
import io
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import ray
import torch

from amint_ray.audit.suspects import EvidenceChoice
from amint_ray.config.data_schema import Data
from amint_ray.contracts import RunError, first_line
from amint_ray.data.images import BadImage, decode, perceptual_hash
from amint_ray.data.keys import image_content, perceptual_content
from amint_ray.data.sources import DamagedError, Fault, Raw
from amint_ray.data.transforms import Views, to_model_input
from amint_ray.evaluation.outputs import outputs_of, stack_views
from amint_ray.evaluation.views import VIEWS, view
from amint_ray.launch.audit_suspects import Found
from amint_ray.model.joint import Architecture, AuditedModel
from amint_ray.storage import Location, write_atomically

Arrays = dict[str, npt.NDArray[Any]]
UNTOLD = "untold.label_confidence"
"""Of the outputs by the model's own prediction the others are those by the label."""
CODE_LOGITS, CODE_CONTENT = "code_logits", "code_content"
"""Of a head that says codes: (n, bits) float32, and (n, bytes) what each image's code is made from.
The codes themselves only the key's holder knows."""
_ROW_BY_ROW = {"taps", CODE_LOGITS, CODE_CONTENT}
"""Of the columns of two dimensions, those whose first is the images."""

_DECODERS = 2
"""Threads that decode the next images while the model looks at these; decoding lets go of Python's
lock only now and then, so that more would not be faster."""


@dataclass(frozen=True)
class Asked:
    """What each process is told once.

    Attributes:
        found: the suspects.
        data: how images become the model's input.
        evidence: `head`: nothing behind the deepest tap is computed.
        batch_size: images in a forward pass.
        projection: of the taps' means.
        needs_labels: whether the head reads the task loss; then it is silent about images without.
        place: of the files.
        code_from: what of an image its code is made from; None: the head says no codes.
    """

    found: Found
    data: Data
    evidence: EvidenceChoice
    batch_size: int
    projection: npt.NDArray[np.float32]
    needs_labels: bool
    place: Location
    code_from: Literal["content", "perceptual"] | None = None


class Looker:
    """The actor; it has the model from its first call on.

    Ray does not start an actor again whose own arguments are gone from its object store, so it has
    none.
    """

    _examiner: Examiner | None = None

    def look(self, told: list[Any], name: str, shards: Sequence[int]) -> int:
        """As `Examiner.look`.

        Args:
            told: references to an `Asked`, and to (architecture, weights).
            name: of the file.
            shards: which.
        """
        if self._examiner is None:
            asked, (architecture, weights) = ray.get(told)
            device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
            self._examiner = Examiner(asked, architecture, weights, device)
        return self._examiner.look(name, shards)


class Examiner:
    """The model, and how it looks at suspects."""

    def __init__(
        self,
        asked: Asked,
        architecture: Architecture,
        weights: Mapping[str, torch.Tensor],
        device: torch.device,
    ) -> None:
        """Build the model.

        Args:
            asked: what is asked.
            architecture: of the model.
            weights: of the model.
            device: where it is to run.
        """
        self._asked, self._device = asked, device
        built = AuditedModel(architecture)
        built.load_state_dict(weights)
        self._model = built.to(device).eval().requires_grad_(False)
        self._views = Views(asked.data)
        self._pool = ThreadPoolExecutor(_DECODERS)

    def look(self, name: str, shards: Sequence[int]) -> int:
        """Look at some shards, and leave a file.

        Args:
            name: of the file.
            shards: which.

        Returns:
            How many images that was.

        Raises:
            RunError: they cannot be read now, or the file cannot be written.
        """
        columns: dict[str, list[Any]] = {}
        rows = 0
        for batch in self._batches(shards):
            looked = self._look(batch) if batch.pixels else {}
            for key, values in {**batch.columns(), **looked}.items():
                columns.setdefault(key, []).append(values)
            rows += len(batch.label)
        arrays = {
            key: np.concatenate(
                parts, axis=1 if parts[0].ndim == 2 and key not in _ROW_BY_ROW else 0
            )
            for key, parts in columns.items()
        }
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        try:
            with write_atomically(self._asked.place, f"{name}.npz") as file:
                file.write(buffer.getvalue())
        except OSError as error:
            raise RunError(f"{self._asked.place.uri}: {first_line(error)}") from error
        return rows

    def _batches(self, shards: Sequence[int]) -> Iterator[_Read]:
        """The shards' images in batches; the next are decoded while the model looks at one.

        A shard is read once, as a whole: of Parquet no less than a row group can be read.
        """
        ahead: deque[Future[_Read]] = deque()
        following = self._pool.submit(self._fetch, shards[0])
        for place in range(len(shards)):
            labels, stored = following.result()
            if place + 1 < len(shards):
                following = self._pool.submit(self._fetch, shards[place + 1])
            for first in range(0, len(stored), self._asked.batch_size):
                some = slice(first, first + self._asked.batch_size)
                ahead.append(self._pool.submit(self._decode, labels[some], stored[some]))
                if len(ahead) > _DECODERS:
                    yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def _fetch(self, shard: int) -> tuple[npt.NDArray[np.int64], Sequence[Raw]]:
        """Labels and encoded images of a shard.

        Raises:
            RunError: storage does not answer.
        """
        found, rows = self._asked.found, self._asked.found.source.shards[shard].rows
        try:
            stored: Sequence[Raw] = found.source.read(shard, range(rows))
        except DamagedError as error:
            stored = [Fault(str(error))] * rows
        except OSError as error:
            raise RunError(f"suspects: {first_line(error)}") from error
        return found.labels(shard), stored

    def _decode(self, label: npt.NDArray[np.int64], stored: Sequence[Raw]) -> _Read:
        """Decode images and bring them to the model's size."""
        read = _Read(label)
        for place, raw in enumerate(stored):
            try:
                if isinstance(raw, Fault):
                    raise BadImage(raw.reason)
                rgb = decode(raw, max_megapixels=self._asked.data.max_megapixels)
            except BadImage as error:
                read.problems[place] = str(error)
                continue
            pixels = self._views.plain(rgb)
            read.pixels.append(pixels)
            digest = hashlib.blake2b(pixels.numpy().tobytes(), digest_size=8).digest()
            read.content[place] = int.from_bytes(digest, "little")
            if self._asked.code_from == "perceptual":
                read.code_content.append(perceptual_content(perceptual_hash(rgb)))
            elif self._asked.code_from == "content":
                read.code_content.append(image_content(pixels.numpy()))
        return read

    @torch.inference_mode()
    def _look(self, batch: _Read) -> Arrays:
        """What the model says of the images that could be read, in their order."""
        asked, model = self._asked, self._model
        usable = np.array([not problem for problem in batch.problems])
        labels = batch.label[usable]
        pixels = torch.stack(batch.pixels)
        images = to_model_input([pixels.to(self._device)], asked.data)
        given = torch.from_numpy(labels.clip(0)).to(self._device)
        found: Arrays = {}
        with model.leaving_means() as means:
            if asked.evidence == "head":
                said = model.membership(images, given)
                finite = _finite(said)
            else:
                seen = [model(images, labels=given)]
                said = seen[0][1]
                seen += [model(view(images, number), labels=given) for number in range(1, VIEWS)]
                every = [logits.double().cpu().numpy() for logits, _ in seen]
                finite = _finite(seen[0][0]) & _finite(said)
                found["prediction"] = every[0].argmax(1)
                told, untold = (
                    stack_views([outputs_of(logits, classes) for logits in every])
                    for classes in (labels, np.full_like(labels, -1))
                )
                found |= {f"told.{name}": values for name, values in vars(told).items()}
                found[UNTOLD] = untold.label_confidence
        membership, of_codes = model.parted(said)
        scores = membership.double().cpu().numpy()
        if asked.needs_labels:
            scores = np.where(labels >= 0, scores, np.nan)
        if of_codes is not None:
            logits = of_codes.float().cpu().numpy()
            if asked.needs_labels:
                logits[labels < 0] = np.nan
            found[CODE_LOGITS] = logits
            found[CODE_CONTENT] = np.stack([np.frombuffer(c, np.uint8) for c in batch.code_content])
        found |= {"mint_logit": scores, "finite": finite.cpu().numpy()}
        found["taps"] = means[0].cpu().numpy() @ asked.projection
        return found


def _finite(said: torch.Tensor) -> torch.Tensor:
    """(n,) whether all of (n, …) is finite."""
    return torch.isfinite(said).flatten(1).all(1) if said.ndim > 1 else torch.isfinite(said)


class _Read:
    """Some suspects, read.

    Attributes:
        label: (n,) the model's class indices; −1: none.
        problems: why each cannot be looked at; empty where it can.
        content: 64-bit hash of each one's pixels at the model's size; 0 where there are none.
        pixels: (channels, size, size) uint8 of those that can be looked at.
        code_content: of those, what their codes are made from; empty where the head says none.
    """

    def __init__(self, label: npt.NDArray[np.int64]) -> None:
        self.label = label
        self.problems = [""] * len(label)
        self.content = [0] * len(label)
        self.pixels: list[torch.Tensor] = []
        self.code_content: list[bytes] = []

    def columns(self) -> Arrays:
        """A row a suspect, in the source's order, whether it could be read or not."""
        return {
            "label": self.label,
            "problem": np.array(self.problems, np.str_),
            "content": np.array(self.content, np.uint64),
        }
