"""The `foregate` command: one file per subcommand, errors as one line, exit codes 0 (done), 1 (bug), 2 (your input)."""

import sys

import typer

from foregate import ForegateError, __version__
from foregate.cli import (
    align,
    bench,
    convert,
    demo,
    doctor,
    evaluate,
    evaluate_gates,
    generate,
    inflate,
    plan,
    serve,
    simulate,
    trace,
    verify,
)

app = typer.Typer(
    name="foregate",
    help="Run Mixture-of-Experts language models that are larger than the memory you have.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = (
    demo,
    doctor,
    convert,
    verify,
    plan,
    generate,
    serve,
    evaluate,
    trace,
    align,
    evaluate_gates,
    inflate,
    simulate,
)
for module in COMMANDS:
    app.command(name=module.NAME)(module.run)
app.add_typer(bench.app, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"foregate {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> None:
    """Entry point: what the user can mend becomes one line on stderr and exit code 2."""
    try:
        app()
    except ForegateError as error:
        print(f"foregate: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"foregate: {error.filename or 'input or output'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
