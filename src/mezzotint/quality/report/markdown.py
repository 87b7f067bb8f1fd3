"""A comparison as Markdown, for a pull request."""

from collections.abc import Iterable, Iterator, Sequence

from mezzotint.escaping import markdown
from mezzotint.quality.metrics import METRICS
from mezzotint.quality.report import tables
from mezzotint.quality.report.tables import Report


def render(report: Report) -> str:
    """The verdict, the tables, and what could not be computed."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    yield f"# {report['verdict'].upper()}: {markdown(report['reference']['name'])} against {_names(report)}"
    yield ""
    yield f"{tables.verdict_sentence(report)}."
    if report["reference"]["problems"]:
        yield f"The reference itself: {markdown(tables.reference_problems(report))}."
    yield ""
    for candidate in report["candidates"]:
        yield f"- **{markdown(candidate['name'])}**: {candidate['verdict']} ({markdown(tables.judged_by(candidate))})"
        yield from (f"  - {markdown(reason)}" for reason in candidate["reasons"])
    yield ""
    names = tables.shown(report)
    yield from _table(["mean over all pictures", *map(tables.title, names)], _quality_rows(report, names))
    yield ""
    models = [report["reference"], *report["candidates"]]
    rows = [[markdown(m["name"]), *tables.cost_row(m, report["reference"])] for m in models]
    yield from _table(["cost", *tables.COST_TITLES], rows)
    yield ""
    yield from (f"- {markdown(model['name'])} holds {markdown(tables.held(model))}" for model in models)
    missing = report["settings"]["unavailable"]
    yield from (f"- {METRICS[name].title} was not computed: it {markdown(why)}" for name, why in missing.items())
    environment = report["environment"]
    yield ""
    yield f"Made by {markdown(report['command'])}"
    yield ""
    yield f"Mezzotint {environment['mezzotint']}, PyTorch {environment['torch']}, {markdown(environment['device'])}."


def _quality_rows(report: Report, names: Sequence[str]) -> Iterator[list[str]]:
    """One row a candidate, what breaks its gate in bold, and one for each end of the noise floor."""
    for candidate in report["candidates"]:
        failing = tables.failing(candidate)
        numbers = [tables.number(name, candidate["metrics"].get(name)) for name in names]
        marked = [f"**{number}**" if name in failing else number for name, number in zip(names, numbers, strict=True)]
        yield [markdown(candidate["name"]), *marked]
    for label, values in tables.floor_rows(report):
        yield [label, *(tables.number(name, values.get(name)) for name in names)]


def _names(report: Report) -> str:
    return ", ".join(markdown(candidate["name"]) for candidate in report["candidates"])


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(titles)} |"
    yield f"|---|{'---:|' * (len(titles) - 1)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
