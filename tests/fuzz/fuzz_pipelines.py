"""Read pipelines with a mutated index or configuration.

An entry is replaced by a hostile value, renamed, removed or repeated, or the file's bytes are
truncated, doubled or changed. Each pipeline must be read, checked and planned, or rejected with a
specific error. Models are built in a share of the cases, because that takes most of the time: one
in `BUILD` builds the component with the mutated configuration, one in `LOAD` the whole pipeline.
"""

import copy
import json
import random
import resource
import shutil
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from fuzz.command import run_from_command_line
from mezzotint.errors import MezzotintError
from mezzotint.generation.component_files import check_component
from mezzotint.generation.component_loading import load_component
from mezzotint.generation.pipeline import load
from mezzotint.generation.pipeline_index import read_index
from mezzotint.generation.source import PipelineSource, index_sampling

SECONDS = 5.0
MEMORY = 500 * 2**20
BUILD, LOAD = 20, 2000
INDEX = "model_index.json"
NESTED: list[Any] = []
for _ in range(80):
    NESTED = [NESTED]
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        7,
        1000,
        2**31,
        2**63,
        -(2**70),
        10**40,
        0.5,
        -1.5,
        1e308,
        float("nan"),
    ),
    *(
        "",
        "x",
        "..",
        "../x",
        "/proc/self/environ",
        "a\x00b",
        "[/red]",
        "\x1b[31m",
        "utils",
        "nn.Linear",
        "x" * 5000,
    ),
    *(
        [],
        {},
        [1],
        ["x"],
        [None, None],
        [None, "x"],
        ["x", None],
        [1, 2],
        ["x", "y", "z"],
        NESTED,
        [[8, 8], [8, 8]],
    ),
    *(
        {"a": {"b": 1}},
        {"": None},
        ["diffusers", "utils"],
        ["diffusers", "FluxPipeline"],
        ["diffusers", "_"],
    ),
    *(
        ["transformers", "pipeline"],
        ["transformers", "AutoModel"],
        ["transformers", "__file__"],
        ["os", "system"],
    ),
    *(
        ["diffusers", "AutoencoderKL"],
        ["transformers", "CLIPTextModel"],
        ["diffusers_modules", "a"],
        "FluxPipeline",
    ),
)
KEYS = (
    *(
        "text_encoder",
        "vae",
        "scheduler",
        "transformer_2",
        "../x",
        "/proc/self",
        "a/b",
        "",
        ".",
        "\x00",
        "_class_name",
    ),
    *(
        "auto_map",
        "num_layers",
        "hidden_size",
        "vocab_size",
        "quantization_config",
        "model_type",
        "x" * 300,
    ),
)


def hostile(chance: random.Random) -> Any:
    """A value of its own, which the next change may change in turn."""
    return copy.deepcopy(chance.choice(VALUES))


def change(value: Any, chance: random.Random) -> Any:
    """Nested JSON with one entry changed."""
    if isinstance(value, dict | list) and value and chance.random() < 0.85:
        key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
        kind = chance.random()
        if kind < 0.6:
            value[key] = change(value[key], chance)
        elif kind < 0.75:
            del value[key]
        elif isinstance(value, dict):
            value[chance.choice(KEYS)] = value.pop(key) if kind < 0.9 else hostile(chance)
        else:
            value.insert(key, hostile(chance))
        return value
    if type(value) in (int, float) and chance.random() < 0.5:
        return value * chance.choice((-1, 0, 2, 1000, 10**6, 10**12))
    return hostile(chance)


def mutate(content: bytes, chance: random.Random) -> bytes:
    """The file with one to three entries changed, or with other bytes."""
    if chance.random() < 0.75:
        value = json.loads(content)
        for _ in range(chance.choice((1, 1, 2, 3))):
            value = change(value, chance)
        return json.dumps(value, ensure_ascii=chance.random() < 0.5).encode("utf-8", "replace")
    position, length = chance.randrange(len(content)), chance.choice((0, 1, 2, 10, 200))
    middle = (
        b"",
        bytes([chance.randrange(256)]),
        content[position : position + length] * 2,
        b"\xff\xfe",
        b"[" * 1000,
    )
    return content[:position] + chance.choice(middle) + content[position + length :]


def attempt(folder: Path, file: Path, chance: random.Random) -> None:
    """Read the pipeline as every command does, and build a component or all in some cases."""
    index = read_index(folder)
    index_sampling(index)
    component, build = index.components.get(file.parent.name), chance.randrange(BUILD) == 0
    if component is not None:
        check_component(component, weights=build)
    if build and (component is None or component.name.startswith("transformer")):
        source = PipelineSource.open(folder)
        source.check_source_image(has_source_image=False)
        source.plan()
    elif build and component is not None:
        load_component(component, torch.bfloat16)
    if chance.randrange(LOAD) == 0:
        load(folder, device="cpu")


def fuzz(sources: list[Path], folder: Path, number: int, seed: int) -> dict[str, Any]:
    """Try `number` changed files; raises AssertionError if one broke a promise."""
    chance = random.Random(seed)
    diffusers.utils.logging.set_verbosity(50)
    transformers.utils.logging.set_verbosity(50)
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    copies = [Path(shutil.copytree(source, folder / source.name)) for source in sources]
    counts: Counter[str] = Counter()
    broken: list[str] = []
    slowest, grown = 0.0, 0
    for pipeline in copies:  # once, so that imports are no part of what is measured
        read_index(pipeline)
        load(pipeline, device="cpu")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(number):
        pipeline = chance.choice(copies)
        use_index = chance.random() < 0.4
        file = pipeline / INDEX if use_index else chance.choice([*pipeline.glob("*/*config.json")])
        before = file.read_bytes()
        after = mutate(before, chance)
        file.write_bytes(after)
        started = time.process_time()
        try:
            attempt(pipeline, file, chance)
            counts["read"] += 1
        except MezzotintError as error:
            counts[type(error).__name__] += 1
        except BaseException as error:
            counts["not of ours"] += 1
            broken.append(f"{file}: {traceback.format_exc()[-1500:]}\n{after[:2000]!r}")
            if isinstance(error, KeyboardInterrupt):
                raise
        seconds = time.process_time() - started
        if seconds > SECONDS:
            broken.append(f"{file}: took {seconds:.1f} s of the CPU: {after[:2000]!r}")
        slowest = max(slowest, seconds)
        file.write_bytes(before)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
    assert not broken, f"{len(broken)} broke a promise:\n" + "\n\n".join(broken[:20])
    assert grown < MEMORY, f"memory grew by {grown:,} bytes"
    figures = {"files": number, "sources": len(sources), **counts}
    return figures | {"slowest_s": round(slowest, 3), "memory_grown_bytes": grown}


def main() -> None:
    warnings.simplefilter("ignore")
    run_from_command_line(__doc__, "mutated pipelines", fuzz, number=100_000)


if __name__ == "__main__":
    main()
