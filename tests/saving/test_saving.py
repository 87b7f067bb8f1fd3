"""Atomic outputs: killed runs, full disks, resuming, replacing, and how little memory they take."""

import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mezzotint
from fuzz import kill_convert
from mezzotint.errors import BadRequest, CannotWrite
from mezzotint.formats import read_header
from mezzotint.saving import (
    Entry,
    Group,
    Output,
    Shard,
    atomic_write,
    other_files,
    output,
    publishing,
    split_into_shards,
    write_output,
)
from mezzotint.saving.files import locked
from mezzotint.saving.stream import write_shard
from support import synthetic_checkpoints
from support.checkpoint_edits import WEIGHTS
from support.child_process import die, in_a_child, write_half
from support.digest import digest


def group(*entries: tuple[str, torch.Tensor]) -> Group:
    def blocks() -> Iterator[memoryview]:
        for _, tensor in entries:
            yield memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)

    return Group(tuple(Entry(key, t.dtype, tuple(t.shape)) for key, t in entries), blocks)


def ignore(_size: int) -> None:
    pass


def shards_of(number: int) -> list[Shard]:
    groups = [group((f"t{i}", torch.full((64,), float(i)))) for i in range(number)]
    return split_into_shards(groups, 256, "", "w", {"format": "pt"})


PLAN = "0123456789ab"


def planned(path: Path, number: int = 3) -> Output:
    """An output that takes everything but notes for its own."""

    def finish(folder: Path, records: object) -> None:
        (folder / "config.json").write_text("{}")

    def foreign(folder: Path) -> list[str]:
        return [name for name in other_files(folder, set()) if "note" in name]

    return Output(path, PLAN, shards_of(number), finish, find_foreign=foreign)


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_a_streamed_file_is_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "scalar": torch.tensor(0.5),
        "codes": torch.arange(5, dtype=torch.uint8),
        "half": torch.randn(3, 3).bfloat16(),
        "fp8": torch.randn(2, 2).to(torch.float8_e4m3fn),
        "long": torch.arange(4),
    }
    (shard,) = split_into_shards(
        [group(*tensors.items()), group(("last", torch.ones(2)))], None, "", "a", {"format": "pt"}
    )
    record = write_shard(tmp_path / shard.name, shard, ignore)
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys() | {"last"}
    assert all(torch.equal(read[key].float(), tensor.float()) for key, tensor in tensors.items())
    assert record.size == shard.nbytes == (tmp_path / "a.safetensors").stat().st_size


def test_every_tensor_starts_at_a_multiple_of_its_item_size() -> None:
    odd = [
        group((f"{i}.a", torch.ones(i, dtype=torch.uint8)), (f"{i}.b", torch.ones(1)))
        for i in range(1, 6)
    ]
    (shard,) = split_into_shards([*odd, group(("x", torch.arange(2)))], None, "", "a", {})
    header = json.loads(shard.header()[8:])
    assert len(header) == 11
    for i in range(1, 6):
        assert header[f"{i}.b"]["data_offsets"][0] % 4 == 0
    assert header["x"]["data_offsets"][0] % 8 == 0


def test_a_group_that_gives_too_few_bytes_is_an_error(tmp_path: Path) -> None:
    short = Group((Entry("a", torch.uint8, (4,)),), lambda: iter([memoryview(b"123")]))
    with pytest.raises(CannotWrite, match="a yielded 3 bytes, expected 4"):
        write_shard(tmp_path / "a", Shard("a", (short,)), ignore)


