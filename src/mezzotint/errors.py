"""Every error that Mezzotint raises on purpose.

MezzotintError
├── CheckpointError          something is wrong with the files
│   ├── NotACheckpoint       the path holds nothing that could be loaded
│   ├── BrokenFile           a file is truncated, empty, or its header lies
│   ├── UnknownFormat        no format recognises the tensors, or config and tensors disagree
│   ├── MissingTensor        a tensor that the file's own contents call for is absent
│   ├── UnexpectedTensor     a tensor is left over, or stored twice
│   ├── ShapeMismatch        a tensor has a shape that its role forbids
│   └── BadScale             a scale is not finite, or not positive
├── Unsupported              sound, but nothing here can run it or hold it
├── UnsoundPicture           what was painted is NaN, one colour or noise
├── CannotWrite              the output cannot be written; what was there before is untouched
└── BadRequest               the caller asked for something that does not exist

Each carries `message` (what, where, expected, found) and `hint` (what to do next). The command line prints
both and exits with 2.
"""

from collections.abc import Sequence


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


class BrokenFile(CheckpointError):
    """A file is truncated, empty, or its header does not describe its bytes."""


class UnknownFormat(CheckpointError):
    """No format recognises the tensors, or the configuration and the tensors disagree."""


class MissingTensor(CheckpointError):
    """A tensor that the file's own contents call for is absent."""


class UnexpectedTensor(CheckpointError):
    """A tensor is left over, or stored twice."""


class ShapeMismatch(CheckpointError):
    """A tensor has a shape or dtype that its role forbids."""


class BadScale(CheckpointError):
    """A scale is not finite, or not positive."""


class Unsupported(MezzotintError):
    """The checkpoint is sound, but nothing here can run it or hold it."""


class UnsoundPicture(MezzotintError):
    """What was painted cannot be a picture: NaN, a single colour, saturated, or noise."""


class CannotWrite(MezzotintError):
    """The output cannot be written; what was there before is untouched, unless the message says otherwise."""


class BadRequest(MezzotintError):
    """The caller asked for something that does not exist."""


def listed(names: Sequence[str], most: int = 3) -> str:
    """Names as a message spells them out, the first few and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"
