"""Several trainings of one recipe as one result: means over seeds, with intervals over seeds.

An interval of one model says how well that model was measured. How the next training would turn
out, only other trainings say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from amint_ray.evaluation.metrics import Interval, mean_over_trainings

_NO_RATE = "task.loss"
"""In nats; every other figure lies between 0 and 1."""


def over_seeds(
    documents: Sequence[Mapping[str, Any]], *, confidence: float, path: str = ""
) -> dict[str, Any]:
    """The same document with each `{value, low, high}` replaced by the mean over the documents.

    Limits are Student's t over the values, cut to [0, 1] where they are of rates. A figure that is
    the same in all documents (a check of the one split that they share, a rate of 0) keeps its own
    interval: that it does not vary does not make it exact. One that some document does not state is
    not stated.

    Args:
        documents: of one model each, alike but for the numbers.
        confidence: of the intervals.
        path: of these in a larger document, with dots.

    Returns:
        Of what is no figure, the common value, or the list of all values where they differ.
    """
    if not documents:
        raise ValueError("there is no document")
    first = documents[0]
    if "value" in first:
        return _mean(documents, confidence=confidence, rate=path != _NO_RATE)
    found: dict[str, Any] = {}
    for key, value in first.items():
        values: list[Any] = [document.get(key) for document in documents]
        if key == "seeds":
            found[key] = len(documents)
        elif all(isinstance(each, Mapping) for each in values):
            below = f"{path}.{key}" if path else key
            found[key] = over_seeds(values, confidence=confidence, path=below)
        else:
            found[key] = value if all(each == value for each in values) else values
    return found


def groups_over_seeds(
    documents: Sequence[Mapping[str, Any]], *, confidence: float
) -> dict[str, Any]:
    """What `by_group.group_figures` gave of each model, combined by the groups' names.

    Args:
        documents: one a model.
        confidence: of the intervals.

    Returns:
        The same with means over models; `images` and `apart` are lists where models differ. A group
        that some model does not have is left out.
    """
    by_name = [{group["group"]: group for group in each["groups"]} for each in documents]
    names = [name for name in by_name[0] if all(name in each for each in by_name)]
    return {
        "groups": [
            over_seeds([each[name] for each in by_name], confidence=confidence) for name in names
        ],
        "ungrouped": [each["ungrouped"] for each in documents],
    }


def _mean(figures: Sequence[Mapping[str, Any]], *, confidence: float, rate: bool) -> dict[str, Any]:
    if all(figure == figures[0] for figure in figures):
        return dict(figures[0])
    values = [figure["value"] for figure in figures if figure["value"] is not None]
    if len(values) < len(figures):
        why = next(figure["note"] for figure in figures if figure["value"] is None)
        stated = f"stated of {len(values)} of {len(figures)} models"
        return Interval.unknown(f"{stated}: {why}").as_dict()
    mean = mean_over_trainings(np.array(values, np.float64), confidence=confidence)
    assert mean.low is not None and mean.high is not None
    low, high = (max(0.0, mean.low), min(1.0, mean.high)) if rate else (mean.low, mean.high)
    return Interval(mean.value, low, high).as_dict()
