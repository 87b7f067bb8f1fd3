"""Train the built-in demo model: a FLUX small enough to ship that generates captioned shapes.

    python -m demo_model.train                       # under ten minutes on one H100
    python -m demo_model.train --device cpu --steps 2 --batch 4 --out /tmp/demo       # a smoke test

Everything starts from random weights and procedural images (shapes.py), in two stages:

1. The autoencoder (AutoencoderTiny). Its encoder is linear, and computed instead of trained:
   space-to-depth by 4, then the 12 leading principal components of the 48 values of a cell. Its
   decoder learns to invert that from slightly noisy latents, so that it tolerates small errors of
   the transformer.
2. The transformer (FluxTransformer2DModel) with its CLIP and T5 text encoders, by flow matching.
   In the second part of the training, an exponential moving average of the model teaches the
   guidance embedding: the target becomes v + (g - 1) (v_caption - v_empty), as in the distillation
   of FLUX.1-dev.

The averaged weights are saved in BF16 as a FluxPipeline, loaded back, and scored on captions that
were not used in training.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from demo_model import shapes

ROOT = Path(__file__).resolve().parent.parent
TEXT_LENGTH = 16  # tokens, for both text encoders
TEXT_WIDTH = 64
SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "unk_token": "<unk>", "eos_token": "<eos>"}
GUIDANCE = 3.5  # of the final check
MAX_GUIDANCE = 5.0
CAPTION_DROPOUT = 0.1
AVERAGE_DECAY = 0.999
LATENT_SCALE = 2.5  # the decoder squashes what goes beyond 3, so it gets latents this much smaller
POOL = 2**18  # images rendered before the transformer's training
CHECK_PROMPTS, CHECK_STEPS, CHECK_BATCH = 200, 20, 50


# --------------------------------------------------------------------------------------------- text


def vocabulary() -> dict[str, int]:
    """Return {token: id}: the special tokens, then all words of the captions."""
    # <eos> is 3, because CLIP has a legacy code path for an <eos> of 2.
    words = sorted({word for caption in shapes.all_captions() for word in caption.split()})
    return {token: index for index, token in enumerate([*SPECIAL.values(), *words])}


def build_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word; `template` says where the special tokens go."""
    words = vocabulary()
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))  # noqa: S106
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, words[token]) for token in ("<bos>", "<eos>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=TEXT_LENGTH, padding_side="right", **SPECIAL
    )


def token_ids(
    tokenizer: PreTrainedTokenizerFast, captions: list[str], device: torch.device
) -> Tensor:
    """Padded token ids [len(captions), TEXT_LENGTH]."""
    encoded = tokenizer(captions, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")
    return encoded.input_ids.to(device)


# ------------------------------------------------------------------------------------------ modules


class DemoModel(nn.Module):
    """The trained parts of the pipeline: the transformer and its two text encoders."""

    def __init__(self) -> None:
        super().__init__()
        words = vocabulary()
        special = {
            f"{name}_id": words[SPECIAL[name]] for name in ("pad_token", "bos_token", "eos_token")
        }
        self.clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words),
                hidden_size=TEXT_WIDTH,
                intermediate_size=2 * TEXT_WIDTH,
                projection_dim=TEXT_WIDTH,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=TEXT_LENGTH,
                **special,
            )
        )
        del special["bos_token_id"]
        self.t5 = T5EncoderModel(
            T5Config(
                vocab_size=len(words),
                d_model=TEXT_WIDTH,
                d_kv=TEXT_WIDTH // 2,
                d_ff=2 * TEXT_WIDTH,
                num_layers=2,
                num_heads=2,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
                is_encoder_decoder=False,
                use_cache=False,
                **special,
            )
        )
        self.transformer = FluxTransformer2DModel(
            in_channels=48,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=128,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(16, 56, 56),
        )
        for name, parameter in self.transformer.named_parameters():
            modulation = "norm" in name and ".linear." in name
            if modulation or name.startswith("proj_out."):
                nn.init.zeros_(parameter)  # every block starts as the identity, the model as zero

    def forward(
        self, x: Tensor, time: Tensor, guidance: Tensor, clip_ids: Tensor, t5_ids: Tensor
    ) -> Tensor:
        """Return the velocity [B, 64, 48].

        x          noisy latents [B, 64, 48]
        time       [B], in 0..1
        guidance   [B]
        """
        side = shapes.IMAGE_SIZE // 8
        rows = torch.arange(side, device=x.device, dtype=x.dtype)
        places = torch.stack(
            torch.meshgrid(torch.zeros(1, device=x.device), rows, rows, indexing="ij"), -1
        )
        return self.transformer(
            hidden_states=x,
            timestep=time,
            guidance=guidance,
            encoder_hidden_states=self.t5(t5_ids)[0],
            pooled_projections=self.clip(clip_ids).pooler_output,
            txt_ids=x.new_zeros(TEXT_LENGTH, 3),
            img_ids=places.reshape(-1, 3),
            return_dict=False,
        )[0]


