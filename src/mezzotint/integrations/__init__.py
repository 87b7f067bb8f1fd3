"""Adapters to other libraries: the Hugging Face Hub and diffusers' model loader."""
