"""Pipelines to merge a transformer into."""

import json
from pathlib import Path

LAYER = "transformer_blocks.0.attn.to_q"


def pipeline_around(component: Path, folder: Path, name: str = "transformer") -> Path:
    """Make a pipeline folder of FLUX.1 that has this component, moved there, and a scheduler."""
    (folder / "scheduler").mkdir(parents=True)
    absent = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer")
    index: dict[str, object] = {
        "_class_name": "FluxPipeline",
        **{one: [None, None] for one in absent},
    }
    index |= {name: ["diffusers", "FluxTransformer2DModel"]}
    index |= {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "scheduler/scheduler_config.json").write_text("{}")
    component.rename(folder / name)
    return folder
