"""RMIA: how often a sample outdoes samples of the population, each against its own prior.

ratio_x = p(x|θ) / p(x), p being the probability of the label; p(x) is its mean over models that
may or may not have trained on x. The paper's score of x is the share of population samples z with
ratio_x / ratio_z > γ. The population is `calibration`, unedited whatever happened to x.

That share rises with ratio_x, in steps: where a model is sure of most labels, nearly all samples
share the score 0. Among equals the ratio itself decides here, which changes no other order: the
order of the scores is that of the ratios, whatever γ is.
"""

from __future__ import annotations

import functools

import numpy as np
from scipy.special import expit, logsumexp

from amint_ray.attacks.evidence import PLAIN, Evidence, Mask, Shadows
from amint_ray.attacks.method import Method
from amint_ray.attacks.yeom import log_probability
from amint_ray.contracts import Role
from amint_ray.evaluation.outputs import Scores

GAMMA = 2.0
"""The paper's γ."""
OFFLINE_A = 0.3
"""The paper's a: offline, p_in is taken as a·p_out + (1 − a)."""

_WITHIN = 0.999
"""Of a step of the share, for what decides among equals."""

_SOURCE = (
    "Zarifzadeh, Liu, Shokri: Low-Cost High-Power Membership Inference Attacks, ICML 2024 "
    "(PMLR 235)"
)


def _score(evidence: Evidence, edit: str, *, online: bool) -> Scores:
    """Share of z with ratio_x / ratio_z > γ, and less than a step more by ratio_x.

    A calibration image, which never outdoes itself, is one of its own population. A sample that no
    shadow trained on (online) or that all did is not scored, nor in the population.
    """
    assert evidence.shadows is not None
    ratio = _log_ratio(evidence, edit, online=online)
    among = evidence.of(Role.CALIBRATION)
    plain = ratio if edit == PLAIN else _log_ratio(evidence, PLAIN, online=online)
    population = plain[among & np.isfinite(plain)]
    if not len(population):
        return np.full(len(evidence), np.nan)
    outdone = np.searchsorted(np.sort(population), ratio - np.log(GAMMA), side="left")
    score = (outdone + _WITHIN * expit(ratio)) / len(population)
    return np.where(np.isfinite(ratio), score, np.nan)


def _log_ratio(evidence: Evidence, edit: str, *, online: bool) -> Scores:
    """Log p(x|θ) − log p(x): online p(x) = ½(p_in + p_out), offline ½((1 + a)·p_out + 1 − a)."""
    assert evidence.shadows is not None
    own = log_probability(evidence.outputs[edit].label_confidence[0].astype(np.float64))
    inside, outside = _log_means(evidence.shadows, edit)
    with np.errstate(invalid="ignore"):  # NaN, where no shadow tells, stays NaN
        if online:
            prior = np.logaddexp(inside, outside) - np.log(2)
        else:
            prior = np.logaddexp(np.log1p(OFFLINE_A) + outside, np.log1p(-OFFLINE_A)) - np.log(2)
    value: Scores = own - prior
    return value


def _log_means(shadows: Shadows, edit: str) -> tuple[Scores, Scores]:
    """(n,) log mean p_y over shadows that trained on a sample, and over the others; NaN for none.

    In logarithms: where all shadows are sure of another class, the ratio is still known.
    """
    n = shadows.inside.shape[1]
    inside, outside = np.empty(n), np.empty(n)
    for at, trained, left, phi in shadows.blocks(edit):
        log_p = log_probability(phi)
        inside[at], outside[at] = _log_mean(log_p, trained), _log_mean(log_p, left)
    return inside, outside


def _log_mean(log_p: Scores, seen: Mask) -> Scores:
    count = seen.sum(axis=0)
    mean = logsumexp(np.where(seen, log_p, -np.inf), axis=0) - np.log(np.maximum(count, 1))
    value: Scores = np.where(count > 0, mean, np.nan)
    return value


RMIA_ONLINE = Method(
    name="rmia_online",
    title="RMIA online",
    source=_SOURCE,
    score=functools.partial(_score, online=True),
    needs=frozenset({"shadows"}),
    inside=1,
    outside=1,
)
RMIA_OFFLINE = Method(
    name="rmia_offline",
    title="RMIA offline",
    source=_SOURCE,
    score=functools.partial(_score, online=False),
    needs=frozenset({"shadows"}),
    outside=1,
)
