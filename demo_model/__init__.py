"""How the built-in model was made."""
