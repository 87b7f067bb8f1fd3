"""What passing tests have shown of checkpoints, and its table in docs/support.md.

A test uses `record_support` to record what it has shown of a checkpoint; the checkpoint gives its
family, format and scheme. `pytest --readme` writes the table; without it, a complete run compares
the page with the table.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from mezzotint.checkpoint import Checkpoint
from mezzotint.families import families
from mezzotint.formats.readers import modelopt
from mezzotint.schemes import BF16

PAGE = Path(__file__).parents[2] / "docs/support.md"
BEGIN, END = "<!-- what passing tests have shown: pytest --readme -->\n", "<!-- end -->\n"
SHOWN = {"golden": "G", "load": "L", "run": "R", "convert": "C"}
"""{what can be shown: its letter in the table}"""
FAMILIES = ("flux1", "flux2", "wan", "zimage", "qwenimage")


@dataclass(frozen=True)
class Fact:
    """One thing that was shown of files of a format that hold a family's weights in a scheme."""

    shown: str
    format: str
    scheme: str
    family: str

    @classmethod
    def of(cls, shown: str, checkpoint: Checkpoint) -> "Fact":
        title = checkpoint.detected.format.title
        if set(checkpoint.shapes) != set(checkpoint.plain) and not checkpoint.contents.linears:
            title += ", makers' names"
        return cls(shown, title, _scheme(checkpoint), checkpoint.family.name)


def _scheme(checkpoint: Checkpoint) -> str:
    """Return the file's own name of its scheme, or the schemes of its layers."""
    if checkpoint.detected.format is modelopt.FORMAT:
        return str(modelopt.declared_quantization(checkpoint.header)["quant_algo"])
    titles = {
        linear.scheme.title
        for linear in checkpoint.contents.linears.values()
        if linear.scheme is not BF16
    }
    return " + ".join(sorted(titles)) or "–"


def append_facts(folder: Path, worker: str, facts: Iterable[Fact]) -> None:
    """Append facts to the file of one of the processes that run tests side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{worker}.jsonl").open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(asdict(fact)) + "\n" for fact in facts)


def read_facts(folder: Path) -> set[Fact]:
    """Return the facts that all processes have appended."""
    lines = (
        line
        for file in folder.glob("*.jsonl")
        for line in file.read_text(encoding="utf-8").splitlines()
    )
    return {Fact(**json.loads(line)) for line in lines}


def table(facts: Iterable[Fact]) -> str:
    """Return Markdown: a row per format and scheme, a column per family, letters as cells."""
    cells: dict[tuple[str, str], dict[str, set[str]]] = {}
    for fact in facts:
        cells.setdefault((fact.format, fact.scheme), {}).setdefault(fact.family, set()).add(
            fact.shown
        )
    titles = [families()[name].title for name in FAMILIES]
    lines = [f"| format | scheme | {' | '.join(titles)} |", "|---" * (2 + len(titles)) + "|"]
    for (format_, scheme), shown in sorted(
        cells.items(), key=lambda cell: [title.lower() for title in cell[0]]
    ):
        letters = (
            " ".join(SHOWN[what] for what in SHOWN if what in shown.get(name, ()))
            for name in FAMILIES
        )
        lines.append(f"| {format_} | {scheme} | {' | '.join(cell or '–' for cell in letters)} |")
    return "\n".join(lines) + "\n"


def in_page(begin: str = BEGIN) -> str:
    """Return the table on the page after the line `begin`."""
    return PAGE.read_text().partition(begin)[2].partition(END)[0]


def write_page(new: str, begin: str = BEGIN) -> None:
    before, _, rest = PAGE.read_text().partition(begin)
    _, end, after = rest.partition(END)
    PAGE.write_text(before + begin + new + end + after)
