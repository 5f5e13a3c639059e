"""Pictures of searches that are usual and odd."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from search_trials import ACCURACY, AUC, trial

from amint_ray.evaluation.objectives import front_axes
from amint_ray.evaluation.parallel_figure import parallel_coordinates
from amint_ray.evaluation.search import baseline, configurations, front
from amint_ray.evaluation.search_figures import importance_bars, learning_curves, pareto


def drawn(figure: Figure) -> set[str]:
    """Draws it, warnings being errors, and gives the texts on it."""
    FigureCanvasAgg(figure).draw()
    return {text.get_text() for text in figure.findobj(lambda a: hasattr(a, "get_text"))}


def search(n: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(n)
    states = rng.choice(["done", "stopped", "failed", "running", "waiting"], n)
    rows = []
    for i, state in enumerate(states):
        known = {AUC[0]: rng.uniform(0.5, 1), ACCURACY[0]: rng.uniform(0.8, 0.9)}
        row = trial(i, {} if state == "waiting" else known, state=state)
        row["violation"] = float(rng.random() < 0.3)
        row["parameters"] = {"lambda": float(10 ** rng.uniform(-4, 4)), "width": int(2 ** (i % 3))}
        if i % 3:
            row["parameters"]["a.very.long.name.of.a_parameter_that_goes_on"] = "value " * (i % 9)
        rows.append(row)
    return rows


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n", [0, 1, 60])
def test_every_picture_of_every_search_can_be_drawn(n: int) -> None:
    rows = search(n)
    plain = [trial(99, {ACCURACY[0]: 0.9}, baseline=True)]
    made = configurations(rows, [AUC])
    axes = front_axes([AUC])
    texts = drawn(pareto(made, front(made, axes), axes, baseline(plain)))
    assert ("no trial states both figures" in texts) == (not any(r["figures"] for r in rows))
    assert ("no trial yet" in drawn(parallel_coordinates(made, [AUC]))) == (n == 0)
    texts = drawn(learning_curves(rows, *AUC))
    assert ("no trial states this figure" in texts) == (not any(row["figures"] for row in rows))


@pytest.mark.filterwarnings("error")
def test_where_nothing_is_done_the_pictures_say_so() -> None:
    rows = [trial(i, {AUC[0]: 0.5 + i / 10}, state="running") for i in range(3)]
    made = configurations(rows, [AUC, ACCURACY])
    assert "no trial states both figures" in drawn(pareto(made, [], [AUC, ACCURACY]))
    assert "0 complete; 3 not complete (grey)" in drawn(parallel_coordinates(made, [AUC]))
    assert "not finished (3)" in drawn(learning_curves(rows, *AUC))
    texts = drawn(
        importance_bars({AUC[0]: None, "other": {"a.b": {"value": 1, "low": 1, "high": 1}}})
    )
    assert {"b", "too few complete configurations,\nor nothing that parameters explain"} <= texts


def test_pareto_tells_the_front_the_stopped_and_what_breaks_the_constraint_apart() -> None:
    points = [(0.9, 0.8), (0.8, 0.9), (0.7, 0.7), (0.95, 0.95), (0.6, 0.6)]
    rows = [trial(i, {AUC[0]: a, ACCURACY[0]: b}) for i, (a, b) in enumerate(points)]
    rows[3]["violation"], rows[4]["state"] = 0.1, "stopped"
    rows.append(trial(5, {ACCURACY[0]: 0.85}, baseline=True))
    made = configurations(rows, [AUC])
    figure = pareto(made, front(made, [AUC, ACCURACY]), [AUC, ACCURACY], baseline(rows))
    texts = drawn(figure)
    for text in ("front (2)", "done (1)", "breaks the constraint (1)", "stopped early (1)"):
        assert text in texts
    panel = figure.axes[0]
    offsets = {c.get_label(): c.get_offsets() for c in panel.collections}
    assert np.allclose(offsets["front (2)"], [points[1], points[0]])
    assert {"0", "1"} <= texts
    (line,) = [line for line in panel.lines if line.get_linestyle() == "--"]
    assert list(line.get_ydata()) == [0.85, 0.85]


def test_a_stopped_trial_s_curve_ends_in_a_cross_and_the_best_keeps_the_constraint() -> None:
    rows = [trial(i, {AUC[0]: value}) for i, value in enumerate((0.9, 0.8, 0.7))]
    rows[0]["violation"], rows[2]["state"] = 0.5, "stopped"
    rows[2]["history"] = rows[2]["history"][:1]
    figure = learning_curves(rows, *AUC)
    assert {"the best, t0010", "stopped (1)", "done (1)"} <= drawn(figure)
    markers = {line.get_marker(): list(line.get_xdata()) for line in figure.axes[0].lines}
    assert markers["x"] == [4]


def test_parallel_axes_are_logarithmic_over_decades_and_have_a_place_for_what_is_missing() -> None:
    rows = [trial(i, {AUC[0]: 0.5 + i / 10}) for i in range(4)]
    values: list[dict[str, Any]] = [{"l": 1e-4}, {"l": 1.0, "taps": "a"}, {"l": 1e4, "taps": "b"}]
    for row, parameters in zip(rows, [*values, {"l": 30.0}], strict=True):
        row["parameters"] = {**parameters, "constant": 3}
    figure = parallel_coordinates(configurations(rows, [AUC]), [AUC])
    texts = drawn(figure)
    assert {"l", "taps", "–", "a", "b", "member.auc", "4 complete"} <= texts
    assert "constant" not in texts
    heights = [line.get_ydata() for line in figure.axes[0].lines if len(line.get_xdata()) == 3]
    assert [h[0] for h in heights[:3]] == pytest.approx([0, 0.5, 1], abs=0.03)
    assert heights[0][1] == pytest.approx(0, abs=0.03) and heights[1][1] > 0.1
