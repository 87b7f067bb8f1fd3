"""Prompts for comparisons: three sets in the package, and the user's own files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from mezzotint.builtin import DATA, is_demo
from mezzotint.errors import BadRequest
from mezzotint.generation.source import PipelineSource
from mezzotint.generation.source_image import SourceImage, read_source_image

SETS = {path.stem: path for path in sorted((DATA / "prompts").glob("*.txt"))}
"""`default`: 24 prompts that show quantization damage first. `demo`: 24 captions that the built-in
model was trained on. `edit`: 24 instructions that apply to any image."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, its category (the heading above it in its file) and the image that it edits."""

    text: str
    category: str = ""
    image: SourceImage | None = None

    @property
    def source_image(self) -> Image | None:
        """Return the image to edit, or None."""
        return self.image.to_pil if self.image else None

    def to_dict(self) -> dict[str, Any]:
        return {"text": self.text, "category": self.category} | (
            self.image.to_dict() if self.image else {}
        )


def default_set(source: PipelineSource, has_source_image: bool) -> str:
    """Return the name of the default set for a pipeline.

    The built-in model understands only the captions that it was trained on.
    """
    if has_source_image:
        return "edit"
    return "demo" if is_demo(source.folder) else "default"


def prompts_for(
    models: Sequence[PipelineSource], source: str | None, image: str | Path | None
) -> tuple[Prompt, ...]:
    """Return the prompts for a comparison of models.

    source  a set or a file; None selects the default set of the first model
    image   file of the source image for prompts that name no image
    Raises  BadRequest if the file cannot be used, if a model accepts no source image and a prompt
            has one, or if a model requires one and a prompt has none
    """
    default_image = None if image is None else read_source_image(image)
    prompts = read_prompts(
        source or default_set(models[0], has_source_image=default_image is not None),
        default_image,
    )
    for model in models:
        for has_source_image in {prompt.image is not None for prompt in prompts}:
            model.check_source_image(has_source_image)
    return prompts


def generate_arguments(prompts: Sequence[Prompt], seed: int) -> dict[str, Any]:
    """Return the arguments for `generate`: every prompt starts from the noise of the same seed."""
    return {
        "prompts": [prompt.text for prompt in prompts],
        "seeds": [seed] * len(prompts),
        "source_images": [prompt.source_image for prompt in prompts],
    }


def read_prompts(source: str, image: SourceImage | None = None) -> tuple[Prompt, ...]:
    """Read the prompts of a built-in set or a text file.

    A file has one prompt per line. A line `# heading` starts a category. Empty lines are ignored.
    A tab after a prompt introduces the image to edit, as a path relative to the file.

    image   source image for prompts that name no image
    Raises  BadRequest if the set, the file or an image does not exist, if the file has no prompt,
            or if a prompt is repeated for the same image
    """
    path = SETS.get(source, Path(source))
    if not path.is_file():
        raise BadRequest(
            f"--prompts is {source!r}, and this file does not exist",
            f"the built-in sets are: {', '.join(SETS)}.",
        )
    prompts = tuple(_parse_prompts(path, image))
    if not prompts:
        raise BadRequest(f"{path}: contains no prompt", "write one prompt per line.")
    edits = [(prompt.text, prompt.image.data if prompt.image else None) for prompt in prompts]
    duplicate = next((text for text, data in edits if edits.count((text, data)) > 1), None)
    if duplicate is not None:
        raise BadRequest(
            f"{path}: the prompt {duplicate!r} is repeated",
            "remove one; --seeds generates several images per prompt.",
        )
    return prompts


def _parse_prompts(path: Path, image: SourceImage | None) -> Iterator[Prompt]:
    category = ""
    for line in map(str.strip, _read_text(path).splitlines()):
        if line.startswith("#"):
            category = line.lstrip("# ")
        elif line:
            text, _, file = (part.strip() for part in line.partition("\t"))
            source_image = read_source_image(path.parent / file) if file else image
            yield Prompt(text, category, source_image)


def _read_text(path: Path) -> str:
    """Return the text of a UTF-8 file. Raises BadRequest for other encodings."""
    try:
        # Windows editors write a byte order mark, which is not part of the first prompt.
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        invalid = f"byte {error.start} is {error.object[error.start]:#04x}"
        raise BadRequest(f"{path}: is not UTF-8: {invalid}", "save it as UTF-8.") from error
