"""Scripts that created the built-in model."""
