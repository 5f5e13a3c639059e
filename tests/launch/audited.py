"""A registered model and its images as suspects, without Ray and without MLflow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from amint_ray.config.load import load_config
from amint_ray.contracts import Role
from amint_ray.data.keys import MOST_BITS, codes, image_content, load_key
from amint_ray.data.loading import MemoryStreams
from amint_ray.data.memory import load_memory
from amint_ray.data.roles import Manifest
from amint_ray.data.sources import open_source
from amint_ray.launch.codes import with_key
from amint_ray.model.joint import plan_architecture
from amint_ray.tracking.folder import Code, write_folder
from amint_ray.train.loop import REFERENCE, LocalContext, train
from amint_ray.train.state import WEIGHTS

SHARES = "data.shares={member: 0.25, withheld: 0.15, external: 0.2, calibration: 0.2, test: 0.2}"


@dataclass
class Audited:
    """The model's folder, and all images that it might be asked about."""

    model: Path
    images: npt.NDArray[np.uint8]
    manifest: Manifest

    def suspects(self, folder: Path, *roles: Role, most: int = 10_000) -> Path:
        """Images of these roles as PNG files in folders of classes; gives the folder."""
        rows = np.flatnonzero(np.isin(self.manifest.role, [role.value for role in roles]))[:most]
        for row in rows:
            place = folder / str(self.manifest.label[row])
            place.mkdir(parents=True, exist_ok=True)
            name = self.manifest.sample_id[row].replace("/", "_")
            Image.fromarray(self.images[row, 0]).save(place / f"{name}.png")
        return folder


def train_and_write(folder: Path, *overrides: str) -> Audited:
    """A model of digits, trained a little in this process; with codes, where there is a key."""
    config = with_key(load_config("digits", ["train.epochs=6", SHARES, *overrides]))
    source = open_source(config.data)
    images, index = load_memory(source, config.data, readers=1)
    architecture = plan_architecture(config, len(index.class_names))
    secret = code = None
    binary = config.mint.objective != "keyed"
    if config.uses_key:
        key = load_key(key_file=config.mint.key_file, key_env=config.mint.key_env)
        keyed = config.mint.keyed
        assert keyed.fingerprint is not None
        secret = codes(key, [image_content(image) for image in images], MOST_BITS)
        code = Code(keyed.fingerprint, keyed.code_from, keyed.bits, membership=binary)
    streams = MemoryStreams(images, index.manifest, config, rank=0, world_size=1, codes=secret)
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trained = train(config, architecture, streams, LocalContext(checkpoints))
    torch.set_num_threads(threads)
    last = max(checkpoints.glob("checkpoint_*"))
    kept = last / REFERENCE
    write_folder(
        folder / "model",
        weights=last / WEIGHTS,
        architecture=architecture,
        data=config.data,
        class_names=index.class_names,
        calibration=trained.scores.of(Role.CALIBRATION).mint_logit if binary else np.empty(0),
        reference=kept if kept.is_file() else None,
        code=code,
    )
    return Audited(folder / "model", images, index.manifest)
