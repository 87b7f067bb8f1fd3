"""The table of docs/conversions.md: each readable format and algorithm, converted to every target.

PYTHONPATH=src:tests python -m support.conversion_table
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from mezzotint.checkpoint import Checkpoint
from mezzotint.conversion import convert
from mezzotint.errors import Unsupported
from mezzotint.formats import targets
from support.checkpoint_makers import MAKERS, SVDQUANT
from support.nunchaku_files import CASES, LEGACY, golden
from support.pipeline_cases import Case, make_case
from support.support_table import Fact

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/conversions.md"
BEGIN, END = "<!-- tests/support/conversion_table.py -->\n", "<!-- end -->\n"
DATA = ROOT / "tests/data"
ROWS_OF = {"nunchaku_zimage_int4_r32": (), "nunchaku_flux1_nvfp4_r32": ("*norm*.linear",)}
"""{golden case to convert to a row-major file: layers that must stay BF16}"""


def sources(case: Case, folder: Path) -> Iterator[Path]:
    """Yield a small file of each format and algorithm; golden ones for Nunchaku's AWQ layers."""
    for name, make in MAKERS[case.name].items():
        if name not in SVDQUANT and not name.startswith("nunchaku"):
            yield make(case, folder / name)
    yield from (golden(DATA, name) for name in CASES)
    yield DATA / LEGACY
    for name, bf16 in ROWS_OF.items():
        yield convert(golden(DATA, name), folder / name, to="row-major", keep_bf16=bf16).output


def outcomes(source: Path, folder: Path) -> dict[str, str | list[str]]:
    """Return {target: "lossless", transforms, or reasons of an error}, and verify lossless ones."""
    found: dict[str, str | list[str]] = {}
    for to in targets():
        try:
            report = convert(source, folder / to, to=to)
        except Unsupported as refused:
            assert not (folder / to).exists()
            found[to] = [line.partition(": ")[2] for line in refused.message.splitlines()[1:]]
            continue
        if not report.transforms:
            assert same_numbers(Checkpoint.open(source), Checkpoint.open(report.output)), (
                source,
                to,
            )
        found[to] = ", ".join(report.transforms) or "lossless"
    return found


def same_numbers(one: Checkpoint, other: Checkpoint) -> bool:
    """Return whether two checkpoints have equal weights and quantize the same layers' inputs."""
    if set(one.modules) != set(other.modules) or set(one.plain) != set(other.plain):
        return False
    same_layers = all(
        torch.equal(one.weight(module), other.weight(module))
        and quantizes_activation(one, module) == quantizes_activation(other, module)
        for module in one.modules
    )
    return same_layers and all(
        torch.equal(one.tensor(name), other.tensor(name)) for name in one.plain
    )


def quantizes_activation(checkpoint: Checkpoint, module: str) -> list[bool]:
    """Return, for each piece of a layer, whether its input is quantized."""
    return [piece.quantizes_activation for piece in checkpoint.outline(module).pieces]


def table(case: Case, folder: Path) -> str:
    """Return Markdown with a row per format and algorithm and a column per target, then reasons.

    A Mezzotint file has no row, because it must convert as its source does, or AssertionError.
    """
    reasons: dict[str, int] = {}
    lines: dict[str, None] = {}
    for number, source in enumerate(sources(case, folder / "sources")):
        found = outcomes(source, folder / str(number))
        assert (
            outcomes(folder / str(number) / "mezzotint", folder / f"{number}-mezzotint") == found
        ), source
        cells = [_cell(found[to], reasons) for to in targets()]
        fact = Fact.of("convert", Checkpoint.open(source))
        lines[f"| {fact.format} | {fact.scheme} | {' | '.join(cells)} |"] = None
    head = [f"| from | algorithm | {' | '.join(targets())} |", "|---" * (2 + len(targets())) + "|"]
    notes = [f"{number}. {_sentence(reason)}" for reason, number in reasons.items()]
    return "\n".join(
        [
            *head,
            *lines,
            "",
            "A dash means the target cannot store some layers, so nothing is written. Reasons:",
            "",
            *notes,
            "",
        ]
    )


def _cell(outcome: str | list[str], reasons: dict[str, int]) -> str:
    if isinstance(outcome, str):
        return outcome
    return "– " + ", ".join(str(reasons.setdefault(reason, len(reasons) + 1)) for reason in outcome)


def _sentence(reason: str) -> str:
    """Add a subject to a reason that begins with a verb, because a report names the layer first."""
    return f"a layer {reason}" if reason.split()[0] in ("is", "has", "follows") else reason


def in_page() -> str:
    """Return the table that the page shows."""
    return PAGE.read_text().partition(BEGIN)[2].partition(END)[0]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        new = table(make_case("flux1", Path(folder) / "flux1"), Path(folder))
    before, begin, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + begin + new + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
