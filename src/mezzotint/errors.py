"""Every deliberate error of Mezzotint.

MezzotintError
├── CheckpointError          something is wrong with the files
│   ├── NotACheckpoint       the path holds nothing that could be loaded
│   │   └── NotSafetensors   it holds weights in another kind of file, which may be intact
│   ├── BrokenFile           a file is truncated or empty, or its header contradicts it
│   ├── UnknownFormat        configuration and tensors disagree, or leave the byte order open
│   │   └── UnreadFormat     no known format or model has such tensors; the file may be intact
│   ├── MissingTensor        a tensor that other tensors require is absent
│   ├── UnexpectedTensor     a tensor is left over, or stored twice
│   │   └── UnknownVariant   it belongs to an unknown variant of the model
│   ├── ShapeMismatch        a tensor has the wrong shape or dtype
│   └── BadScale             a scale is not finite, or not positive
├── HubError                 the Hub failed, is unreachable, or sent something unexpected
├── BrokenPlugin             an installed plugin cannot be used
├── Unsupported              the checkpoint is intact, but nothing can run or store it
├── BadOutput                a generated image is NaN, one color, or noise
├── Cancelled                the caller canceled a generation
├── CannotWrite              the output cannot be written; existing files are untouched
└── BadRequest               the caller named something that does not exist

Each has a `message` (what, where, expected, actual) and a `hint` (what to do next). The command
line prints both, with --json as an object, and exits with 2; see `mezzotint.cli.failures`.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class MezzotintError(Exception):
    """Base of all deliberate errors; `hint` says in one sentence what to do next, or is empty."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def with_location(self, location: str) -> "MezzotintError":
        """Return a copy whose message begins with `location`."""
        return type(self)(f"{location}: {self.message}", self.hint)

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class CheckpointError(MezzotintError):
    """Something is wrong with the files of a checkpoint."""


class NotACheckpoint(CheckpointError):
    """The path holds nothing that could be loaded."""


class NotSafetensors(NotACheckpoint):
    """The path holds weights in a kind of file that is not read; they may be intact."""


class BrokenFile(CheckpointError):
    """A file is truncated or empty, or its header does not describe its bytes."""


class UnknownFormat(CheckpointError):
    """Configuration and tensors disagree, or do not say how bytes are arranged."""


class UnreadFormat(UnknownFormat):
    """No known format or model family has such tensors; the file may be intact."""


class MissingTensor(CheckpointError):
    """A tensor is absent that other tensors or the model require."""


class UnexpectedTensor(CheckpointError):
    """A tensor belongs to nothing in the model, or is stored twice."""


class UnknownVariant(UnexpectedTensor):
    """No known model of the family has these tensors; the file may be intact."""


class ShapeMismatch(CheckpointError):
    """A tensor has a shape or dtype that its layer cannot use."""


class BadScale(CheckpointError):
    """A scale is not finite, or not positive."""


class HubError(MezzotintError):
    """The Hugging Face Hub failed, is unreachable, or sent something unexpected."""


class BrokenPlugin(MezzotintError):
    """An installed plugin cannot be imported, or declares an object that cannot be used."""


class Unsupported(MezzotintError):
    """The checkpoint is intact, but nothing installed here can run or store it."""


class BadOutput(MezzotintError):
    """A generated image is NaN, a single color, saturated, or noise."""


class Cancelled(MezzotintError):
    """The caller canceled a generation between two steps."""


class CannotWrite(MezzotintError):
    """The output cannot be written; existing files are untouched unless the message says so."""


class BadRequest(MezzotintError):
    """The caller named something that does not exist."""


def require_known(kind: str, name: str, known: Iterable[str]) -> None:
    """Raise BadRequest, with similar names in the hint, if a name is not among the known ones.

    kind   what the name is of, such as "backend"
    """
    names = tuple(known)
    if name not in names:
        raise BadRequest(f"there is no {kind} {name!r}", there_are(name, names))


def there_are(name: str, known: Iterable[str]) -> str:
    """Return the hint for an unknown name: a similar known name, and all known names."""
    names = list(known)
    return f"{did_you_mean(name, names)}there are: {', '.join(names)}."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the question whether a similar known name was meant, or an empty string."""
    originals = {original.lower(): original for original in known}
    close = get_close_matches(name.lower(), originals, n=1)
    return f"did you mean {originals[close[0]]}? " if close else ""


def join_names(names: Sequence[str], limit: int = 3) -> str:
    """Return the first `limit` names, joined by commas, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{', '.join(names[:limit])}{more}"
