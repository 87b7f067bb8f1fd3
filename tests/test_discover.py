"""Objects are found in the modules of a package and in plugins; a broken plugin is named."""

from pathlib import Path

import pytest

from mezzotint.discover import collect, plugin_group
from mezzotint.errors import BrokenPlugin
from support.plugin_packages import install_plugin

SCHEMES = "mezzotint.schemes"


def test_plugin_group_is_the_last_part_of_the_package() -> None:
    assert plugin_group("mezzotint.families") == "mezzotint.families"
    assert plugin_group("mezzotint.kernels.backends") == "mezzotint.backends"


def test_plugin_object_is_found_beside_those_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "from types import SimpleNamespace\nSCHEME = SimpleNamespace(name='int2')\n"
    before = collect(SCHEMES, "SCHEME")
    install_plugin(tmp_path, monkeypatch, SCHEMES, "plugin_int2:SCHEME", source)
    after = collect(SCHEMES, "SCHEME")
    assert set(after) == {*before, "int2"}
    assert list(after) == sorted(after)


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("plugin_missing", "", "cannot be loaded .AttributeError"),
        (
            "plugin_import",
            "import a_module_that_is_nowhere",
            "cannot be loaded .ModuleNotFoundError",
        ),
        ("plugin_raises", "SCHEME = 1 / 0", "cannot be loaded .ZeroDivisionError"),
        ("plugin_unnamed", "SCHEME = object()", "no attribute `name`"),
        (
            "plugin_twice",
            "from types import SimpleNamespace\nSCHEME = SimpleNamespace(name='fp8')",
            "'fp8' is already in use",
        ),
    ],
)
def test_broken_plugin_is_an_error_that_names_it(
    module: str, source: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_plugin(tmp_path, monkeypatch, SCHEMES, f"{module}:SCHEME", source)
    with pytest.raises(BrokenPlugin, match=reason) as caught:
        collect(SCHEMES, "SCHEME")
    assert f"plugin {module} ({SCHEMES})" in caught.value.message
    assert caught.value.hint == f"update or uninstall {module}."
