"""A comparison as Markdown, for a pull request."""

from collections.abc import Iterator, Sequence

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
    rows = [(c["name"], c["metrics"]) for c in report["candidates"]] + tables.floor_rows(report)
    cells = [[name, *(tables.number(metric, values.get(metric)) for metric in names)] for name, values in rows]
    yield from _table(["mean over all pictures", *map(tables.title, names)], cells)
    yield ""
    models = [report["reference"], *report["candidates"]]
    yield from _table(
        ["cost", *tables.COST_TITLES], [[m["name"], *tables.cost_row(m, report["reference"])] for m in models]
    )
    yield ""
    yield from (f"- {markdown(model['name'])} holds {tables.held(model)}" for model in models)
    missing = report["settings"]["unavailable"]
    yield from (f"- {METRICS[name].title} was not computed: it {markdown(why)}" for name, why in missing.items())
    environment = report["environment"]
    yield ""
    yield f"Mezzotint {environment['mezzotint']}, PyTorch {environment['torch']}, {environment['device']}."


def _names(report: Report) -> str:
    return ", ".join(markdown(candidate["name"]) for candidate in report["candidates"])


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(titles)} |"
    yield f"|---|{'---:|' * (len(titles) - 1)}"
    yield from (f"| {' | '.join(map(markdown, row))} |" for row in rows)
