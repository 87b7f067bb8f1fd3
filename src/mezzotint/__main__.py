"""`python -m mezzotint`: the same as the `mezzotint` command."""

from mezzotint.cli import main

main()
