"""Wrong arguments are refused without importing PyTorch, with a hint and the names of the API."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mezzotint.bench import PUBLISHED_MODELS, ROTATED
from mezzotint.bench import SCHEMES as BENCH_SCHEMES
from mezzotint.cli import checks, names
from mezzotint.errors import BadRequest, CannotWrite, did_you_mean, there_are
from mezzotint.fast.passes.attention import ATTENTION_BACKENDS
from mezzotint.formats import targets
from mezzotint.kernels import ACTIVATION_MODES, all_backends
from mezzotint.loading.residency import RESIDENCY_MODES
from mezzotint.quality.compare.gate import PROFILES
from mezzotint.quality.metrics.image import IMAGE_METRICS
from mezzotint.quality.prompts import SETS
from mezzotint.schemes import encoders, schemes
from support.cli_runner import run
from support.plugin_packages import install_plugin

WRONG = {
    "generate 'a cat' --transformer demo-nvfp": "did you mean demo-nvfp4?",
    "generate 'a cat' --model dem": "did you mean demo?",
    "generate 'a cat' --transformer ./nowhere": "./nowhere: no such file or folder",
    "generate 'a cat' --backend refrence": "did you mean reference?",
    "generate 'a cat' --backend nvpf4=humming": "did you mean nvfp4?",
    "generate 'a cat' --resident fb8": "did you mean fp8?",
    "generate 'a cat' --activations bf-16": "did you mean bf16?",
    "generate 'a cat' --fast --attention cudn": "did you mean cudnn?",
    "generate 'a cat' --attention cudnn": "--attention requires --fast",
    "generate 'a cat' --bf16-steps 2-1": "write FIRST+LAST",
    "generate 'a cat' --size 8": "--size is '8'",
    "generate 'a cat' --image nowhere.png": "no such image",
    "generate 'a cat' --device cuad": "did you mean cuda?",
    "generate 'a cat' -o /dev/null/a.png": "nothing can be written there",
    "generate 'a cat' --steps many": "--steps",
    "generate 'a cat' --stesp 4": "did you mean --steps?",
    "generat 'a cat'": "did you mean 'generate'?",
    "--versoin": "did you mean --version?",
    "compare demo demo-fp --output r": "did you mean demo-fp8?",
    "compare demo demo-fp8,bakend=expand -o r": "did you mean backend?",
    "compare demo demo-fp8,backend=dequant_fp -o r": "did you mean dequant_fp8?",
    "compare demo demo-fp8 -o r --metrics lpisp": "did you mean lpips?",
    "compare demo demo-fp8 -o r --gate stric": "did you mean strict?",
    "compare demo demo-fp8 -o r --prompts defalt": "did you mean default?",
    "diagnose demo demo-nvfp": "did you mean demo-nvfp4?",
    "diagnose demo demo-nvfp4 --size 1": "--size is '1'",
    "bench flux2-kleen": "did you mean flux2-klein-4b?",
    "bench flux1-dev --scheme nvpf4": "did you mean nvfp4?",
    "convert demo-nvfp4 -o out --to comfi": "did you mean comfy?",
    "verify demo-nvfp": "did you mean demo-nvfp4?",
    "inspect demo-nvfp": "did you mean demo-nvfp4?",
    "warmup demo --size 3x3": "--size is '3x3'",
    "demo -o /dev/null/a.png": "nothing can be written there",
}


def test_the_names_that_are_known_without_torch_are_those_that_there_are() -> None:
    assert names.ACTIVATIONS.built_in == ACTIVATION_MODES
    assert set(names.ATTENTIONS.built_in) == set(ATTENTION_BACKENDS)
    assert set(names.BACKENDS.built_in) == set(all_backends())
    assert set(names.BENCH_MODELS.built_in) == set(PUBLISHED_MODELS)
    assert set(names.BENCH_SCHEMES.built_in) == {"bf16", *BENCH_SCHEMES, *ROTATED}
    assert set(names.ENCODERS.built_in) == set(encoders())
    assert set(names.GATES) == set(PROFILES)
    assert set(names.METRICS.built_in) == {metric.name for metric in IMAGE_METRICS}
    assert set(names.PROMPT_SETS) == set(SETS)
    assert names.RESIDENCY_MODES.built_in == RESIDENCY_MODES
    assert set(names.SCHEMES.built_in) == set(schemes())
    assert set(names.TARGETS.built_in) == set(targets())
    for declared in (
        names.BACKENDS,
        names.BENCH_MODELS,
        names.BENCH_SCHEMES,
        names.ENCODERS,
        names.SCHEMES,
    ):
        assert set(declared.registry()) == set(declared.built_in)


@pytest.mark.parametrize(
    ("declared", "group", "attribute", "registry"),
    [
        (names.SCHEMES, "mezzotint.schemes", "SCHEME", schemes),
        (names.BACKENDS, "mezzotint.backends", "BACKEND", all_backends),
        (names.TARGETS, "mezzotint.writers", "TARGET", targets),
    ],
    ids=["scheme", "backend", "target"],
)
def test_name_of_a_plugin_is_accepted(
    declared: names.Names,
    group: str,
    attribute: str,
    registry: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    source = f"from types import SimpleNamespace\n{attribute} = SimpleNamespace(name='int2')\n"
    with pytest.raises(BadRequest, match=f"there is no {declared.kind} 'int2'"):
        declared.check("int2")
    install_plugin(tmp_path, monkeypatch, group, f"plugin_{attribute.lower()}:{attribute}", source)
    request.addfinalizer(registry.cache_clear)
    registry.cache_clear()
    declared.check("int2")
    with pytest.raises(BadRequest, match=f"there is no {declared.kind} 'int9'") as caught:
        declared.check("int9")
    assert caught.value.hint.startswith("did you mean int")


def test_help_version_and_wrong_arguments_import_no_torch(tmp_path: Path) -> None:
    """One process runs all commands, because starting one takes a second; each is checked."""
    lines = [
        "--help",
        "--version",
        *(f"{name} --help" for name in ("generate", "compare", "convert")),
        *WRONG,
    ]
    program = (
        "import json, shlex, sys\n"
        "from mezzotint.cli import main\n"
        "for line in json.load(sys.stdin):\n"
        "    sys.argv = ['mezzotint', *shlex.split(line)]\n"
        "    try: main()\n"
        "    except SystemExit as ended: code = ended.code or 0\n"
        "    heavy = {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "    end = {'line': line, 'code': code, 'heavy': sorted(heavy)}\n"
        "    print(json.dumps(end), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    ends = [json.loads(line) for line in done.stderr.splitlines() if line.startswith('{"line"')]
    assert [end["line"] for end in ends] == lines, done.stderr
    assert {end["line"] for end in ends if end["heavy"]} == set()
    assert {end["line"] for end in ends if end["code"] == 0} == set(lines) - set(WRONG)
    assert {end["code"] for end in ends} == {0, 2}


@pytest.mark.parametrize(("line", "said"), WRONG.items(), ids=WRONG)
def test_a_wrong_argument_is_one_message_that_helps(
    line: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    words = [word.strip("'") for word in line.replace("'a cat'", "'a_cat'").split()]
    done = run(*words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("error:") == 1
    assert "hint:" in done.stderr or "written" in said
    assert not list(tmp_path.iterdir())
    done = run(*words, "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "")
    error = json.loads(done.stdout)["error"]
    assert set(error) == {"type", "message", "hint"}
    if "--json" in error["message"]:  # `warmup` has no such option
        return
    assert said in f"{error['message']} {error['hint']}"


def test_version_is_the_packages() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, "mezzotint 0.1.0\n")


@pytest.mark.parametrize(
    "path", ["/dev/null/a.png", "/proc/a.png", "/proc/new/a.png", "a" * 300 + ".png"]
)
def test_an_output_that_cannot_be_written_is_found_before_anything_is_generated(path: str) -> None:
    with pytest.raises(CannotWrite, match="nothing can be written there"):
        checks.check_writable("-o", Path(path))


@pytest.mark.skipif(os.geteuid() == 0, reason="everything may be written by root")
def test_a_folder_without_permission_is_found_too(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CannotWrite, match="Permission denied"):
        checks.check_writable("-o", tmp_path / "new/a.png")


def test_looking_whether_an_output_can_be_written_leaves_nothing(tmp_path: Path) -> None:
    checks.check_writable("-o", tmp_path / "new/folder/a.png")
    assert not list(tmp_path.iterdir())
    with pytest.raises(CannotWrite, match="which is a folder"):
        checks.check_file("-o", tmp_path)


def test_only_a_name_that_is_like_another_is_asked_about() -> None:
    assert did_you_mean("NVFP", ("nvfp4", "fp8")) == "did you mean nvfp4? "
    assert did_you_mean("x", ("nvfp4", "fp8")) == ""
    assert there_are("x", ("a", "b")) == "there are: a, b."
