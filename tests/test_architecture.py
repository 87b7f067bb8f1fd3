"""The rules of the house that a machine can check: imports, devices, lengths, prose and names."""

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from io import StringIO
from pathlib import Path
from statistics import median, quantiles
from tokenize import (
    COMMENT,
    DEDENT,
    ENDMARKER,
    INDENT,
    NEWLINE,
    NL,
    TokenInfo,
    generate_tokens,
)

import pytest

REPOSITORY = Path(__file__).parents[1]
SOURCE = REPOSITORY / "src/mezzotint"
MEDIAN_FUNCTION, P90_FUNCTION, LONGEST_FUNCTION = 8, 25, 60
MEDIAN_FILE = 100
COMMENTS_PER_100_LINES = 3
LONGEST_SENTENCE = 35
HISTORY = (
    "CHANGELOG.md",
    "docs/decisions",
    "tests/test_architecture.py",
    "src/mezzotint/data/prompts",  # prompts are English: "an oil painting"
)
OLD_NAMES = (
    "paint", "painting", "painted", "paints", "Painting", "picture", "pictures", "UnsoundPicture",
    "rounding_input", "unrounded_inputs", "unrounded", "exact_attention", "Unfinished",
    "Tail", "Ahead", "Refined", "Announced", "Remembered", "refusals", "branches.py",
    "settling", "bytes_of", "sides.py", "notes.py", "Spelling", "decisive",
    "fp8_product", "ROUNDED_INPUTS", "meta_model", "quantize_input", "static_input",
)  # fmt: skip
ROOMS = (
    "errors _import_hook _version",
    "hub costs",
    "untrusted",
    "discover",
    "schemes",
    "tensor",
    "layouts families",
    "containers",
    "formats kernels",
    "nn",
    "saving",
    "builtin inspection fast",
    "checkpoint",
    "loading",
    "integrations",
    "generation",
    "quality conversion bench",
    "verification demo",
    "__init__",
    "cli",
    "__main__",
)
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms.split()}
MODULES = sorted(SOURCE.rglob("*.py"))
FILES: dict[str, list[Path]] = {}
for module in MODULES:
    FILES.setdefault(module.relative_to(SOURCE).parts[0].removesuffix(".py"), []).append(module)
"""{room: its files}"""
each_room = pytest.mark.parametrize("room", FILES)


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@cache
def nodes(file: Path) -> tuple[ast.AST, ...]:
    """Return all nodes of a file's code."""
    return tuple(ast.walk(ast.parse(file.read_text())))


def imported(file: Path) -> list[str]:
    """Every module that the code imports at run time, function bodies included."""
    found = []
    for node in nodes(file):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [alias.name for alias in node.names]
            found += (
                [f"mezzotint.{n}" for n in names] if node.module == "mezzotint" else [node.module]
            )
    return found


@each_room
def test_imports_point_left(room: str) -> None:
    for file in FILES[room]:
        place = file.relative_to(SOURCE)
        if place.parts == ("__init__.py",):
            continue  # the public API re-exports from every room, lazily
        for module in imported(file):
            if module.startswith("mezzotint"):
                other = room_of(module)
                assert other == room or RANK[other] < RANK[room], f"{place} imports {module}"


@each_room
def test_devices_are_arguments(room: str) -> None:
    for file in FILES[room]:
        if {"kernels", "bench", "runtime"} & set(file.parts) or file.name == "costs.py":
            continue
        for node in nodes(file):
            if isinstance(node, ast.Attribute):
                assert node.attr != "cuda", f"{file.name}:{node.lineno} reaches for CUDA by itself"


@each_room
def test_nothing_unpickles_or_swallows(room: str) -> None:
    for file in FILES[room]:
        for node in nodes(file):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else "everything"
                assert caught not in {"everything", "Exception", "BaseException"}, (
                    f"{file}:{node.lineno}"
                )
            if isinstance(node, ast.Call):
                check_call(file, node)


def check_call(file: Path, call: ast.Call) -> None:
    """Check that a call neither unpickles nor evaluates."""
    where, called = f"{file}:{call.lineno}", ast.unparse(call.func)
    assert called not in {"pickle.load", "pickle.loads", "eval", "exec"}, where
    if called == "torch.load":  # of an installed package's tensors, never of a user's file
        assert "weights_only=True" in map(ast.unparse, call.keywords), where
        assert file.name == "st_lpips.py", where


