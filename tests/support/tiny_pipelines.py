"""Pipelines of every family with random weights, which build, save and run in about a second."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

PAD, END, START, UNKNOWN = "<pad>", "</s>", "<s>", "<unk>"
SPECIAL = [PAD, UNKNOWN, START, END, "<|im_start|>", "<|im_end|>"]
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = len(SPECIAL) + 256
IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}


def tokenizer(length: int = 512, end: bool = False) -> Any:
    """One token for each byte; `end` appends the end of text, as T5 and CLIP do."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(
        models.BPE({w: i for i, w in enumerate(SPECIAL + letters)}, [], unk_token=UNKNOWN)
    )
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens(SPECIAL)
    if end:
        words.post_processor = processors.TemplateProcessing(
            single=f"$A {END}", special_tokens=[(END, 3)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        eos_token=END,
        bos_token=START,
        unk_token=UNKNOWN,
        model_max_length=length,
        chat_template=CHAT,
    )


def clip() -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=32,
        **IDS,
    )
    return transformers.CLIPTextModel(config)


def t5(model: str) -> Any:
    """A T5EncoderModel or UMT5EncoderModel."""
    config = getattr(transformers, model.replace("EncoderModel", "Config"))(
        vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, **IDS
    )
    return getattr(transformers, model)(config)


def decoder_config(layers: int) -> dict[str, Any]:
    """Return the common configuration of the language models: 16 wide, one head."""
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "head_dim": 16,
    }
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    return sizes | heads | {"vocab_size": VOCABULARY, "max_position_embeddings": 1024} | IDS


def mistral() -> Any:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    config = transformers.Mistral3Config(
        text_config={"model_type": "mistral"} | decoder_config(30),
        vision_config={"model_type": "pixtral", "head_dim": 16, "image_size": 28, "patch_size": 14}
        | vision,
    )
    return transformers.Mistral3ForConditionalGeneration(config)


def qwen_vl() -> Any:
    """In a text, each UNKNOWN is replaced by patches of the image."""
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    config = transformers.Qwen2_5_VLConfig(
        text_config=decoder_config(1) | {"rope_parameters": rope},
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 1,
            "out_hidden_size": 16,
        },
        image_token_id=1,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def image_vae(model: str, **changes: Any) -> Any:
    """An autoencoder of two levels: 2 pixels a latent, 4 channels."""
    return getattr(diffusers, model)(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        **changes,
    )


def video_vae(model: str = "AutoencoderKLWan", **changes: Any) -> Any:
    return getattr(diffusers, model)(
        **{"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1} | changes
    )


def flux1() -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=image_vae("AutoencoderKL", scaling_factor=0.36, shift_factor=0.12),
        text_encoder=clip(),
        tokenizer=tokenizer(77, end=True),
        text_encoder_2=t5("T5EncoderModel"),
        tokenizer_2=tokenizer(end=True),
        transformer=transformer,
    )


def flux1_kontext() -> Any:
    return diffusers.FluxKontextPipeline(**flux1().components)


def flux2_transformer(guidance: bool) -> Any:
    return diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=32,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=guidance,
    )


def flux2() -> Any:
    return diffusers.Flux2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=image_vae("AutoencoderKLFlux2"),
        text_encoder=mistral(),
        tokenizer=tokenizer(),
        transformer=flux2_transformer(guidance=True),
    )


def flux2_klein() -> Any:
    return diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=image_vae("AutoencoderKLFlux2"),
        text_encoder=transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**decoder_config(27))),
        tokenizer=tokenizer(),
        transformer=flux2_transformer(guidance=False),
        is_distilled=True,
    )


def wan_transformer(channels: int = 16, given: int = 0) -> Any:
    """`given` channels are those of the image that a video begins with, and of their mask."""
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=channels + given,
        out_channels=channels,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=1,
        rope_max_seq_len=32,
    )


def wan_scheduler(shift: float) -> Any:
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        num_train_timesteps=1000,
    )


def wan_a14b() -> Any:
    return diffusers.WanPipeline(
        tokenizer=tokenizer(end=True),
        text_encoder=t5("UMT5EncoderModel"),
        vae=video_vae(),
        scheduler=wan_scheduler(3.0),
        transformer=wan_transformer(),
        transformer_2=wan_transformer(),
        boundary_ratio=0.875,
    )


def wan_ti2v() -> Any:
    vae = video_vae(
        z_dim=48,
        latents_mean=[0.0] * 48,
        latents_std=[1.0] * 48,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    )
    return diffusers.WanPipeline(
        tokenizer=tokenizer(end=True),
        text_encoder=t5("UMT5EncoderModel"),
        vae=vae,
        scheduler=wan_scheduler(5.0),
        transformer=wan_transformer(48),
        expand_timesteps=True,
    )


def wan_i2v() -> Any:
    return diffusers.WanImageToVideoPipeline(
        tokenizer=tokenizer(end=True),
        text_encoder=t5("UMT5EncoderModel"),
        vae=video_vae(),
        scheduler=wan_scheduler(3.0),
        transformer=wan_transformer(given=20),
        transformer_2=wan_transformer(given=20),
        boundary_ratio=0.9,
    )


def zimage() -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=96,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=16,
        axes_dims=[8, 12, 12],
        axes_lens=[128, 32, 32],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token, std=0.02)
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae("AutoencoderKL", scaling_factor=0.36, shift_factor=0.12),
        text_encoder=transformers.Qwen3Model(transformers.Qwen3Config(**decoder_config(2))),
        tokenizer=tokenizer(),
        transformer=transformer,
    )


def qwenimage() -> Any:
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 12, 12),
    )
    return diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=video_vae("AutoencoderKLQwenImage"),
        text_encoder=qwen_vl(),
        tokenizer=tokenizer(1024),
        transformer=transformer,
    )


class QwenProcessor:
    """Stand-in for Qwen2VLProcessor, which needs torchvision: a text token per four patches."""

    def __init__(self) -> None:
        self.tokenizer, self.patches = tokenizer(4096), transformers.Qwen2VLImageProcessorPil()

    def __call__(self, text: list[str], images: Any, padding: bool, return_tensors: str) -> Any:
        pixels = self.patches(images, return_tensors=return_tensors)
        tokens = int(pixels["image_grid_thw"].prod()) // 4
        filled = [one.replace("<|image_pad|>", UNKNOWN * tokens) for one in text]
        return self.tokenizer(filled, padding=padding, return_tensors=return_tensors) | pixels


def qwenimage_edit(kind: str, pipe: Any) -> Any:
    """Return an edit pipeline of this class with the components of a text-to-image pipeline."""
    return getattr(diffusers, kind)(**pipe.components, processor=QwenProcessor())


PIPELINES: dict[str, Callable[[], Any]] = {
    build.__name__: build
    for build in (flux1, flux2, flux2_klein, wan_a14b, wan_ti2v, zimage, qwenimage)
}
EDITORS: dict[str, Callable[[], Any]] = {
    build.__name__: build for build in (flux1_kontext, wan_i2v)
}
"""Pipelines that were made to edit an image, or to begin with one."""


def save(name: str, folder: Path) -> Path:
    """Build the pipeline of this name from a fixed seed and save it in float32."""
    with torch.random.fork_rng():
        torch.manual_seed(20)
        (PIPELINES | EDITORS)[name]().save_pretrained(folder)
    return folder
