"""`amint evaluate`: what is measured of a model, and what that is worth."""

from __future__ import annotations

from pathlib import Path

import click

from amint_ray.contracts import UserError
from amint_ray.signals import raise_if_stopped


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL... [KEY.PATH=VALUE]...")
@click.option("--full", is_flag=True, help="Make the controls, too; some are trained, on Ray.")
@click.option("--anew", is_flag=True, help="Score all samples again instead of reading the scores.")
@click.option(
    "--by",
    type=click.Choice(["label", "prediction-right"]),
    help="What the groups are.  [default: label]",
)
@click.option(
    "--groups",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Parquet or CSV with columns sample_id and group, in the place of --by.",
)
@click.option("--ood", metavar="PATH", help="Images from elsewhere, for --full: folder or Parquet.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
@click.option("--verbose", is_flag=True, help="Let Ray and MLflow talk, and show tracebacks.")
def evaluate(
    models: tuple[str, ...],
    full: bool,
    anew: bool,
    by: str | None,
    groups: Path | None,
    ood: str | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """Measure MODEL: membership and task, by class and group; with --full, the controls, too.

    MODEL is models:/NAME/VERSION, models:/NAME@ALIAS or a run's id. Several are taken as seeds of
    one recipe, and combined. Without --anew and --full, scores are read from MLflow and neither
    images nor Ray are needed. Overrides say how membership is measured (evaluation.threshold_fpr)
    and where data and storage are now.

    For instance: amint evaluate models:/amint-digits/1 models:/amint-digits/2 --by prediction-right
    """
    from amint_ray.display import open_display, results_only
    from amint_ray.evaluate_tables import print_evaluation
    from amint_ray.tables import print_document

    named = [each for each in models if _is_model(each)]
    overrides = [each for each in models if not _is_model(each)]
    if not named:
        raise UserError(f"{overrides[0]}: is no model; name one before what is to be changed")
    if groups is not None and by is not None:
        raise UserError("--groups and --by both say what the groups are; give one of them")
    with results_only(verbose=verbose) as stdout:
        display = open_display(raise_if_stopped, plain=verbose)
        try:
            from amint_ray.launch.evaluate_run import Question, run_evaluate  # torch: seconds

            question = Question(by=by or "label", groups=groups, anew=anew, full=full, ood=ood)
            document = run_evaluate(named, overrides, question, display, verbose=verbose)
        finally:
            display.close()
    print_document(document, print_evaluation, stdout, as_json=as_json)


def _is_model(argument: str) -> bool:
    return "=" not in argument or argument.startswith(("models:/", "runs:/"))