def build_autoencoder() -> AutoencoderTiny:
    """Return an autoencoder from images 3 x 4H x 4W to latents 12 x H x W, with random weights."""
    return AutoencoderTiny(
        encoder_block_out_channels=(48, 48, 48),
        num_encoder_blocks=(0, 0, 0),
        decoder_block_out_channels=(48, 48, 48),
        num_decoder_blocks=(2, 2, 1),
        latent_channels=12,
        scaling_factor=LATENT_SCALE,
    )


@torch.no_grad()
def set_encoder(vae: AutoencoderTiny, images: Tensor) -> float:
    """Set the encoder to space-to-depth and principal components.

    The components are divided by the fourth root of their variance. This is a compromise between no
    scaling, which would give edges little weight, and whitening, which would give them too much.
    The mean variance becomes 1 / LATENT_SCALE ** 2.

    images    [B, 3, H, W], in -1..1
    Returns   the share of variance that the components keep
    """
    for parameter in vae.encoder.parameters():
        parameter.zero_()
    first, second, third, last = (layer.weight for layer in vae.encoder.layers)
    for channel in range(3):
        first[channel, channel, 1, 1] = 1
    for layer, channels in (
        (second, 3),
        (third, 12),
    ):  # kernel 3, stride 2: taps 1 and 2 tile the image
        for output in range(4 * channels):
            layer[
                output, output % channels, 1 + output // channels // 2, 1 + output // channels % 2
            ] = 1
    cells = vae.encoder.layers[:-1](images.add(1).div(2)).movedim(1, -1).flatten(0, 2)
    mean = cells.mean(0)
    variance, components = torch.linalg.eigh((cells - mean).T.cov().double())  # ascending
    kept = variance[-12:].flip(0)
    scale = kept.pow(-0.25) / kept.sqrt().mean().sqrt() / LATENT_SCALE
    projection = (components[:, -12:].flip(1) * scale).T.float()
    last[:, :, 1, 1] = projection
    vae.encoder.layers[-1].bias.copy_(-projection @ mean)
    return float(kept.sum() / variance.sum())


# --------------------------------------------------------------------------------------------- data


def random_images(scenes: shapes.SceneBatch, index: Tensor) -> Tensor:
    """Images [N, 3, 64, 64] in -1..1 of the scenes at `index` [N], each at a random place."""
    offset = torch.empty(len(index), 2, device=index.device).uniform_(-shapes.JITTER, shapes.JITTER)
    return shapes.rasterize(scenes.pick(index), offset) * 2 - 1


def pack(latents: Tensor) -> Tensor:
    """Latents [B, 12, H, W] as the transformer's tokens [B, H/2 * W/2, 48]."""
    return FluxPipeline._pack_latents(latents, *latents.shape)


