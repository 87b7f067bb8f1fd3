"""Helpers that several tests and scripts share."""
