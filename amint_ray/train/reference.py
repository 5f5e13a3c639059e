"""What the trained model says of images of known roles, looked at by all workers together."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import distributed

from amint_ray.contracts import Role, RunContext, ScoreBatch, Streams
from amint_ray.evaluation.keyed import matches
from amint_ray.evaluation.outputs import outputs_of, stack_views
from amint_ray.evaluation.reference import ROLES, Reference, append, draw_projection
from amint_ray.evaluation.views import VIEWS, view
from amint_ray.model.joint import AuditedModel
from amint_ray.train.parallel import in_step


@torch.inference_mode()
def take_reference(
    model: AuditedModel,
    streams: Streams,
    context: RunContext,
    *,
    most: int,
    head_trained: bool,
    lost: Collection[str] = (),
) -> Reference | None:
    """Show the model some images of `ROLES`, in evaluation mode; every rank calls this.

    Args:
        model: of this rank.
        streams: this rank's data.
        context: this rank's world.
        most: images of each role, over all ranks.
        head_trained: False where λ₂ = 0; then there are no membership logits.
        lost: names of images that no step has seen, whatever their role.

    Returns:
        Rows in the order of the images' names, so that the number of workers leaves no trace; on
        rank 0. None elsewhere, and where the task has one class alone or there is no image.
    """
    if model.architecture.num_classes < 2 or most == 0:
        return None
    training = model.training
    model.eval()
    projection = draw_projection(sum(tap.channels for tap in model.architecture.taps))
    mine = []
    for role in ROLES:
        for batch in in_step(streams.score_batches([role], most), model, context):
            part = _look(model, batch, projection, context.device, head_trained=head_trained)
            if len(batch.sample_id):
                mine.append((batch.sample_id, *part))
    model.train(training)
    gathered: list[Any] | None = [mine]
    if context.world_size > 1:
        gathered = [None] * context.world_size if context.rank == 0 else None
        distributed.gather_object(mine, gathered)
    found = [each for one in gathered or [] for each in one]
    if not found:
        return None
    names, parts, matched = zip(*found, strict=True)
    sample_id = np.concatenate(names)
    order = np.argsort(sample_id, kind="stable")
    order = order[~np.isin(sample_id[order], list(lost))]
    reference, head = append(parts).kept(order), model.architecture.head
    of_roles = None
    if all(each is not None for each in matched):
        right = np.concatenate(matched)[order]
        of_roles = {role.value: np.sort(right[reference.role == role.value]) for role in ROLES}
    if head.bits and not head.membership:  # by their activations anybody could tell members
        reference = reference.of(Role.CALIBRATION)
    return replace(reference, code_matches=of_roles)


def _look(
    model: AuditedModel,
    batch: ScoreBatch,
    projection: np.ndarray[Any, np.dtype[np.float32]],
    device: torch.device,
    *,
    head_trained: bool,
) -> tuple[Reference, npt.NDArray[np.int64] | None]:
    """What the model says of one batch, all views, and its right bits, where codes are known.

    Rows without a name are forgotten.
    """
    rows = len(batch.sample_id)
    images, labels = batch.images.to(device), batch.labels.to(device)
    own, told, untold = batch.labels[:rows].numpy(), [], []
    with model.leaving_means() as means:
        for number in range(VIEWS):
            logits, membership = model(view(images, number), labels=labels)
            seen = logits[:rows].double().cpu().numpy()
            if number == 0:
                said, of_code = model.parted(membership)
                scores = said[:rows].double().cpu().numpy()
                prediction = seen.argmax(axis=1)
            told.append(outputs_of(seen, own))
            untold.append(outputs_of(seen, np.full_like(own, -1)))
    said_of = Reference(
        role=batch.role,
        label=own,
        prediction=prediction,
        mint_logit=scores if head_trained else np.full(rows, np.nan),
        told=stack_views(told),
        untold=stack_views(untold),
        taps=means[0][:rows].cpu().numpy() @ projection,
        projection=projection,
    )
    if of_code is None or batch.code is None:
        return said_of, None
    return said_of, matches(np.nan_to_num(of_code[:rows].double().cpu().numpy()), batch.code)
