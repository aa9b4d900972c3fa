"""The `foregate` command: one file per subcommand, errors as one line, exit codes as its help says."""

import sys
from typing import Annotated

import typer

from foregate import ForegateError, __version__
from foregate.cli import (
    align,
    bench,
    chat,
    convert,
    demo,
    doctor,
    evaluate,
    evaluate_gates,
    generate,
    inflate,
    inspect,
    plan,
    plot,
    serve,
    simulate,
    trace,
    verify,
)
from foregate.cli.options import example_line

# Commands by panel of the help, in its order: a module has NAME, and run with EXAMPLE, or an app of subcommands.
PANELS = {
    "Run": (demo, generate, chat, serve),
    "Prepare": (doctor, plan, convert, inspect, verify, trace, align),
    "Measure": (evaluate, evaluate_gates, plot, simulate, bench, inflate),
}
EXIT_CODES = """\
Exit codes: 0 done, 1 a bug (doctor: something is broken), 2 something to mend, in one line on stderr, 130 interrupted.

Completion of commands, options and names: foregate --install-completion, for bash, zsh and fish."""

app = typer.Typer(
    name="foregate",
    help="Run Mixture-of-Experts language models that are larger than the memory you have.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for panel, modules in PANELS.items():
    for module in modules:
        if hasattr(module, "run"):
            app.command(module.NAME, rich_help_panel=panel, epilog=example_line(module.EXAMPLE))(module.run)
        else:
            app.add_typer(module.app, name=module.NAME, rich_help_panel=panel)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"foregate {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
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
