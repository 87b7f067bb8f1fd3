"""What `generate` prints when it is done: files on stdout, notes and problems on stderr."""

import json
import sys
from typing import TYPE_CHECKING, Any

import typer

from mezzotint.cli.output_files import OutputFiles, bad_output_files
from mezzotint.untrusted.escaping import message

if TYPE_CHECKING:
    from mezzotint.cli.generation_job import GenerationJob, Outcome
    from mezzotint.generation.pipeline import LoadedPipeline


def print_summary(
    job: "GenerationJob",
    files: OutputFiles,
    loaded: "LoadedPipeline",
    outcome: "Outcome",
) -> None:
    """Print files, notes and problems. Raises typer.Exit(1) if an output failed its check."""
    events = [event for report in loaded.reports.values() for event in report.events]
    events += [f"{path} replaces an earlier file that Mezzotint wrote" for path in files.replaced]
    for note in dict.fromkeys([*events, *outcome.result.notes]):
        print(message(f"note: {note}"), file=sys.stderr)
    if job.options.as_json:
        print(json.dumps(_json_summary(job, loaded, outcome), indent=2))
    else:
        print("\n".join(str(path) for path in outcome.files))
    if any(outcome.result.problems):
        _print_problems(job, outcome)
        raise typer.Exit(1)


def _json_summary(
    job: "GenerationJob", loaded: "LoadedPipeline", outcome: "Outcome"
) -> dict[str, Any]:
    return {
        "files": [str(path) for path in outcome.files],
        "seeds": list(job.seeds),
        "sampling": vars(job.sampling),
        **job.image_entries,
        "notes": list(outcome.result.notes),
        "problems": [list(found) for found in outcome.result.problems],
        **dict(
            zip(
                ("load", "load_2"),
                (report.to_dict() for report in loaded.reports.values()),
                strict=False,
            )
        ),
    }


def _print_problems(job: "GenerationJob", outcome: "Outcome") -> None:
    from mezzotint.generation.output_check import describe_problems

    described, hint = describe_problems(job.request.prompts, outcome.result.problems)
    files = ", ".join(bad_output_files(outcome.files))
    print(message(f"error: {described}\n  hint: {hint} See {files}."), file=sys.stderr)
