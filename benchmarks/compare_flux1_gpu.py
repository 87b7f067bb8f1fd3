r"""Check the memory and times that `compare` reports, on FLUX.1 in full size with random weights.

    python benchmarks/compare_flux1_gpu.py /tmp/flux --out "$OUT"   # an 80 GB GPU, 40 GB of disk
    python benchmarks/compare_flux1_gpu.py /tmp/flux --out /tmp/out --device cpu \\
        --blocks 1 --single-blocks 1 --size 64                      # a smoke test

The script creates a pipeline of FLUX.1's transformer and autoencoder, with text encoders of one
layer each, and an FP8 copy of the transformer. Then `compare` runs, while another process queries
NVML 20 times a second for the memory in use on the whole GPU; the memory in use before the run is
subtracted. The last line is JSON: for each model the reported values, the measured values, and
their ratio.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]

from mezzotint.generation.generate import generate  # noqa: E402
from mezzotint.generation.pipeline import load, recommended_sampling  # noqa: E402
from mezzotint.quality.compare import compare  # noqa: E402
from mezzotint.quality.report import write_report  # noqa: E402
from support import tiny_pipelines as tiny  # noqa: E402
from support.modelopt_exporter import calibration, export  # noqa: E402
from support.synthetic_checkpoints import FLUX  # noqa: E402

POLL = """
import sys, time, pynvml
pynvml.nvmlInit()
handle = pynvml.nvmlDeviceGetHandleByIndex(0)
while True:
    print(time.time(), pynvml.nvmlDeviceGetMemoryInfo(handle).used, flush=True)
    time.sleep(0.05)
"""
PROMPTS = ("a cat on a table", "a red boat")


def text_encoders() -> dict[str, Any]:
    """Build text encoders of FLUX.1's widths, 768 and 4096, with one small layer each."""
    clip = transformers.CLIPTextConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=768,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=12,
        max_position_embeddings=77,
        **tiny.IDS,
    )
    t5 = transformers.T5Config(
        vocab_size=tiny.VOCABULARY,
        d_model=4096,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        **tiny.IDS,
    )
    return {
        "text_encoder": transformers.CLIPTextModel(clip),
        "tokenizer": tiny.tokenizer(77, end=True),
        "text_encoder_2": transformers.T5EncoderModel(t5),
        "tokenizer_2": tiny.tokenizer(end=True),
    }


def autoencoder() -> Any:
    """FLUX.1's own shape: 8 pixels a latent, 16 channels."""
    return diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def make(folder: Path, changes: dict[str, int], device: str, size: int) -> None:
    """Write the pipeline to folder/bf16 and an FP8 transformer, calibrated on two steps, to fp8."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        entries = {key: value for key, value in (FLUX | changes).items() if key != "_class_name"}
        transformer = diffusers.FluxTransformer2DModel(**entries).eval()
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder(),
        transformer=transformer,
        **text_encoders(),
    )
    torch.set_default_dtype(torch.float32)
    pipe.save_pretrained(folder / "bf16")
    pipe.to(device)
    with calibration(transformer) as largest:
        pipe(
            [PROMPTS[0]],
            num_inference_steps=2,
            height=size,
            width=size,
            max_sequence_length=64,
            output_type="latent",
        )
    blocks = {name: value for name, value in largest.items() if "transformer_blocks." in name}
    export(transformer.cpu(), blocks, "fp8", folder / "fp8")


def event_seconds(source: str | None, model: Path, size: int, steps: int, device: str) -> float:
    """Return the seconds of one warm image by CUDA events, independent of `compare`."""
    pipe = load(model, transformer=source, device=device)
    settings = recommended_sampling(model).replace(steps=steps, size=size)
    times = []
    for _ in range(4):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        generate(pipe, PROMPTS[:1], seeds=[0], sampling=settings, check_output=False)
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last) / 1000)
    return sorted(times[1:])[1]


def used_by_all() -> int:
    """Bytes of the first GPU in use, by whatever there is on the machine."""
    import pynvml

    pynvml.nvmlInit()
    return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=19)
    parser.add_argument("--single-blocks", type=int, default=38)
    parser.add_argument("--heads", type=int, default=24)
    a = parser.parse_args()
    gpu = a.device != "cpu"
    idle = used_by_all() if gpu else 0
    if not (a.folder / "fp8/config.json").exists():
        began = time.time()
        shape = {
            "num_layers": a.blocks,
            "num_single_layers": a.single_blocks,
            "num_attention_heads": a.heads,
        }
        make(a.folder, shape, a.device, min(a.size, 512))
        torch.accelerator.empty_cache() if gpu else None
        print(f"made in {time.time() - began:.0f} s", flush=True)
    (a.folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    done: list[tuple[float, str]] = []
    log = a.folder / "nvml.txt"
    poll = subprocess.Popen([sys.executable, "-c", POLL], stdout=log.open("w")) if gpu else None
    # Events are also recorded while NVML is polled, because polling slows kernel launches.
    try:
        comparison = compare(
            f"bf16={a.folder / 'bf16'}",
            [f"fp8={a.folder / 'fp8'}"],
            a.out,
            prompts=str(a.folder / "prompts.txt"),
            steps=a.steps,
            size={"size": a.size, "width": a.size},
            device=a.device,
            on_image=lambda _done, _total, name: done.append((time.time(), name)),
        )
        write_report(comparison, a.out)
        report = comparison.to_dict()
        used = (
            [(float(when), int(size)) for when, size in (line.split() for line in log.open())]
            if gpu
            else []
        )
        rows = {}
        for model in (report["reference"], *report["candidates"]):
            times = [when for when, name in done if name == model["name"]]
            while_running = (size for when, size in used if times[0] <= when <= times[-1])
            polled = max(while_running, default=idle) - idle
            source = None if model["transformer"] is None else str(a.folder / "fp8")
            events = (
                event_seconds(source, a.folder / "bf16", a.size, a.steps, a.device) if gpu else None
            )
            memory, seconds = (
                model["cost"]["memory"][1],
                model["cost"]["seconds_per_image"]["median"],
            )
            rows[model["name"]] = {
                "driver_reported": memory["driver"],
                "driver_source": memory["driver_source"],
                "nvml_polled_max": polled,
                "nvml_idle": idle,
                "memory_ratio": memory["driver"] / polled if polled else None,
                "peak_allocated": memory["peak_allocated"],
                "peak_reserved": memory["peak_reserved"],
                "seconds_reported": seconds,
                "seconds_by_events": events,
                "time_ratio": seconds / events if events else None,
                "resident": model["resident"],
            }
        rows["verdict"] = {
            candidate["name"]: candidate["reasons"] for candidate in report["candidates"]
        }
    finally:
        if poll is not None:
            poll.terminate()
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
