"""What is on the pictures of the attacks."""

from __future__ import annotations

import io

import numpy as np
import pytest
from small_evidence import population

from amint_ray.attacks.evidence import PLAIN
from amint_ray.attacks.figures import attack_curves
from amint_ray.attacks.methods import METHODS
from amint_ray.attacks.table import measure
from amint_ray.config.schema import Evaluation
from amint_ray.contracts import Role

COUNTS = {
    Role.MEMBER: 60,
    Role.WITHHELD: 40,
    Role.EXTERNAL: 10,
    Role.CALIBRATION: 60,
    Role.TEST: 200,
}


@pytest.mark.parametrize("question", [Role.MEMBER, Role.WITHHELD])
def test_all_curves_on_one_plot_with_a_legend_beside_it(question: Role) -> None:
    evidence = population(COUNTS, shadows=6, known=30)
    methods = list(METHODS.values())
    scores = {method.name: method.score(evidence, PLAIN) for method in methods}
    figures = {method.name: measure(method, evidence, Evaluation()) for method in methods}
    figure = attack_curves(methods, evidence, scores, figures, question=question)
    (axes,) = figure.axes
    *curves, diagonal = axes.get_lines()
    assert len(curves) == len(methods)
    looks = {(line.get_color(), line.get_linestyle()) for line in curves}
    assert len(looks) == len(methods)
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_xlim() == (1 / 200, 1) and axes.get_ylim()[0] == 1 / 200
    np.testing.assert_array_equal(diagonal.get_xdata(), diagonal.get_ydata())
    for method, line in zip(methods, curves, strict=True):
        area = figures[method.name][question.value]["auc"]["value"]
        assert line.get_label() == f"{method.title}: {area:.3f}"
        fpr, tpr = (np.asarray(data) for data in line.get_data())
        assert (np.diff(fpr) >= 0).all() and (np.diff(tpr) >= 0).all()
        assert (fpr[-1], tpr[-1]) == (1, 1)
    yeom = curves[list(METHODS).index("yeom")]
    values = scores["yeom"]
    threshold = np.sort(values[evidence.role == "test"])[-20]  # nineteen of 200 are above
    at = np.searchsorted(yeom.get_xdata(), 19 / 200, side="right") - 1
    expected = (values[evidence.role == question.value] > threshold).mean()
    assert yeom.get_ydata()[at] == pytest.approx(expected)
    figure.savefig(io.BytesIO(), format="png")
    (legend,) = figure.legends
    beside = legend.get_window_extent().x0 >= axes.get_window_extent().x1
    assert beside and legend.get_window_extent().y0 >= 0


def test_a_method_without_scores_is_not_drawn_and_changes_no_other() -> None:
    evidence = population(COUNTS, shadows=0)
    methods = [METHODS[name] for name in ("watson", "yeom")]
    figures = {method.name: measure(method, evidence, Evaluation()) for method in methods}
    scores = {method.name: method.scores(evidence)[0] for method in methods}
    drawn = attack_curves(methods, evidence, scores, figures, question=Role.MEMBER)
    all_of_it = attack_curves(
        methods, evidence, scores | {"watson": scores["yeom"]},
        {"watson": figures["yeom"], "yeom": figures["yeom"]}, question=Role.MEMBER,
    )  # fmt: skip
    assert len(drawn.axes[0].get_lines()) == 2
    assert drawn.axes[0].get_lines()[0].get_color() == all_of_it.axes[0].get_lines()[1].get_color()
