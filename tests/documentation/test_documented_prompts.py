"""The built-in model knows every prompt that a page, a help text or the package gives it."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.main import get_command

import mezzotint
from demo_model import shapes
from mezzotint.builtin import DATA, DEMO
from mezzotint.cli import app
from mezzotint.demo import PROMPTS
from mezzotint.generation.generate import generate
from mezzotint.generation.pipeline import recommended_sampling
from mezzotint.generation.schedule import NO_STEPS, StepSchedule

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
OPTION = re.compile(r"--?[a-z]")
FLAGS = ("--grid", "--fast", "--json")


@dataclass(frozen=True)
class Example:
    """A documented command that generates with the built-in model."""

    prompts: tuple[str, ...]
    transformer: str | None
    bf16_steps: str | None
    count: int


def texts() -> Iterator[str]:
    yield from (page.read_text() for page in PAGES)
    yield from (command.help or "" for command in get_command(app).commands.values())
    yield from (
        file.read_text()
        for file in (ROOT / "src").rglob("*.py")
        if "mezzotint generate" in file.read_text()
    )


def read(line: str) -> Example | None:
    """The example on a line, or None if it is for another model."""
    words = shlex.split(line.strip().strip("`"), comments=True)[2:]
    prompts, options = [], {}
    while words:
        word = words.pop(0)
        if OPTION.match(word):
            options[word] = "" if word in FLAGS else words.pop(0)
        else:
            prompts.append(word)
    if options.get("--model", DEMO) != DEMO or not prompts:
        return None
    count = int(options.get("--count", 1))
    return Example(tuple(prompts), options.get("--transformer"), options.get("--bf16-steps"), count)


def examples() -> list[Example]:
    lines = {
        line
        for text in texts()
        for line in re.findall(r'^\s*(mezzotint generate ".*)$', text, re.M)
    }
    return sorted({found for line in lines if (found := read(line))}, key=str)


@cache
def pipeline(transformer: str | None) -> Any:
    return mezzotint.load(DEMO, transformer=transformer, device="cpu")


def judged(image: Image.Image, prompt: str) -> dict[str, Any]:
    return {name: seen for name, seen in shapes.score(image, prompt).items() if name != "iou"}


def test_there_are_examples_in_the_readme_and_in_the_help() -> None:
    assert len(examples()) >= 4
    assert any(example.bf16_steps for example in examples())


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.prompts[0])
def test_an_example_generates_what_it_says(example: Example) -> None:
    schedule = StepSchedule.parse(example.bf16_steps) if example.bf16_steps else NO_STEPS
    seeds = [number * example.count for number in range(len(example.prompts))]
    images = generate(
        pipeline(example.transformer),
        example.prompts,
        seeds=seeds,
        sampling=recommended_sampling(DEMO),
        bf16_steps=schedule,
    ).images
    for image, prompt in zip(images, example.prompts, strict=True):
        assert all(judged(image, prompt).values()), (prompt, judged(image, prompt))


def test_prompts_of_the_package_are_captions_that_the_model_was_trained_on() -> None:
    """Pages in Python, and the sets that `demo`, `compare` and `diagnose` generate."""
    written = (DATA / "prompts/demo.txt").read_text().splitlines()
    in_python = re.findall(
        r'mezzotint\.generate\(pipe, \["([^"]+)"\]', "\n".join([*texts(), mezzotint.__doc__ or ""])
    )
    assert in_python
    for caption in (
        *PROMPTS,
        *in_python,
        *(line for line in written if line and not line.startswith("#")),
    ):
        assert str(shapes.parse(caption)) == caption
