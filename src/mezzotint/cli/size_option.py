"""The `--size` option."""

from mezzotint.errors import BadRequest

MIN_SIDE, MAX_SIDE = 16, 8192


def parse_size(size: str | None) -> dict[str, int]:
    """Return the width and height for `--size`: N or WIDTHxHEIGHT. Raises BadRequest."""
    if size is None:
        return {}
    sides = [
        int(side) if side.isdecimal() and len(side) < 6 else 0 for side in size.lower().split("x")
    ]
    if len(sides) > 2 or not all(MIN_SIDE <= side <= MAX_SIDE for side in sides):
        raise BadRequest(
            f"--size is {size!r}", f"give N or WIDTHxHEIGHT, each from {MIN_SIDE} to {MAX_SIDE}."
        )
    return {"width": sides[0], "height": sides[-1]}
