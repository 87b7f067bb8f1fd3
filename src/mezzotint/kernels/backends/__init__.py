"""One file per backend, each with `BACKEND`."""
