"""Tests set their own environment: `HF_HUB_OFFLINE=1 make test` failed 28 of them."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support import environment
from support.cli_runner import run

EXPORTED = {
    "HF_HUB_OFFLINE": "1",
    "HF_ENDPOINT": "https://mirror.invalid",
    "HF_TOKEN": "secret",
    "HUGGING_FACE_HUB_TOKEN": "secret",
    "TRANSFORMERS_OFFLINE": "1",
    "MEZZOTINT_TRACEBACK": "1",
    "NO_COLOR": "1",
    "FORCE_COLOR": "1",
    "COLUMNS": "20",
    "TERM": "dumb",
    "HTTPS_PROXY": "http://proxy.invalid:1",
}


def test_this_process_has_none_of_what_a_user_exports() -> None:
    from huggingface_hub import constants

    left = {name for name in EXPORTED if os.environ.get(name) == EXPORTED[name]}
    assert not left
    assert not constants.HF_HUB_OFFLINE
    assert constants.HF_HUB_CACHE.startswith(os.environ["HF_HOME"])


@given(st.sets(st.sampled_from(sorted(EXPORTED))))
def test_whatever_is_exported_leaves_the_same_environment(names: set[str]) -> None:
    exported = {"PATH": "/bin", "HOME": "/root"} | {name: EXPORTED[name] for name in names}
    environment.isolate(exported, "/cache")
    assert exported.pop("HF_HOME") == "/cache"
    assert exported == {"PATH": "/bin", "HOME": "/root"} | environment.TERMINAL


@pytest.mark.parametrize(
    ("name", "value"), [("COLUMNS", "12"), ("NO_COLOR", "1"), ("TERM", "dumb")]
)
def test_what_a_command_prints_into_a_pipe_is_the_same_everywhere(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run("inspect", "demo-fp8").stdout
    monkeypatch.setenv(name, value)
    assert run("inspect", "demo-fp8").stdout == expected
