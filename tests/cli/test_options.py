"""Options as dataclass fields: what Typer sees of them, and what the command receives."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from mezzotint.cli.options import checked, checked_each, with_flat_signature
from mezzotint.errors import BadRequest
from mezzotint.quality.compare.command import command_line
from support.cli_runner import run


def refuse_zero(number: int) -> None:
    if number == 0:
        raise BadRequest("zero")


@dataclass(frozen=True, kw_only=True)
class Shared:
    verbose: Annotated[bool, typer.Option("--verbose")] = False


@dataclass(frozen=True, kw_only=True)
class CountOptions(Shared):
    name: Annotated[str, typer.Argument()]
    count: Annotated[int | None, typer.Option(callback=checked(refuse_zero))] = None
    more: Annotated[list[int], typer.Option(callback=checked_each(refuse_zero))] = field(
        default_factory=lambda: [7]
    )


GUIDANCE = {
    "--guidance": ("guidance", 3.0),
    "--guidance-2": ("guidance_2", 2.5),
    "--true-cfg": ("true_cfg_scale", 4.0),
    "--negative-prompt": ("negative_prompt", "blurred"),
    "--flow-shift": ("flow_shift", 5.0),
}
received: list[CountOptions] = []


def count(options: CountOptions) -> None:
    """Count."""
    received.append(options)


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command()(with_flat_signature(count))
    received.clear()
    return app


def test_command_receives_one_object(app: typer.Typer) -> None:
    line = ["a", "--count", "2", "--more", "1", "--more", "3", "--verbose"]
    assert CliRunner().invoke(app, line).exit_code == 0
    assert received == [CountOptions(name="a", count=2, more=[1, 3], verbose=True)]


def test_defaults_are_those_of_the_dataclass(app: typer.Typer) -> None:
    assert CliRunner().invoke(app, ["a"]).exit_code == 0
    assert received == [CountOptions(name="a")]


def test_options_of_the_class_come_before_those_of_its_bases(app: typer.Typer) -> None:
    text = CliRunner().invoke(app, ["--help"]).stdout
    assert "Count." in text
    positions = [text.index(f"--{name}") for name in ("count", "more", "verbose")]
    assert positions == sorted(positions)


@pytest.mark.parametrize("option", ["--count", "--more"])
def test_wrong_value_is_found_before_the_command_runs(app: typer.Typer, option: str) -> None:
    result = CliRunner().invoke(app, ["a", option, "0"])
    assert isinstance(result.exception, BadRequest)
    assert not received


def test_compare_passes_on_every_sampling_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: dict[str, Any] = {}

    def compare(*_sources: object, **settings: Any) -> None:
        passed.update(settings)
        raise BadRequest("enough")

    monkeypatch.setattr("mezzotint.quality.compare.compare", compare)
    given = [word for option, (_, value) in GUIDANCE.items() for word in (option, str(value))]
    done = run("compare", "demo", "demo-fp8", "-o", "report", *given, cwd=tmp_path)
    assert "enough" in done.stderr
    assert passed.items() >= dict(GUIDANCE.values()).items()
    words = command_line(["demo"], **{name: passed[name] for name, _ in GUIDANCE.values()}).split()
    assert words == ["mezzotint", "compare", "demo", *given]