def test_a_failure_leaves_the_old_output_and_the_next_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "out"
    write_output(planned(path, 1), False, ignore)
    before = digest(path)
    count = 0

    def fail_in_the_second_shard(_size: int) -> None:
        nonlocal count
        count += 1
        if count == 4:
            raise OSError(28, "No space left on device")

    with pytest.raises(CannotWrite, match="No space left on device") as caught:
        write_output(planned(path), True, fail_in_the_second_shard)
    assert "free some space" in caught.value.hint
    assert digest(path) == before
    assert write_output(planned(path), True, ignore) == ["w-00001-of-00003.safetensors"]
    assert sorted(f.name for f in path.iterdir()) == [
        "config.json",
        *(f"w-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
    ]
    assert hidden(tmp_path) == []


def test_a_finished_shard_whose_bytes_have_changed_is_written_again(tmp_path: Path) -> None:
    plan = planned(tmp_path / "out")
    plan.partial.mkdir()
    lines = []
    for shard in plan.shards[:2]:
        record = write_shard(plan.partial / shard.name, shard, ignore)
        lines.append(
            json.dumps({"shard": shard.name, "size": record.size, "sha256": record.sha256})
        )
    plan.journal.write_text("\n".join(lines) + '\n{"shard": "w-0000')
    damaged = plan.partial / plan.shards[0].name
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    (plan.partial / "stale.safetensors.index.json").write_text("{}")
    assert write_output(plan, False, ignore) == [plan.shards[1].name]
    write_output(planned(tmp_path / "fresh"), False, ignore)
    assert digest(tmp_path / "out") == digest(tmp_path / "fresh")


def test_leftovers_of_another_plan_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".out.partial-ffffffffffff").mkdir()
    (tmp_path / ".out.partial-ffffffffffff/a").write_text("x")
    (tmp_path / ".out.partial-ffffffffffff.journal").write_text("x")
    others = [".out.partial-mine", ".output.partial-ffffffffffff"]
    for name in others:
        (tmp_path / name).mkdir()
    write_output(planned(tmp_path / "out"), False, ignore)
    assert hidden(tmp_path) == others


def test_two_runs_do_not_write_one_output(tmp_path: Path) -> None:
    plan = planned(tmp_path / "out")
    plan.partial.mkdir()
    with (
        locked(plan.partial),
        pytest.raises(BadRequest, match="another run is writing this output"),
    ):
        write_output(plan, False, ignore)


def test_an_output_is_replaced_only_on_request(nvfp4: Path, tmp_path: Path) -> None:
    mezzotint.convert(nvfp4, tmp_path / "mz")
    with pytest.raises(BadRequest, match="already exists"):
        mezzotint.convert(nvfp4, tmp_path / "mz")
    (tmp_path / "mz" / f"{WEIGHTS}.index.json").write_text(
        '{"weight_map": {"a": "old.safetensors"}}'
    )
    mezzotint.convert(nvfp4, tmp_path / "mz", overwrite=True)
    assert not (tmp_path / "mz" / f"{WEIGHTS}.index.json").exists()
    with pytest.raises(BadRequest, match="is a folder, and the output is a file"):
        mezzotint.convert(
            nvfp4, (tmp_path / "mz").rename(tmp_path / "mz.safetensors"), to="comfy", overwrite=True
        )


def test_folders_change_places_where_the_system_cannot_exchange_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing.ctypes, "CDLL", lambda *_a, **_k: object())
    write_output(planned(tmp_path / "out", 1), False, ignore)
    write_output(planned(tmp_path / "out", 2), True, ignore)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2
    assert hidden(tmp_path) == []


