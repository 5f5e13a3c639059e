"""The heart of the package runs where there is little else than torch and timm."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys

ABSENT = {
    "ray", "mlflow", "pydantic", "omegaconf", "pyarrow", "scipy", "sklearn", "pandas", "click",
    "rich",
}


class Hiding:
    # A finder that does not find them (one that raised would trip `importlib.util.find_spec`).

    def __init__(self, finder):
        self._finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            return None
        return self._finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self._finder, name)


sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
for name in ABSENT:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} is there")

import numpy as np
import torch

from amint_ray.contracts import Batch
from amint_ray.model.joint import AuditedModel, plan
from amint_ray.model.mint_head import HeadSpec
from amint_ray.train.flops import count_flops
from amint_ray.train.objective import Objective
from amint_ray.train.step import train_step
from amint_ray.train.update import Update
from amint_ray.train.weighting import GradNorm

torch.set_num_threads(1)
torch.manual_seed(0)
architecture = plan(
    "vit_tiny_patch16_224",
    options={"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2},
    num_classes=3,
    input_shape=(3, 16, 16),
    taps=["middle"],
    head=HeadSpec("attention", channels=4, queries=2, hidden=8),
)
model = AuditedModel(architecture).train()
objective = Objective(weighting=GradNorm(alpha=1.5, decay=0.9))
model.watch_gradients(objective.record)
update = Update(model, torch.optim.AdamW(model.parameters(), 1e-2))
batch = Batch(
    images=torch.randn(5, 3, 16, 16),
    labels=torch.tensor([0, 1, 2, 0, 1]),
    n_task=3,
    head_from=0,
    membership=torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]),
    told=torch.ones(5, dtype=torch.bool),
    sample_id=np.array(list("abcde")),
    task_per_worker=3.0,
    told_per_worker=5.0,
)
before = [p.detach().clone() for p in model.parameters()]
losses = [train_step(model, batch, objective, update)[[0, 3]] for _ in range(20)]
assert (losses[-1] < losses[0]).all(), losses
assert all(not torch.equal(p, q) for p, q in zip(before, model.parameters()))
assert count_flops(architecture, n_task=3, n_rows=5).ratio > 1
print("trained")
"""


def test_a_step_runs_with_torch_and_timm_alone() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["trained"]
