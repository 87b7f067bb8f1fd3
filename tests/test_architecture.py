"""The house rules that a machine can hold: imports point one way, and devices stay out of helpers."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src/mezzotint"
ROOMS = (
    "errors escaping discover _import_hook _version",
    "failures",
    "hub_errors",
    "hub_http",
    "hub costs guard editing turns sources step_schedule",
    "bounded_json config_limits",
    "schema",
    "schemes",
    "tensor",
    "layouts blank",
    "formats kernels",
    "nn",
    "families",
    "builtin inspection speed",
    "pipeline_index",
    "component_files sampling_file",
    "component_loading",
    "schedule checkpoint latent_grid prompt_length",
    "residency fusion",
    "loading model_state saving",
    "diffusers_quantizer pictures",
    "pipelines videos",
    "painting converting",
    "quality verifying bench",
    "demo",
    "__init__",
    "cli",
    "__main__",
)
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms.split()}
MODULES = sorted(SOURCE.rglob("*.py"))


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported(tree: ast.AST) -> list[str]:
    """Every module that the code imports at run time, function bodies included."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [alias.name for alias in node.names]
            found += [f"mezzotint.{n}" for n in names] if node.module == "mezzotint" else [node.module]
    return found


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_point_left(file: Path) -> None:
    place = file.relative_to(SOURCE)
    room = place.parts[0].removesuffix(".py")
    if place.parts == ("__init__.py",):
        return  # the public API re-exports from every room, lazily
    for module in imported(ast.parse(file.read_text())):
        if not module.startswith("mezzotint"):
            continue
        other = room_of(module)
        assert other == room or RANK[other] < RANK[room], f"{place} imports {module}"


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_devices_are_arguments(file: Path) -> None:
    if {"kernels", "bench"} & set(file.parts) or file.name == "costs.py":
        return
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute):
            assert node.attr != "cuda", f"{file.name}:{node.lineno} reaches for CUDA by itself"


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_nothing_unpickles_or_swallows(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert caught not in {"everything", "Exception", "BaseException"}, f"{file.name}:{node.lineno}"
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in {"pickle.load", "pickle.loads", "eval", "exec"}
            if ast.unparse(node.func) == "torch.load":  # of an installed package's tensors, never of a user's file
                assert "weights_only=True" in map(ast.unparse, node.keywords), f"{file.name}:{node.lineno}"
                assert file.name == "perceptual.py"
