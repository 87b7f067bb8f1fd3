"""One file per format that can be written, each with `TARGET`; `writer` has the interface."""
