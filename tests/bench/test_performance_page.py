"""The tables of docs/performance.md are those of the recorded rows."""

import json

from docs.render_benchmarks import PAGE, rendered, rows


def test_the_page_shows_the_recorded_rows() -> None:
    assert PAGE.read_text() == rendered(PAGE.read_text())


def test_every_row_names_its_machine_its_commit_and_its_command() -> None:
    for row in rows():
        assert row["call_ms"]["count"] >= 12
        assert {"device", "torch", "commit", "command", "date"} <= row.keys(), json.dumps(row)[:80]
        assert row["command"].startswith(f"mezzotint bench {row['case']['model']} ")
        assert f"--scheme {row['case']['scheme']}" in row["command"]
