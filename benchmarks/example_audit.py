"""The example of a report, docs/example_audit.html: a model of digits and 120 suspects.

    python -m benchmarks.example_audit

Trains the recipe `digits`, puts 60 of its training images and 60 of `test` to it as PNG files in
folders of classes, and copies the report. Nothing of the audit knows which are which.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from amint_ray.config.load import load_config
from amint_ray.contracts import Role
from amint_ray.data.memory import load_memory
from amint_ray.data.sources import open_source
from benchmarks.attacks import amint

_OF_EACH = 60


def main() -> None:
    """Train, audit, and copy."""
    config = load_config("digits", [])
    images, index = load_memory(open_source(config.data), config.data, readers=2)
    with tempfile.TemporaryDirectory(prefix="amint-benchmark-") as name:
        folder = Path(name)
        run = amint(name, ["train", "digits"])
        for role in (Role.MEMBER, Role.TEST):
            for row in np.flatnonzero(index.manifest.role == role.value)[:_OF_EACH]:
                place = folder / "suspects" / str(index.manifest.label[row])
                place.mkdir(parents=True, exist_ok=True)
                file = f"{index.manifest.sample_id[row].rpartition('/')[2]}.png"
                Image.fromarray(images[row, 0]).save(place / file)
        command = [sys.executable, "-m", "amint_ray.cli", "audit", run["model_uri"], "suspects"]
        done = subprocess.run(
            [*command, "--json"], cwd=name, capture_output=True, text=True, check=False
        )
        document = json.loads(done.stdout)
        shutil.copy(folder / document["report"], "docs/example_audit.html")
    print(f"{document['verdict']}, p = {document['p_value']:.3g}", file=sys.stderr)


if __name__ == "__main__":
    main()
