"""What is painted to compare models: three sets that come with the package, and files of the user's."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from mezzotint.builtin import DATA, DEMO, resolve
from mezzotint.editing import SourceImage, read_image
from mezzotint.errors import BadRequest
from mezzotint.hub import AnyPath
from mezzotint.pipelines import check_image

SETS = {path.stem: path for path in sorted((DATA / "prompts").glob("*.txt"))}
"""`default`: 24 of what quantization breaks first. `demo`: 24 of the captions that the built-in model knows.
`edit`: 24 instructions for any picture."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, what it is about (the heading above it in its file), and the picture that it edits."""

    text: str
    about: str = ""
    image: SourceImage | None = None

    @property
    def picture(self) -> Image | None:
        return self.image.picture if self.image else None

    def to_dict(self) -> dict[str, Any]:
        return {"text": self.text, "about": self.about} | (self.image.to_dict() if self.image else {})


def default_set(model: str | AnyPath, edits: bool) -> str:
    """The set that fits a pipeline: the built-in model knows the captions of its own only."""
    if edits:
        return "edit"
    return "demo" if resolve(model) == DATA / DEMO else "default"


def prompts_for(models: Sequence[str], source: str | None, image: str | Path | None) -> tuple[Prompt, ...]:
    """The prompts for models that are to be compared; None for the set that fits the first, or a picture to edit.

    image   file of the picture that prompts edit which name none of their own
    Raises  BadRequest as `read_prompts`, and if a model takes no picture and there is one, or needs one and has none
    """
    edited = None if image is None else read_image(image)
    found = read_prompts(source or default_set(models[0], edits=edited is not None), edited)
    for model in models:
        for edits in {prompt.image is not None for prompt in found}:
            check_image(model, edits)
    return found


def request(prompts: Sequence[Prompt], seed: int) -> dict[str, Any]:
    """What `paint` is asked for: every prompt from the noise of one seed."""
    return {
        "prompts": [prompt.text for prompt in prompts],
        "seeds": [seed] * len(prompts),
        "images": [prompt.picture for prompt in prompts],
    }


def read_prompts(source: str, image: SourceImage | None = None) -> tuple[Prompt, ...]:
    """The prompts of a set or a text file: one a line, `# heading` above a group, empty lines between.

    After a prompt and a tab may stand the picture that it edits, a path from where the file is.

    image   what prompts edit that name no picture
    Raises  BadRequest if there is no such set, file or picture, it is empty, or has a prompt twice for one picture
    """
    path = SETS.get(source, Path(source))
    if not path.is_file():
        raise BadRequest(f"--prompts is {source!r}, and no such file is there", f"the sets are: {', '.join(SETS)}.")
    found: list[Prompt] = []
    about = ""
    for line in map(str.strip, _text(path).splitlines()):
        if line.startswith("#"):
            about = line.lstrip("# ")
        elif line:
            text, _, named = (part.strip() for part in line.partition("\t"))
            found.append(Prompt(text, about, read_image(path.parent / named) if named else image))
    if not found:
        raise BadRequest(f"{path}: holds no prompt", "write one a line.")
    edits = [(prompt.text, prompt.image.data if prompt.image else None) for prompt in found]
    twice = next((text for text, data in edits if edits.count((text, data)) > 1), None)
    if twice is not None:
        raise BadRequest(f"{path}: has the prompt {twice!r} twice", "leave one; --seeds paints each several times.")
    return tuple(found)


def _text(path: Path) -> str:
    """The file's text; a byte order mark, as Windows' editors write it, is no part of the first prompt."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = f"byte {error.start} is {error.object[error.start]:#04x}"
        raise BadRequest(f"{path}: is not UTF-8: {wrong}", "save it as UTF-8.") from error
