"""`--size`, as every command that paints takes it."""

from mezzotint.errors import BadRequest

SMALLEST, LARGEST = 16, 8192


def sides(size: str | None) -> dict[str, int]:
    """The settings that `--size` stands for: N, or WIDTHxHEIGHT."""
    if size is None:
        return {}
    given = [int(side) if side.isdecimal() and len(side) < 6 else 0 for side in size.lower().split("x")]
    if len(given) > 2 or not all(SMALLEST <= side <= LARGEST for side in given):
        raise BadRequest(f"--size is {size!r}", f"give N or WIDTHxHEIGHT, each from {SMALLEST} to {LARGEST}.")
    return {"width": given[0], "size": given[-1]}
