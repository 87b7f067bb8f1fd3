"""Every error that Mezzotint raises on purpose.

MezzotintError
├── CheckpointError          something is wrong with the files
│   ├── NotACheckpoint       the path holds nothing that could be loaded
│   │   └── NotSafetensors   it holds weights in another kind of file, which may be sound
│   ├── BrokenFile           a file is truncated, empty, or its header lies
│   ├── UnknownFormat        config and tensors disagree, or do not say how bytes are arranged
│   │   └── UnreadFormat     no format or model known here has such tensors; the file may be sound
│   ├── MissingTensor        a tensor that the file's own contents call for is absent
│   ├── UnexpectedTensor     a tensor is left over, or stored twice
│   │   └── UnknownVariant   it belongs to a variant of the model that is not read; the file may be sound
│   ├── ShapeMismatch        a tensor has a shape that its role forbids
│   └── BadScale             a scale is not finite, or not positive
├── HubError                 the Hub failed, cannot be reached, or answers with something else
├── Unsupported              sound, but nothing here can run it or hold it
├── UnsoundPicture           what was painted is NaN, one colour or noise
├── CannotWrite              the output cannot be written; what was there before is untouched
└── BadRequest               the caller asked for something that does not exist

Each carries `message` (what, where, expected, found) and `hint` (what to do next). The command line prints
both, or with --json both in an object, and exits with 2; see `mezzotint.cli.failures`.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class MezzotintError(Exception):
    """Base of all deliberate errors; `hint` is one sentence that says what to do next, or empty."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def at(self, where: str) -> "MezzotintError":
        """The same error, its message beginning with where it happened."""
        return type(self)(f"{where}: {self.message}", self.hint)

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class CheckpointError(MezzotintError):
    """Something is wrong with the files."""


class NotACheckpoint(CheckpointError):
    """The path holds nothing that could be loaded."""


class NotSafetensors(NotACheckpoint):
    """The path holds weights in another kind of file, such as GGUF or a pickle; they may be sound."""


class BrokenFile(CheckpointError):
    """A file is truncated, empty, or its header does not describe its bytes."""


class UnknownFormat(CheckpointError):
    """The configuration and the tensors disagree, or do not say how bytes are arranged."""


class UnreadFormat(UnknownFormat):
    """No format or model family known here has such tensors; the file may be sound."""


class MissingTensor(CheckpointError):
    """A tensor that the file's own contents call for is absent."""


class UnexpectedTensor(CheckpointError):
    """A tensor is left over, or stored twice."""


class UnknownVariant(UnexpectedTensor):
    """Tensors are left over that no known model of the family has; the file may be sound."""


class ShapeMismatch(CheckpointError):
    """A tensor has a shape or dtype that its role forbids."""


class BadScale(CheckpointError):
    """A scale is not finite, or not positive."""


class HubError(MezzotintError):
    """The Hugging Face Hub failed, cannot be reached, or answers with something else than was asked for."""


class Unsupported(MezzotintError):
    """The checkpoint is sound, but nothing here can run it or hold it."""


class UnsoundPicture(MezzotintError):
    """What was painted cannot be a picture: NaN, a single colour, saturated, or noise."""


class CannotWrite(MezzotintError):
    """The output cannot be written; what was there before is untouched, unless the message says otherwise."""


class BadRequest(MezzotintError):
    """The caller asked for something that does not exist."""


def there_are(name: str, known: Iterable[str]) -> str:
    """The hint about a name that does not exist: which one may be meant, and all that there are."""
    names = list(known)
    return f"{did_you_mean(name, names)}there are: {', '.join(names)}."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The question which of the known names is meant, where one is like `name`; or else nothing."""
    spellings = {other.lower(): other for other in known}
    close = get_close_matches(name.lower(), spellings, n=1)
    return f"did you mean {spellings[close[0]]}? " if close else ""


def listed(names: Sequence[str], most: int = 3) -> str:
    """Names as a message spells them out, the first few and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"