@torch.no_grad()
def render_pool(
    vae: AutoencoderTiny, scenes: shapes.SceneBatch, count: int
) -> tuple[Tensor, Tensor]:
    """`count` random images as (index of their scene [count], latent tokens [count, 64, 48])."""
    device = scenes.shape.device
    index = torch.arange(count, device=device) % len(scenes.shape)
    chunks = [pack(vae.encode(random_images(scenes, part)).latents) for part in index.split(2048)]
    return index, torch.cat(chunks) * LATENT_SCALE


# ----------------------------------------------------------------------------------------- training


@dataclass
class Plan:
    """The length of a stage: `steps` steps, or fewer if `minutes` pass first."""

    steps: int
    minutes: float

    def progress(self) -> Iterator[tuple[int, float]]:
        """Yields (step, progress); progress runs from 0 to 1 and sets the learning rate."""
        start = time.monotonic()
        for step in range(self.steps):
            done = max(step / self.steps, (time.monotonic() - start) / (60 * self.minutes))
            if done >= 1:
                return
            yield step, done


def learning_rate(peak: float, step: int, progress: float, warm_up: int = 500) -> float:
    """Linear warm-up over the first steps, then half a cosine down to a hundredth."""
    cosine = 0.505 + 0.495 * math.cos(math.pi * progress)
    return peak * cosine * min(1.0, (step + 1) / warm_up)


