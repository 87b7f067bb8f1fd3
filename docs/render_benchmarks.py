"""Write the table of benchmarks/results/bench.jsonl into docs/performance.md, between its markers.

python docs/render_benchmarks.py
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks/results/bench.jsonl"
PAGE = ROOT / "docs/performance.md"
BEGIN, END = "<!-- rows of benchmarks/results/bench.jsonl -->\n", "<!-- end of rows -->\n"
HEAD = (
    "model",
    "scheme",
    "GPU",
    "attention",
    "ms a call",
    "x BF16",
    "weights, GB",
    "peak, GB",
    "TFLOP/s",
    "once a generation, ms",
    "first call, s",
    "goal, ms",
    "run",
)
GOALS = {
    ("flux1-dev", "fp8", "fa3"): 75,
    ("flux1-dev", "fp8", "fa3_fp8"): 70,
    ("flux1-dev", "nvfp4", "fa3"): 90,
    ("flux1-dev", "svdquant-int4", "fa3"): 98,
    ("flux1-dev", "svdquant-nvfp4", "fa3"): 98,
    ("flux2-dev", "fp8", "fa3"): 255,
    ("flux2-dev", "nvfp4", "fa3"): 300,
    ("flux2-klein-4b", "fp8", "fa3"): 37,
    ("z-image-turbo", "fp8", "fa3"): 62,
    ("z-image-turbo", "svdquant-int4", "fa3"): 76,
    ("qwen-image", "fp8", "fa3"): 88,
    ("wan2.2-a14b", "fp8", "fa3"): 2150,
    ("wan2.2-a14b", "fp8", "fa3_fp8"): 1750,
}


def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in ROWS.read_text().splitlines()]


def table(measured: list[dict[str, Any]]) -> str:
    """Return Markdown; ratios are to the BF16 row of the model, in the same run if it has one."""
    bf16 = [row for row in measured if row["case"]["scheme"] == "bf16"]
    lines = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    return "\n".join(lines + [f"| {' | '.join(cells(row, bf16))} |" for row in measured]) + "\n"


def cells(row: dict[str, Any], bf16: list[dict[str, Any]]) -> list[str]:
    case, spread = row["case"], row["call_ms"]
    stored = case["resident"] == "stored"
    goal = GOALS.get((case["model"], case["scheme"], row["attention"])) if stored else None
    of_model = [other for other in bf16 if other["case"]["model"] == case["model"]]
    base = next((other for other in of_model if other["run"] == row["run"]), of_model[-1])
    ratio = (
        "" if case["scheme"] == "bf16" else f"{base['call_ms']['median'] / spread['median']:.2f}"
    )
    return [
        case["model"],
        case["scheme"] + ("" if stored else ", resident FP8"),
        row["device"].split()[1],
        row["attention"],
        f"{spread['median']:.1f}",
        ratio,
        f"{sum(row['resident'].values()) / 1e9:.2f}",
        f"{row['memory']['peak_allocated'] / 1e9:.2f}",
        f"{row['tflops']:.0f}",
        f"{row['modulation_ms']:.0f}" if row.get("modulation_ms") else "",
        f"{row['first_s']:.1f}",
        "" if goal is None else f"{goal}" + (", met" if spread["median"] <= goal else ""),
        str(row["run"]),
    ]


def rendered(page: str) -> str:
    before, rest = page.split(BEGIN)
    return before + BEGIN + table(rows()) + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text()))