def test_too_little_space_is_an_error_before_anything_is_written(
    nvfp4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(CannotWrite, match=r"[\d,]+ bytes are needed and 1,000 are free"):
        mezzotint.convert(nvfp4, tmp_path / "mz")
    assert not (tmp_path / "mz").exists()


def test_a_full_disk_is_a_clear_error_and_the_old_output_stays(nvfp4: Path, tmp_path: Path) -> None:
    mezzotint.convert(nvfp4, tmp_path / "mz")
    before = digest(tmp_path / "mz")

    def convert_without_space() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
        with pytest.raises(CannotWrite) as raised:
            mezzotint.convert(nvfp4, tmp_path / "mz", shard_bytes=600_000, overwrite=True)
        (tmp_path / "message").write_text(str(raised.value))
        die()

    in_a_child(convert_without_space)
    message = (tmp_path / "message").read_text()
    assert "could not be written: File too large" in message
    assert "nothing at the output has changed" in message
    assert digest(tmp_path / "mz") == before


def test_killed_conversions_leave_nothing_half_done(tmp_path: Path) -> None:
    """Six random moments; `tests/fuzz/kill_convert.py` tries fifty."""
    synthetic_checkpoints.write(tmp_path / "source", 1, 1, heads=2)
    found = kill_convert.measure(tmp_path / "source", tmp_path / "work", points=6, seed=0)
    assert found["killed"] == 6


@pytest.mark.parametrize(
    "to", ["mezzotint", *(pytest.param(to, marks=pytest.mark.slow) for to in ("comfy", "bf16"))]
)
def test_conversion_needs_twice_the_largest_tensor_and_100_mb_over_its_libraries(
    big: Path, tmp_path: Path, to: str
) -> None:
    """Memory of PyTorch and diffusers differs by version, so the same process measures it."""
    code = (
        "import sys; from pathlib import Path; import mezzotint, torch._dynamo\n"
        "from diffusers import FluxTransformer2DModel\n"
        "def peak():\n    status = Path('/proc/self/status').read_text().splitlines()\n"
        "    return int(next(line.split()[1] for line in status if 'VmHWM' in line))\n"
        "libraries = peak()\n"
        "mezzotint.convert(sys.argv[1], sys.argv[2], to=sys.argv[3])\n"
        "print(peak() - libraries)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, big, tmp_path / "out", to], capture_output=True, text=True
    )
    growth = 4 if to == "bf16" else 1
    largest = growth * max(info.nbytes for info in read_header(big).tensors.values())
    assert int(done.stdout) * 1024 <= 2 * largest + 100 * 10**6, done.stderr


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of some 300 MB whose largest tensor has 21 MB."""
    folder = tmp_path_factory.mktemp("big") / "source"
    synthetic_checkpoints.write(folder, 1, 2, heads=18)
    return folder


def replace_and_die(step: str, path: Path) -> None:
    """Replace an output without exchanging names, and die before a call such as "rename2"."""
    patch = pytest.MonkeyPatch()
    patch.setattr(publishing.ctypes, "CDLL", lambda *_a, **_k: object())
    owner = {"rename": Path, "rmtree": shutil}[step[:-1]]
    call, calls = getattr(owner, step[:-1]), count(1)
    patch.setattr(
        owner, step[:-1], lambda *a, **k: die() if next(calls) == int(step[-1]) else call(*a, **k)
    )
    write_output(planned(path, 2), True, ignore)


@pytest.mark.parametrize("step", ["rename1", "rename2", "rmtree1"])
@pytest.mark.parametrize("exchange", [True, False])
def test_a_kill_between_the_two_renames_is_repaired_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, exchange: bool
) -> None:
    path, number = tmp_path / "out", {"rename1": 1, "rename2": 1, "rmtree1": 2}[step]
    write_output(planned(path, 1), False, ignore)
    in_a_child(lambda: replace_and_die(step, path))
    assert path.exists() == (step != "rename2")
    with pytest.raises(BadRequest, match="already exists"):
        write_output(planned(path, 3), False, ignore)
    assert len(list(path.glob("*.safetensors"))) == number, "the old output, or the new one"
    if not exchange:
        monkeypatch.setattr(publishing.ctypes, "CDLL", lambda *_a, **_k: object())
    write_output(planned(path, 3), True, ignore)
    assert len(list(path.glob("*.safetensors"))) == 3
    assert hidden(tmp_path) == []


def test_a_folder_of_that_name_which_is_no_output_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aside = tmp_path / ".out.replaced"
    aside.mkdir()
    (aside / "note").write_text("mine")
    write_output(planned(tmp_path / "out"), False, ignore)
    write_output(planned(tmp_path / "out"), True, ignore)
    monkeypatch.setattr(publishing.ctypes, "CDLL", lambda *_a, **_k: object())
    with pytest.raises(BadRequest, match=r"\.out\.replaced: already exists"):
        write_output(planned(tmp_path / "out"), True, ignore)
    assert (aside / "note").read_text() == "mine"


def fail(*_arguments: object, **_options: object) -> None:
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize("exchange", [True, False])
def test_the_error_says_nothing_has_changed_only_if_true(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    path = tmp_path / "out"
    write_output(planned(path, 1), False, ignore)
    if not exchange:
        monkeypatch.setattr(publishing.ctypes, "CDLL", lambda *_a, **_k: object())
    with monkeypatch.context() as patch:
        patch.setattr(output.shutil, "rmtree", fail)
        with pytest.raises(CannotWrite) as caught:
            write_output(planned(path, 2), True, ignore)
    assert "is written and complete" in caught.value.message
    assert "nothing at the output" not in caught.value.hint
    assert len(list(path.glob("*.safetensors"))) == 2
    write_output(planned(path, 3), True, ignore)
    assert hidden(tmp_path) == []


def test_where_neither_rename_nor_the_way_back_succeeds_the_old_output_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rename = tmp_path / "out", Path.rename
    write_output(planned(path, 1), False, ignore)
    monkeypatch.setattr(publishing.ctypes, "CDLL", lambda *_a, **_k: object())
    with monkeypatch.context() as patch:
        patch.setattr(
            Path, "rename", lambda one, other: fail() if other == path else rename(one, other)
        )
        with pytest.raises(CannotWrite) as caught:
            write_output(planned(path, 2), True, ignore)
    assert f"the previous output is at {tmp_path / '.out.replaced'}" in caught.value.hint
    assert "nothing at the output has changed" not in caught.value.hint
    write_output(planned(path, 2), True, ignore)
    assert len(list(path.glob("*.safetensors"))) == 2
    assert hidden(tmp_path) == []


def test_a_temporary_file_of_a_killed_run_is_removed_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    in_a_child(lambda: write_half(path))
    others = [
        ".out.png.abcdefgh.png",
        ".out.png.partial-mine.png",
        ".other.png.partial-abcdefgh.png",
    ]
    for name in others:
        (tmp_path / name).write_text("mine")
    assert len(hidden(tmp_path)) == 4
    with atomic_write(path) as temporary:
        temporary.write_text("whole")
    assert hidden(tmp_path) == sorted(others)


def test_a_temporary_file_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a.png") as first, atomic_write(tmp_path / "a.png") as second:
        assert first != second
        first.write_text("one")
        second.write_text("two")
    assert (tmp_path / "a.png").read_text() == "one", "the outer block ends last"
    assert hidden(tmp_path) == []


FAULTS = {
    "fsync": (os, "fsync"),
    "write": (os, "write"),
    "rename": (Path, "rename"),
    "replace": (Path, "replace"),
    "mkdir": (Path, "mkdir"),
    "unlink": (Path, "unlink"),
    "flock": (fcntl, "flock"),
    "clone": (fcntl, "ioctl"),
    "copy": (shutil, "copyfile"),
    "remove": (shutil, "rmtree"),
}


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
def test_each_call_that_fails_leaves_the_old_output_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, exchange: bool
) -> None:
    """Fail at each call in turn: the message is true, and the next run completes the output."""
    if not exchange:
        monkeypatch.setattr(publishing.ctypes, "CDLL", lambda *_a, **_k: object())
    (tmp_path / "beside").write_text("beside")
    copies = {"vae/beside": tmp_path / "beside"}
    new = digest(write(replace(planned(tmp_path / "new", 2), copies=copies)))
    owner, name = FAULTS[fault]
    call = getattr(owner, name)
    for failing in count(1):
        path = tmp_path / str(failing) / "out"
        old = digest(write(planned(path, 1)))
        calls = count(1)
        with monkeypatch.context() as patch:
            patch.setattr(
                owner,
                name,
                lambda *a, calls=calls, n=failing, **k: (
                    fail() if next(calls) == n else call(*a, **k)
                ),
            )
            message = outcome(replace(planned(path, 2), copies=copies))
        assert digest(path) == (new if "is written" in message else old), message
        assert digest(write(replace(planned(path, 2), copies=copies))) == new
        assert hidden(path.parent) == []
        if next(calls) <= failing:
            return


def outcome(plan: Output) -> str:
    """Return the message of an attempt to write."""
    try:
        write(plan)
    except CannotWrite as error:
        return error.message
    return "is written"


def write(plan: Output) -> Path:
    write_output(plan, True, ignore)
    return plan.path