def build_optimizer(module: nn.Module, weight_decay: float) -> tuple[torch.optim.AdamW, Tensor]:
    """Return AdamW, with weight decay for matrices only, and its learning rate as a tensor."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    rate = torch.zeros((), device=parameters[0].device)
    optimizer = torch.optim.AdamW(
        groups, lr=rate, betas=(0.9, 0.98), fused=True, capturable=rate.is_cuda
    )
    return optimizer, rate


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step of `optimizer` along the clipped gradient of `loss`."""
    loss.backward()
    for group in optimizer.param_groups:
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def recorded(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """`step` as a CUDA graph after three calls of it, since its launches take longer than its work.

    On a CPU, `step` itself.
    """
    if device.type != "cuda":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


def train_decoder(vae: AutoencoderTiny, scenes: shapes.SceneBatch, plan: Plan, batch: int) -> float:
    """Train the decoder to undo the encoder; returns the last mean absolute error, in 0..1."""
    device = scenes.shape.device
    vae.encoder.requires_grad_(False)
    decoder = vae.decoder.to(memory_format=torch.channels_last)
    optimizer, rate = build_optimizer(decoder, weight_decay=0.0)
    error = torch.zeros((), device=device)

    def train_step() -> None:
        images = random_images(scenes, torch.randint(len(scenes.shape), (batch,), device=device))
        latents = vae.encode(images).latents
        noise = torch.randn_like(latents) * torch.rand(batch, 1, 1, 1, device=device)
        latents = latents + noise * 0.15 / LATENT_SCALE
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            output = decoder(latents.contiguous(memory_format=torch.channels_last))
        loss = (output.float() - images).abs().mean() / 2
        descend(optimizer, loss)
        error.copy_(loss.detach())

    run = recorded(train_step, device)
    for step, progress in plan.progress():
        rate.fill_(learning_rate(2e-3, step, progress))
        run()
        if step % 500 == 0:
            print(f"decoder step {step:6d} ({progress:4.0%})  error {error.item():.4f}", flush=True)
    return error.item()


@dataclass
class Captions:
    """The training captions as token ids, with the empty caption as the last row."""

    clip: Tensor  # [N + 1, TEXT_LENGTH]
    t5: Tensor  # [N + 1, TEXT_LENGTH]

    def pick(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The ids of the captions at `index` [B] for either text encoder."""
        return self.clip[index], self.t5[index]


def sample_times(count: int, device: torch.device) -> Tensor:
    """Times [count] of 0..1, half of them uniform and half logit-normal (more in the middle)."""
    uniform, normal = torch.rand(count, device=device), torch.randn(count, device=device).sigmoid()
    return torch.where(torch.rand(count, device=device) < 0.5, uniform, normal)


@torch.no_grad()
def guidance_direction(
    teacher: DemoModel, x: Tensor, time: Tensor, captions: Captions, index: Tensor
) -> Tensor:
    """v_caption - v_empty [B, 64, 48] of the unguided `teacher`."""
    index = torch.cat([index, torch.full_like(index, len(captions.clip) - 1)])
    one = torch.ones_like(index, dtype=x.dtype)
    with_caption, without = teacher(
        x.repeat(2, 1, 1), time.repeat(2), one, *captions.pick(index)
    ).chunk(2)
    return (with_caption - without).float()


class ModelTraining:
    """The state of the second stage and its training step."""

    def __init__(
        self, model: DemoModel, captions: Captions, pool: tuple[Tensor, Tensor], batch: int
    ) -> None:
        self.model, self.average = model, copy.deepcopy(model).requires_grad_(False)
        self.captions, self.batch = captions, batch
        self.scene, self.latents = pool
        self.optimizer, self.rate = build_optimizer(model, weight_decay=0.03)
        self.total_loss = torch.zeros_like(self.rate)
        if self.rate.is_cuda:
            self.model.transformer.compile()
            self.average.transformer.compile()

    def step(self, guided: bool) -> None:
        """Flow matching on one random batch; if `guided`, the moving average teaches guidance."""
        batch, device = self.batch, self.rate.device
        index = torch.randint(len(self.scene), (batch,), device=device)
        clean = self.latents[index]
        noise, times = torch.randn_like(clean), sample_times(batch, device)
        x = torch.lerp(clean, noise, times[:, None, None])
        dropped = torch.rand(batch, device=device) < CAPTION_DROPOUT
        caption = torch.where(dropped, len(self.captions.clip) - 1, self.scene[index])
        plain = torch.rand(batch, device=device) < 0.2
        guidance = (
            torch.empty(batch, device=device).uniform_(1, MAX_GUIDANCE).masked_fill(plain, 1.0)
        )
        target = noise - clean
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            if guided:
                direction = guidance_direction(self.average, x, times, self.captions, caption)
                target += (guidance - 1)[:, None, None] * direction
            velocity = self.model(x, times, guidance, *self.captions.pick(caption))
        loss = (velocity.float() - target).square().mean()
        descend(self.optimizer, loss)
        weights = [weight.detach() for weight in self.model.parameters()]
        torch._foreach_lerp_(list(self.average.parameters()), weights, 1 - AVERAGE_DECAY)
        self.total_loss += loss.detach()


def train_model(training: ModelTraining, plan: Plan) -> tuple[int, float]:
    """Train, the second half with guidance; returns (steps done, last mean loss)."""
    runs: dict[bool, Callable[[], None]] = {}
    before, mean_loss = time.monotonic(), math.nan
    for step, progress in plan.progress():
        training.rate.fill_(learning_rate(1e-3, step, progress))
        guided = progress >= 0.5
        if guided not in runs:
            runs[guided] = recorded(functools.partial(training.step, guided), training.rate.device)
        runs[guided]()
        if (step + 1) % 500 == 0:
            mean_loss = training.total_loss.item() / 500
            training.total_loss.zero_()
            now = time.monotonic()
            speed, before = 500 / (now - before), now
            print(
                f"step {step + 1:6d} ({progress:4.0%})  loss {mean_loss:.4f}  {speed:.1f} steps/s",
                flush=True,
            )
    return step + 1, mean_loss


# ------------------------------------------------------------------------------------------- result


def save_pipeline(model: DemoModel, vae: AutoencoderTiny, out: Path) -> None:
    """Write the whole pipeline to `out`, in BF16."""
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae.to(torch.bfloat16),
        text_encoder=model.clip.to(torch.bfloat16),
        tokenizer=build_tokenizer("<bos> $A <eos>"),
        text_encoder_2=model.t5.to(torch.bfloat16),
        tokenizer_2=build_tokenizer("$A <eos>"),
        transformer=model.transformer.to(torch.bfloat16),
    ).save_pretrained(out)


def check(out: Path, prompts: list[str], device: torch.device) -> dict[str, float]:
    """Load the pipeline back, generate `prompts` and return the share of images that obey them."""
    pipe = FluxPipeline.from_pretrained(out, dtype=torch.bfloat16, local_files_only=True).to(device)
    pipe.set_progress_bar_config(disable=True)
    scores: list[shapes.Score] = []
    for first in range(0, len(prompts), CHECK_BATCH):
        some = prompts[first : first + CHECK_BATCH]
        images = pipe(
            some,
            height=shapes.IMAGE_SIZE,
            width=shapes.IMAGE_SIZE,
            num_inference_steps=CHECK_STEPS,
            guidance_scale=GUIDANCE,
            max_sequence_length=TEXT_LENGTH,
            generator=[torch.Generator().manual_seed(first + i) for i in range(len(some))],
        ).images
        scores += [shapes.score(image, prompt) for image, prompt in zip(images, some, strict=True)]

    def share(flags: list[bool]) -> float:
        return sum(flags) / len(flags)

    return {
        "shape": share([s["shape"] for s in scores]),
        "color": share([s["color"] for s in scores]),
        "background": share([s["background"] for s in scores]),
        "size": share([s["size"] for s in scores]),
        "shape+color+background": share(
            [s["shape"] and s["color"] and s["background"] for s in scores]
        ),
        "mean_iou": round(sum(s["iou"] for s in scores) / len(scores), 4),
    }


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the built-in demo model.")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "src/mezzotint_demo/pipeline", help="pipeline directory"
    )
    parser.add_argument("--device", default="cuda", help="torch device (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=40000, help="transformer steps (default: %(default)s)"
    )
    parser.add_argument(
        "--minutes", type=float, default=7.2, help="finish earlier after so many minutes of them"
    )
    parser.add_argument(
        "--batch", type=int, default=512, help="images per step (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of everything random (default: %(default)s)"
    )
    return parser.parse_args()


def main() -> None:
    """Train, save, check."""
    arguments = parse_arguments()
    start = time.monotonic()
    device = torch.device(arguments.device)
    torch.manual_seed(arguments.seed)
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward crashes with these shapes
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    train, held_out = shapes.split_captions()
    scenes = shapes.batch_scenes(train, device)

    vae = build_autoencoder().to(device)
    sample = random_images(scenes, torch.randint(len(train), (2048,), device=device))
    print(f"the encoder keeps {set_encoder(vae, sample):.2%} of the variance")
    decoder_error = train_decoder(
        vae,
        scenes,
        Plan(max(1, arguments.steps // 10), arguments.minutes / 10),
        min(256, arguments.batch),
    )

    pool = render_pool(vae, scenes, min(POOL, arguments.steps * arguments.batch))
    texts = [*train, ""]
    captions = Captions(
        token_ids(build_tokenizer("<bos> $A <eos>"), texts, device),
        token_ids(build_tokenizer("$A <eos>"), texts, device),
    )
    model = DemoModel().to(device)
    print(f"transformer parameters: {sum(p.numel() for p in model.transformer.parameters()):,}")
    training = ModelTraining(model, captions, pool, arguments.batch)
    steps, loss = train_model(training, Plan(arguments.steps, arguments.minutes))
    seconds = time.monotonic() - start

    save_pipeline(training.average, vae, arguments.out)
    scores = check(arguments.out, held_out[:CHECK_PROMPTS], device)
    record = {
        "seed": arguments.seed,
        "steps": steps,
        "batch": arguments.batch,
        "train_seconds": round(seconds, 1),
        "wall_seconds": round(time.monotonic() - start, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "decoder_error": round(decoder_error, 5),
        "final_loss": loss if math.isnan(loss) else round(loss, 5),
        "check": {"prompts": CHECK_PROMPTS, "steps": CHECK_STEPS, "guidance_scale": GUIDANCE},
        "scores": scores,
    }
    (arguments.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
