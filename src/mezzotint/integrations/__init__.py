"""Integrations with other libraries: diffusers' `from_pretrained` and `save_pretrained`."""
