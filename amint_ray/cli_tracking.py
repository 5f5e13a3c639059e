"""Commands around what MLflow keeps: registered models and finished runs."""

from __future__ import annotations

from pathlib import Path

import click

from amint_ray.signals import raise_if_stopped

_JSON = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as one JSON document."
)


@click.command()
@click.argument("name", required=False)
@_JSON
def models(name: str | None, as_json: bool) -> None:
    """List the versions of registered model NAME with their figures; without NAME, of all.

    For instance: amint models amint-digits
    """
    from amint_ray.display import results_only
    from amint_ray.tables import print_document, print_versions

    with results_only(verbose=False) as stdout:
        from amint_ray.tracking.versions import list_versions

        document = list_versions(name)
    print_document(document, print_versions, stdout, as_json=as_json)


@click.command()
@click.argument("name")
@click.argument("version")
@click.option("--alias", default="champion", show_default=True, help="The alias to move.")
@click.option("--other-data", is_flag=True, help="Compare figures of other images or roles, too.")
@_JSON
def promote(name: str, version: str, alias: str, other_data: bool, as_json: bool) -> None:
    """Give VERSION of model NAME the alias `champion`, if it is not worse than the present one.

    Its confounder check must be clean, and neither task accuracy nor TPR at 1 % FPR (member
    against test) below those of the version that has the alias, by value. Where it is refused, the
    alias stays, and the exit code is 1. For instance: amint promote amint-digits 3
    """
    from amint_ray.display import results_only
    from amint_ray.tables import print_document, print_promotion

    with results_only(verbose=False) as stdout:
        from amint_ray.tracking.versions import promote

        document = promote(name, version, alias=alias, other_data=other_data)
    print_document(document, print_promotion, stdout, as_json=as_json)
    click.get_current_context().exit(0 if document["promoted"] else 1)


@click.command()
@click.argument("run_id")
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@_JSON
@click.option("--verbose", is_flag=True, help="Let Ray and MLflow talk, and show tracebacks.")
def reproduce(run_id: str, overrides: tuple[str, ...], as_json: bool, verbose: bool) -> None:
    """Train MLflow run RUN_ID again, as a new run, and show by how much each metric differs.

    Refuses other images or roles before it trains. Overrides may say where data and storage are
    now. Exit code 1 where a figure lies outside the old one's interval.

    For instance: amint reproduce 0123456789abcdef0123456789abcdef data.path=DIR
    """
    from amint_ray.display import open_display, results_only
    from amint_ray.tables import print_document, print_reproduced

    with results_only(verbose=verbose) as stdout:
        display = open_display(raise_if_stopped, plain=verbose)
        try:
            from amint_ray.launch.reproduce import reproduce

            document = reproduce(run_id, overrides, display, verbose=verbose)
        finally:
            display.close()
    print_document(document, print_reproduced, stdout, as_json=as_json)
    click.get_current_context().exit(1 if document["verdict"] == "outside" else 0)


@click.command()
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path), metavar="[FOLDER]...")
@_JSON
def sync(folders: tuple[Path, ...], as_json: bool) -> None:
    """Send MLflow what runs left behind that ended while it did not answer; register their models.

    FOLDER is what such a run names, or holds such folders; without one, those in amint_runs/spool
    and amint_spool are sent. Exit code 1 where something is left.
    """
    from amint_ray.display import open_display, results_only
    from amint_ray.tables import print_document, print_synced

    with results_only(verbose=False) as stdout:
        display = open_display(raise_if_stopped)
        try:
            from amint_ray.tracking.sync import sync

            document = sync(list(folders), display)
        finally:
            display.close()
    print_document(document, print_synced, stdout, as_json=as_json)
    problems = any(run["problem"] and not run["in_use"] for run in document["runs"])
    click.get_current_context().exit(1 if problems else 0)


@click.command()
@click.argument("model")
@click.option(
    "--methods",
    default="all",
    metavar="NAME,…",
    help="All, or some: mint, yeom, salem_entropy, watson, lira_online, rmia_offline …",
)
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@_JSON
@click.option("--verbose", is_flag=True, help="Let Ray and MLflow talk, and show tracebacks.")
def attack(
    model: str, methods: str, overrides: tuple[str, ...], as_json: bool, verbose: bool
) -> None:
    """Attack MODEL by every method of the literature, beside its own MINT head.

    MODEL is models:/NAME/VERSION, models:/NAME@ALIAS, runs:/RUN_ID/model or a run's id. All methods
    are asked about the run's own images: member against test, and withheld against test. Shadow
    models are trained with the run's own recipe; what an attack did before is used again. Overrides
    say where data and storage are now, and how the attack is made (attack.shadows=32;
    docs/attacks.md).

    For instance: amint attack models:/amint-digits@challenger --methods yeom,rmia_online
    """
    from amint_ray.attack_tables import print_attack
    from amint_ray.display import open_display, results_only
    from amint_ray.tables import print_document

    with results_only(verbose=verbose) as stdout:
        display = open_display(raise_if_stopped, plain=verbose)
        try:
            from amint_ray.launch.attack_run import run_attack  # torch and timm: seconds

            document = run_attack(model, methods, overrides, display, verbose=verbose)
        finally:
            display.close()
    print_document(document, print_attack, stdout, as_json=as_json)


COMMANDS = (attack, models, promote, reproduce, sync)
