"""What is painted to compare models: two sets that come with the package, and files of the user's."""

from dataclasses import dataclass
from pathlib import Path

from mezzotint.builtin import DATA, DEMO, resolve
from mezzotint.errors import BadRequest
from mezzotint.hub import AnyPath

SETS = {path.stem: path for path in sorted((DATA / "prompts").glob("*.txt"))}
"""`default`: 24 of what quantization breaks first. `demo`: 24 of the captions that the built-in model knows."""


@dataclass(frozen=True)
class Prompt:
    """A prompt and what it is about: the heading above it in its file."""

    text: str
    about: str = ""


def default_set(model: str | AnyPath) -> str:
    """The set that fits a pipeline: the built-in model knows the captions of its own only."""
    return "demo" if resolve(model) == DATA / DEMO else "default"


def read_prompts(source: str) -> tuple[Prompt, ...]:
    """The prompts of a set or a text file: one a line, `# heading` above a group, empty lines between.

    Raises  BadRequest if there is no such set or file, it is empty, or has a prompt twice
    """
    path = SETS.get(source, Path(source))
    if not path.is_file():
        raise BadRequest(f"--prompts is {source!r}, and no such file is there", f"the sets are: {', '.join(SETS)}.")
    found: list[Prompt] = []
    about = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            about = line.lstrip("# ").strip()
        elif line.strip():
            found.append(Prompt(line.strip(), about))
    if not found:
        raise BadRequest(f"{path}: holds no prompt", "write one a line.")
    texts = [prompt.text for prompt in found]
    twice = next((text for text in texts if texts.count(text) > 1), None)
    if twice is not None:
        raise BadRequest(f"{path}: has the prompt {twice!r} twice", "leave one; --seeds paints each several times.")
    return tuple(found)
