"""The `mezzotint` command, with one file per subcommand.

Each subcommand parses and checks its options, calls the API and prints the result. Data goes to
stdout, messages to stderr. `failures` documents the exit codes. Subcommands import PyTorch only
when they need it, so that help and errors in arguments appear at once.
"""

import inspect as introspection
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from mezzotint._version import VERSION
from mezzotint.cli import bench, compare, convert, demo, diagnose, generate, inspect, verify, warmup
from mezzotint.cli.encoding import print_in_any_encoding
from mezzotint.cli.failures import CLOSED, Reported
from mezzotint.cli.options import with_flat_signature

SUMMARY = "Inspect, run, convert and verify quantized diffusion transformers."

app = typer.Typer(
    name="mezzotint",
    help=SUMMARY,
    epilog=(
        "Exit codes: 0 success, 1 a check failed, 2 the command could not run, "
        "3 unsupported format, 4 unexpected failure, 130 interrupted."
    ),
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def help_text(command: Callable[..., Any]) -> str:
    """Return a command's docstring with one line per paragraph.

    Typer keeps the line breaks of a docstring. Without them, the terminal's width decides where
    lines break. Paragraphs that start with spaces, the examples, keep their indentation.
    """
    paragraphs = introspection.cleandoc(command.__doc__ or "").split("\n\n")
    lines = (paragraph.split("\n") for paragraph in paragraphs)
    return "\n\n".join(" ".join([first, *map(str.strip, rest)]) for first, *rest in lines)


for command in (
    generate.generate,
    inspect.inspect,
    convert.convert,
    verify.verify,
    compare.compare,
    diagnose.diagnose,
    bench.bench,
    warmup.warmup,
    demo.demo,
):
    app.command(command.__name__, help=help_text(command))(with_flat_signature(command))


def _print_version(requested: bool) -> None:
    if requested:
        print(f"mezzotint {VERSION}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Define the options of `mezzotint` without a subcommand."""


def main() -> None:
    """Run the command line. Report any failure as one message, and exit with its code."""
    print_in_any_encoding()
    code: int | str | None = None
    with Reported(sys.argv[1:]) as reported:
        try:
            code = app(standalone_mode=False, prog_name="mezzotint")
        except SystemExit as ended:
            # Typer exits with 1 when the reader of a pipe has closed it.
            code = CLOSED if ended.code == 1 else ended.code
    sys.exit(code if reported.exit_code is None else reported.exit_code)
