"""The environment that tests run in: what a user has exported must not change what they find."""

from collections.abc import MutableMapping

FAMILIES = (
    "CLICOLOR",
    "DIFFUSERS_",
    "HF_",
    "HUGGINGFACE_",
    "HUGGING_FACE_",
    "MEZZOTINT_",
    "TRANSFORMERS_",
    "TTY_",
    "TYPER_",
    "_TYPER_",
)
"""Prefixes of variables that decide where models come from, and what is printed."""
SINGLE = ("FORCE_COLOR", "GITHUB_ACTIONS", "LINES", "NO_COLOR", "PY_COLORS", "TERMINAL_WIDTH")
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
"""Also in capitals; the Hub of the tests is on this machine."""
TERMINAL = {"COLUMNS": "120", "TERM": "xterm"}


def isolate(environment: MutableMapping[str, str], home: str) -> None:
    """Remove all variables that affect libraries or printing, and set a terminal for tests.

    Call this before importing huggingface_hub, which reads its settings once.

    home   folder for huggingface_hub's cache and token
    """
    for name in list(environment):
        if name.startswith(FAMILIES) or name in SINGLE or name.lower() in PROXIES:
            del environment[name]
    environment.update(TERMINAL)
    environment["HF_HOME"] = home
