"""The `mezzotint` command: one file per subcommand, thin; they parse, call the API, and print.

Data goes to stdout, messages to stderr. Exit codes: 0 done, 1 something to look at, 2 could not.
"""

import sys

import typer

from mezzotint.cli import bench, compare, convert, demo, diagnose, generate, inspect, verify, warmup
from mezzotint.cli.output import message
from mezzotint.errors import MezzotintError

app = typer.Typer(
    name="mezzotint",
    help="Quantized diffusion transformers: recognised, explained, run, and proved against BF16.",
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


def main() -> None:
    """Entry point: run the command line; an error of ours or of the file system is one message and exit code 2."""
    try:
        app()
    except MezzotintError as error:
        print(message(f"error: {type(error).__name__}: {error}"), file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(message(f"error: {error}"), file=sys.stderr)
        sys.exit(2)
