"""`amint audit`: the command whose exit code is a verdict."""

from __future__ import annotations

import click

from amint_ray.signals import raise_if_stopped


@click.command()
@click.argument("model")
@click.argument("suspects")
@click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]...")
@click.option(
    "--prior",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.1,
    show_default=True,
    help="Share of training images among the suspects at which precision is stated.",
)
@click.option(
    "--fdr",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.05,
    show_default=True,
    help="Largest expected share of other images among those called members.",
)
@click.option(
    "--key-file",
    metavar="FILE",
    help="Key of a model whose head says codes (mint.objective of keyed or both); the verdict then "
    "rests on it, and its error rates are exact.",
)
@click.option("--key-env", metavar="NAME", help="Environment variable with the key instead.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document.")
@click.option("--verbose", is_flag=True, help="Let Ray and MLflow talk, and show tracebacks.")
def audit(
    model: str,
    suspects: str,
    overrides: tuple[str, ...],
    prior: float,
    fdr: float,
    key_file: str | None,
    key_env: str | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """Say whether SUSPECTS were among the images that MODEL was trained on.

    MODEL is models:/NAME/VERSION, models:/NAME@ALIAS, a run's id, runs:/RUN_ID/model or a model's
    folder. SUSPECTS is a folder of images, one image, or Parquet, local or s3://. The exit code is
    the verdict: 0 not_member, 3 member, 4 no verdict. A report is kept in audit.folder
    (docs/audit.md).

    For instance: amint audit models:/amint-digits@challenger suspects/
    """
    from amint_ray.audit_tables import print_audit
    from amint_ray.display import open_display, results_only
    from amint_ray.tables import print_document

    with results_only(verbose=verbose) as stdout:
        display = open_display(raise_if_stopped, plain=verbose)
        display.phase("starting")
        try:
            from amint_ray.audit.verdict import EXIT_CODES
            from amint_ray.launch.audit_run import run_audit  # torch and timm: seconds

            document = run_audit(
                model,
                suspects,
                overrides,
                display,
                prior=prior,
                fdr=fdr,
                key_file=key_file,
                key_env=key_env,
                every=as_json,
                verbose=verbose,
            )
        finally:
            display.close()
    print_document(document, print_audit, stdout, as_json=as_json)
    click.get_current_context().exit(EXIT_CODES[document["verdict"]])
