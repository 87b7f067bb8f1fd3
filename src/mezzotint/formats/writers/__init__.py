"""One file per target format of `convert`, each with `TARGET`."""