def code_imports(file: Path) -> set[str]:
    """Return the modules of this package that a file imports at module level."""
    tree = ast.parse(file.read_text())
    top = ast.Module([node for node in tree.body if not is_type_checking(node)], [])
    for node in top.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            node.body = [n for n in node.body if isinstance(n, ast.Import | ast.ImportFrom)]
            if not isinstance(node, ast.ClassDef):
                node.body = []
    found = set()
    for node in ast.walk(top):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from package import module` imports the module; any other name is the package's own.
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= members if members <= MODULE_FILES.keys() else {node.module, *members}
    return found & MODULE_FILES.keys()


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def module_name(file: Path) -> str:
    parts = ("mezzotint", *file.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULE_FILES = {module_name(file): file for file in MODULES}


def test_no_import_cycle_at_module_level() -> None:
    graph = {name: code_imports(file) - {name} for name, file in MODULE_FILES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def function_lengths() -> dict[str, int]:
    """Return {function: lines from `def` to its end, without decorators and docstring}."""
    lengths = {}
    for name, file in MODULE_FILES.items():
        for node in nodes(file):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lengths[f"{name}:{node.lineno} {node.name}"] = length_of(node)
    return lengths


def length_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first, lines = node.body[0], (node.end_lineno or 0) - node.lineno + 1
    if ast.get_docstring(node) is not None:
        lines -= (first.end_lineno or 0) - first.lineno + 1
    return lines


def test_functions_are_short() -> None:
    lengths = function_lengths()
    assert median(lengths.values()) <= MEDIAN_FUNCTION
    assert quantiles(lengths.values(), n=10)[8] <= P90_FUNCTION
    assert not [name for name, lines in lengths.items() if lines > LONGEST_FUNCTION]


def test_files_are_short() -> None:
    lengths = [len(file.read_text().splitlines()) for file in MODULES]
    assert median(lengths) <= MEDIAN_FILE


@pytest.mark.parametrize("room", ["kernels", "fast", "layouts"])
def test_comments_explain_kernels_passes_and_layouts(room: str) -> None:
    comments = code = 0
    for file in (SOURCE / room).rglob("*.py"):
        tokens = list(generate_tokens(StringIO(file.read_text()).readline))
        comments += sum(1 for t in tokens if t.type == COMMENT and not is_directive(t.string))
        code += len(code_lines(tokens) - docstring_lines(file))
    assert 100 * comments / code >= COMMENTS_PER_100_LINES, f"{comments} for {code} lines"


def is_directive(comment: str) -> bool:
    return any(word in comment for word in ("noqa", "type:", "fmt:"))


def code_lines(tokens: list[TokenInfo]) -> set[int]:
    layout = {COMMENT, NL, NEWLINE, INDENT, DEDENT, ENDMARKER}
    return {
        line
        for token in tokens
        if token.type not in layout
        for line in range(token.start[0], token.end[0] + 1)
    }


def docstring_lines(file: Path) -> set[int]:
    """Return the lines of strings that are statements: docstrings, also those of constants."""
    return {
        line
        for node in nodes(file)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, (node.end_lineno or 0) + 1)
    }


def docstrings(file: Path) -> Iterator[str]:
    """Yield docstrings, those of constants included, and the help texts of options."""
    for node in nodes(file):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                yield node.value.value
        elif isinstance(node, ast.keyword) and node.arg == "help":
            yield ast.unparse(node.value).strip("'\"")


def long_sentences(text: str) -> list[str]:
    """Return the sentences over the limit; lines of tables and code are no sentences."""
    prose = re.sub(r"```.*?```", "\n\n", text, flags=re.DOTALL)
    kept = [
        "" if is_table_line(line) or line.lstrip().startswith(("#", "-", "*", "|", ">>>")) else line
        for line in prose.splitlines()
    ]
    paragraphs = re.split(r"\n\s*\n", "\n".join(kept))
    sentences = (s for p in paragraphs for s in re.split(r"(?<=[.!?:;])\s+", p))
    return [" ".join(s.split()) for s in sentences if len(s.split()) > LONGEST_SENTENCE]


def is_table_line(line: str) -> bool:
    """Return whether a line has columns, such as the arguments in a docstring."""
    return re.search(r"\S {2,}\S", line) is not None


@each_room
def test_sentences_in_docstrings_and_help_are_short(room: str) -> None:
    texts = [(file, text) for file in FILES[room] for text in docstrings(file)]
    found = [(file, sentence) for file, text in texts for sentence in long_sentences(text)]
    assert not found, found


def test_sentences_in_the_readme_are_short() -> None:
    assert not long_sentences((REPOSITORY / "README.md").read_text())


@pytest.mark.parametrize("name", OLD_NAMES)
def test_old_names_are_gone(name: str) -> None:
    """The words of the second edition's rename table; not in history or prompts."""
    result = subprocess.run(
        ["git", "grep", "-nwI", name, "--", ".", *(f":!{path}" for path in HISTORY)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not result.stdout, result.stdout[:2000]
