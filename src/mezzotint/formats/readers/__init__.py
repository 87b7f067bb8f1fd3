"""One file per on-disk format, each with `FORMAT`."""
