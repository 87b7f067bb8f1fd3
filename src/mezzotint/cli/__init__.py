"""The `mezzotint` command: one file per subcommand, thin; they parse, check, call the API, and print.

Data goes to stdout, messages to stderr; `failures` has the exit codes. PyTorch is imported by what a command calls, so
that help and a wrong argument are answered at once.
"""

import sys
from typing import Annotated

import typer

from mezzotint._version import VERSION
from mezzotint.cli import bench, compare, convert, demo, diagnose, generate, inspect, verify, warmup
from mezzotint.cli.encoding import print_in_any_encoding
from mezzotint.cli.failures import CLOSED, Reported

app = typer.Typer(
    name="mezzotint",
    help="Quantized diffusion transformers: recognised, explained, run, and proved against BF16.",
    epilog="Exit codes: 0 done, 1 something to look at, 2 could not be done, 4 failed on the way, 130 interrupted.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.command("generate")(generate.generate)
app.command("inspect")(inspect.inspect)
app.command("convert")(convert.convert)
app.command("verify")(verify.verify)
app.command("compare")(compare.compare)
app.command("diagnose")(diagnose.diagnose)
app.command("bench")(bench.bench)
app.command("warmup")(warmup.warmup)
app.command("demo")(demo.demo)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"mezzotint {VERSION}")
        raise typer.Exit


@app.callback()
def _every_command(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Quantized diffusion transformers: recognised, explained, run, and proved against BF16."""


def main() -> None:
    """Entry point: run the command line, and turn whatever fails into one message and its exit code."""
    print_in_any_encoding()
    code: int | str | None = None
    with Reported(sys.argv[1:]) as reported:
        try:
            code = app(standalone_mode=False, prog_name="mezzotint")
        except SystemExit as ended:  # Typer's, where the reader of the output has gone
            code = CLOSED if ended.code == 1 else ended.code
    sys.exit(code if reported.exit_code is None else reported.exit_code)
