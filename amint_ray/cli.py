"""The `amint` command: thin, and quick to say what is wrong."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import amint_ray
from amint_ray import cli_audit, cli_evaluate, cli_key, cli_tracking
from amint_ray.contracts import RunError, UserError, few_samples, first_line
from amint_ray.signals import Stopped, install_handlers, raise_if_stopped, received, write

if TYPE_CHECKING:
    from amint_ray.config.schema import Config

_OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(amint_ray.__version__, prog_name="amint")
def cli() -> None:
    """Train image classifiers that can be asked what they were trained on."""


def _recipes_text() -> str:
    from amint_ray.config.load import recipe_names

    return (
        f"RECIPE is one of {', '.join(recipe_names())}, or the path of a YAML file. Every key of "
        "the configuration can be set behind it, for instance `train.epochs=5 "
        "loss.lambda_mint=0`; `amint config RECIPE` prints them all, docs/config.md explains them."
    )


class _RecipeCommand(click.Command):
    """A command whose help names the recipes."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_paragraph()
        formatter.write_text(_recipes_text())


@cli.command(cls=_RecipeCommand)
@click.argument("recipe")
@_OVERRIDES
@click.option("--resume", metavar="RUN", help="Go on with this run of storage.path.")
@click.option(
    "--force-resume", is_flag=True, help="Even if what does not touch the weights differs."
)
@click.option("--new", is_flag=True, help="Begin anew even if such a run was cut off.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
@click.option("--verbose", is_flag=True, help="Let Ray and MLflow talk, and show tracebacks.")
def train(
    recipe: str,
    overrides: tuple[str, ...],
    resume: str | None,
    force_resume: bool,
    new: bool,
    as_json: bool,
    verbose: bool,
) -> None:
    """Train an audited classifier with its MINT head, measure it, register it.

    Where a run of the same configuration was cut off, it goes on from its last checkpoint.
    """
    from amint_ray.config.load import load_run
    from amint_ray.display import open_display, results_only
    from amint_ray.tables import print_document, print_result

    if new and resume is not None:
        raise UserError("--new and --resume contradict each other; give one of them")
    if force_resume and resume is None:
        raise UserError("--force-resume needs --resume=RUN")

    config = load_run(recipe, overrides)
    with results_only(verbose=verbose) as stdout:
        display = open_display(raise_if_stopped, plain=verbose)
        display.phase("starting")
        from amint_ray.launch.train_run import Resume, run_training  # torch and timm: seconds

        imported = _seconds_since_process_start()
        try:
            document = run_training(
                config,
                display,
                resume=Resume(run_name=resume, force=force_resume, never=new),
                verbose=verbose,
            )
        finally:
            display.close()
        document["seconds"] = {"import": imported, **document["seconds"]}
        document["seconds"]["total"] = _seconds_since_process_start()
    print_document(document, print_result, stdout, as_json=as_json)


@cli.command()
@click.argument("file", metavar="SEARCH.yaml")
@_OVERRIDES
@click.option(
    "--dry-run", "dry", is_flag=True, help="Show the trials it would begin with, and stop."
)
@click.option("--new", is_flag=True, help="Begin anew, beside a search of the same name.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
@click.option("--verbose", is_flag=True, help="Let Ray and MLflow talk, and show tracebacks.")
def tune(
    file: str,
    overrides: tuple[str, ...],
    dry: bool,
    new: bool,
    as_json: bool,
    verbose: bool,
) -> None:
    """Search over configurations on Ray Tune, and train the winner again.

    KEY is one of the search file (`budget.trials=8`) or of the configuration, for all trials
    (`data.path=FOLDER`). Trials are compared on half of calibration, never on test. Where the same
    search was cut off, it goes on. docs/search.md explains the file. For instance: amint tune
    tune_configs/digits.yaml
    """
    from amint_ray.config.search import load_search
    from amint_ray.display import results_only
    from amint_ray.search_display import open_search_display
    from amint_ray.search_tables import print_planned, print_search
    from amint_ray.tables import print_document

    search = load_search(file, overrides)
    with results_only(verbose=verbose) as stdout:
        display = open_search_display(raise_if_stopped, plain=verbose)
        try:
            display.phase("starting")
            from amint_ray.launch import dry_run, tune_run  # torch and timm: seconds

            if dry:
                command = shlex.join(["amint", "tune", file, *overrides])
                document = {**dry_run.show_plan(search, display, new=new), "next": command}
            else:
                document = tune_run.run_search(search, display, new=new, verbose=verbose)
        finally:
            display.close()
    print_document(document, print_planned if dry else print_search, stdout, as_json=as_json)


@cli.command(cls=_RecipeCommand)
@click.argument("recipe")
@_OVERRIDES
def config(recipe: str, overrides: tuple[str, ...]) -> None:
    """Print the whole configuration that a run would have, as YAML."""
    from amint_ray.config.load import load_config, to_yaml

    click.echo(to_yaml(load_config(recipe, overrides)), nl=False)


@cli.command()
@click.argument("backbone")
@_OVERRIDES
@click.option("--all", "every", is_flag=True, help="List every module that can be tapped.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
def taps(backbone: str, overrides: tuple[str, ...], every: bool, as_json: bool) -> None:
    """Show where a MINT head can read in BACKBONE: a classifier that timm knows, or a recipe's.

    Overrides are those of a run, for instance `data.image_size=32 model.options.patch_size=4`;
    without a size, the backbone's own is taken.
    """
    from amint_ray.config.load import load_config, recipe_names
    from amint_ray.display import results_only
    from amint_ray.tables import print_document, print_taps

    if backbone in recipe_names() or backbone.endswith((".yaml", ".yml")):
        config = load_config(backbone, overrides)
    else:
        config = load_config(None, [f"model.backbone={backbone}", *overrides])
    if any(override.startswith("mint.taps=") for override in overrides):
        raise UserError("amint taps shows all placements; leave mint.taps out")
    own_size = "image_size" not in config.data.model_fields_set
    with results_only(verbose=False) as stdout:
        from amint_ray.launch.describe_taps import describe_taps

        document = describe_taps(config, every=every, own_size=own_size)
    print_document(document, print_taps, stdout, as_json=as_json)


@cli.command()
@click.argument("source")
@_OVERRIDES
@click.option("--sheet", default="contact_sheet.png", help="PNG file to draw, or nothing: --sheet=")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
def data(source: str, overrides: tuple[str, ...], sheet: str, as_json: bool) -> None:
    """Show what is in SOURCE: folder, parquet, digits, torchvision:NAME, or a recipe's data.

    Counts, classes, sizes, the roles that images would get, duplicates, what cannot be used and
    why, and a contact sheet. For instance: amint data folder data.path=DIR
    """
    from amint_ray.display import open_display, results_only
    from amint_ray.tables import print_data, print_document

    config = _config_of_source(source, overrides)
    with results_only(verbose=False) as stdout:
        display = open_display(raise_if_stopped)
        try:
            from amint_ray.launch.describe_data import describe_data

            document = describe_data(config, Path(sheet) if sheet else None, display)
        finally:
            display.close()
    print_document(document, print_data, stdout, as_json=as_json)


@cli.command()
@click.argument("source")
@click.argument("destination", metavar="DEST")
@_OVERRIDES
@click.option("--file-mib", default=256.0, type=click.FloatRange(min=0, min_open=True))
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
@click.option("--verbose", is_flag=True, help="Let Ray talk, and show tracebacks.")
def prepare(
    source: str,
    destination: str,
    overrides: tuple[str, ...],
    file_mib: float,
    as_json: bool,
    verbose: bool,
) -> None:
    """Write SOURCE as Parquet files to DEST, a folder or s3://bucket/prefix, in parallel on Ray.

    What is there already is not written again. Runs that read DEST need not look at each image
    first. For instance: amint prepare folder s3://bucket/birds data.path=DIR
    """
    from amint_ray.display import open_display, results_only
    from amint_ray.tables import print_document, print_prepared

    config = _config_of_source(source, overrides)
    with results_only(verbose=verbose) as stdout:
        display = open_display(raise_if_stopped, plain=verbose)
        try:
            from amint_ray.launch.prepare_data import prepare_data

            document = prepare_data(
                config, destination, file_mib=file_mib, watcher=display, verbose=verbose
            )
        finally:
            display.close()
    print_document(document, print_prepared, stdout, as_json=as_json)


@cli.command()
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="-- train RECIPE [...]")
@click.option("--address", metavar="URL", help="Of Ray's dashboard, such as http://HOST:8265.")
@click.option("--name", metavar="ID", help="What Ray calls the job.")
@click.option("--runtime-env", metavar="FILE", help="YAML, for instance infra/runtime_env.yaml.")
@click.option("--no-wait", is_flag=True, help="Come back as soon as Ray has the job.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
def submit(command: tuple[str, ...], no_wait: bool, as_json: bool, **options: Any) -> None:
    """Run `amint train` as a job of a Ray cluster, follow its log, and end with its exit code.

    For instance: amint submit -- train digits storage.path=s3://bucket/runs

    Without --address, RAY_API_SERVER_ADDRESS, RAY_DASHBOARD or RAY_ADDRESS names the dashboard.
    Ctrl-C stops the job; where only the terminal is lost, it goes on.
    """
    from amint_ray.display import results_only
    from amint_ray.launch.submit_job import plan_job
    from amint_ray.tables import print_document, print_job

    job = plan_job(command, lambda w: train.make_context("amint train", w).params, **options)
    with results_only(verbose=False) as stdout:
        try:
            job.send()
            _say(f"job {job.job_id} is sent", 0)
            document = job.document() if no_wait else job.follow(write)
        except Stopped as stopped:
            if stopped.signum == signal.SIGHUP:
                raise
            document = {**job.stop(write), "exit_code": 128 + stopped.signum}
    print_document(document, print_job, stdout, as_json=as_json)
    click.get_current_context().exit(document["exit_code"] or 0)


@cli.command()
@_OVERRIDES
@click.option("--address", help="host:port of a Ray cluster, or http://HOST:8265.")
@click.option("--runtime-env", metavar="FILE", help="YAML that jobs are to be sent with.")
@click.option("--seconds", default=10.0, type=click.FloatRange(min=1), help="For each check.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
def doctor(overrides: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Look for what usually goes wrong before a cluster job does; exit code 1 if something is.

    For instance: amint doctor storage.path=s3://bucket/runs data.path=s3://bucket/imagenet
    """
    from amint_ray.display import open_display, results_only
    from amint_ray.tables import print_checks, print_document

    with results_only(verbose=False) as stdout:
        display = open_display(raise_if_stopped)
        try:
            from amint_ray.launch.doctor import diagnose

            document = diagnose(overrides, display, **options)
        finally:
            display.close()
    print_document(document, print_checks, stdout, as_json=as_json)
    click.get_current_context().exit(0 if document["ok"] else 1)


for command in cli_tracking.COMMANDS:
    cli.add_command(command)
cli.add_command(cli_audit.audit)
cli.add_command(cli_evaluate.evaluate)
cli.add_command(cli_key.key)


def _config_of_source(source: str, overrides: tuple[str, ...]) -> Config:
    """A recipe's configuration, or the defaults with a source."""
    from amint_ray.config.data_schema import source_names
    from amint_ray.config.load import load_config, recipe_names

    if source in recipe_names() or source.endswith((".yaml", ".yml")):
        return load_config(source, overrides)
    if source not in source_names():
        raise UserError(
            f"there is no source {source!r}; there are {', '.join(source_names())}, and recipes"
        )
    if any(override.startswith("data.source=") for override in overrides):
        raise UserError(f"the source is {source!r} already; leave data.source out")
    return load_config(None, [f"data.source={source}", *overrides])


def _seconds_since_process_start() -> float:
    import psutil

    return time.time() - psutil.Process().create_time()


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 1 where a run failed; 2 for a mistake of the user's; 128 + n for signal n; the exit code
        of a job that was followed.
    """
    install_handlers()
    arguments = sys.argv[1:] if argv is None else argv
    try:
        code = cli.main(args=arguments, prog_name="amint", standalone_mode=False)
    except UserError as error:
        return _say(str(error), 2)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        return 2
    except click.ClickException as error:
        context: Any = getattr(error, "ctx", None)
        hint = f" (see `{context.command_path} --help`)" if context else ""
        return _say(f"{error.format_message()}{hint}", 2)
    except Exception as error:
        signum = received()
        if signum is not None:  # compiled code of Ray's makes another error of what it raised
            return _stopped_by(signum)
        if isinstance(error, RunError):
            if "--verbose" in arguments:
                traceback.print_exc()
            return _say(few_samples(str(error)), 1)
        if "--verbose" in arguments:
            traceback.print_exc()
        what = f"{type(error).__name__}: {first_line(error)}"
        return _say(f"unexpected: {what} (`--verbose` shows where)", 1)
    except Stopped as stopped:
        return _stopped_by(stopped.signum)
    return code if isinstance(code, int) else 0  # what a command gave to `exit`


def _stopped_by(signum: int) -> int:
    return _say(f"stopped by {signal.Signals(signum).name}", 128 + signum)


def _say(text: str, code: int) -> int:
    with contextlib.suppress(OSError):
        for line in text.splitlines():
            print(f"amint: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
