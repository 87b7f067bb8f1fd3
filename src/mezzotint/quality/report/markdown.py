"""A comparison as Markdown, for example for a pull request."""

from collections.abc import Iterable, Iterator, Sequence

from mezzotint.quality.metrics.image import METRICS
from mezzotint.quality.report import tables
from mezzotint.quality.report.tables import Report
from mezzotint.untrusted.escaping import markdown


def render(report: Report) -> str:
    """Return the verdict, the tables and the metrics that could not be computed."""
    return "\n".join([*_verdict(report), *_tables(report), *_origin(report)]) + "\n"


def _verdict(report: Report) -> Iterator[str]:
    names = ", ".join(markdown(candidate["name"]) for candidate in report["candidates"])
    yield f"# {report['verdict'].upper()}: {markdown(report['reference']['name'])} against {names}"
    yield ""
    yield f"{tables.verdict_sentence(report)}."
    if report["reference"]["problems"]:
        yield f"The reference itself: {markdown(tables.reference_problems(report))}."
    yield ""
    for candidate in report["candidates"]:
        gate = markdown(tables.gate_text(candidate))
        yield f"- **{markdown(candidate['name'])}**: {candidate['verdict']} ({gate})"
        yield from (f"  - {markdown(reason)}" for reason in candidate["reasons"])
    yield ""


def _tables(report: Report) -> Iterator[str]:
    names = tables.shown_metrics(report)
    yield from _table(
        ["mean over all images", *map(tables.title, names)], _quality_rows(report, names)
    )
    yield ""
    models = [report["reference"], *report["candidates"]]
    rows = [[markdown(m["name"]), *tables.cost_row(m, report["reference"])] for m in models]
    yield from _table(["cost", *tables.COST_TITLES], rows)
    yield ""
    yield from (
        f"- resident weights of {markdown(model['name'])}: {markdown(tables.resident_text(model))}"
        for model in models
    )
    missing = report["settings"]["unavailable"]
    yield from (
        f"- {METRICS[name].title} was not computed: it {markdown(reason)}"
        for name, reason in missing.items()
    )


def _origin(report: Report) -> Iterator[str]:
    environment = report["environment"]
    yield ""
    yield f"Created by {markdown(report['command'])}"
    yield ""
    versions = f"Mezzotint {environment['mezzotint']}, PyTorch {environment['torch']}"
    yield f"{versions}, {markdown(environment['device'])}."


def _quality_rows(report: Report, names: Sequence[str]) -> Iterator[list[str]]:
    """Yield one row per candidate, with failing values in bold, and the rows of the noise floor."""
    for candidate in report["candidates"]:
        failing = tables.failing(candidate)
        numbers = [tables.number(name, candidate["metrics"].get(name)) for name in names]
        marked = [
            f"**{number}**" if name in failing else number
            for name, number in zip(names, numbers, strict=True)
        ]
        yield [markdown(candidate["name"]), *marked]
    for label, values in tables.floor_rows(report):
        yield [label, *(tables.number(name, values.get(name)) for name in names)]


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(titles)} |"
    yield f"|---|{'---:|' * (len(titles) - 1)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
