"""Let diffusers' own `from_pretrained` read a ModelOpt export, by Mezzotint's plan and Mezzotint's layers.

diffusers builds the model on the meta device, asks a quantizer to prepare it, then fills what is left. The quantizer
here reads the same headers as `mezzotint.load`, puts QuantLinears in, and takes the tensors it has read out of
diffusers' hands, because diffusers would cast float32 scales to the model's dtype.
"""

from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import NVIDIAModelOptConfig, QuantizationConfigMixin

from mezzotint.checkpoint import Checkpoint
from mezzotint.formats.header import header_of_files
from mezzotint.loading import LoadPlan, LoadReport, insert_linears, plan, report


class Method(str, Enum):
    """The name under which diffusers keeps this quantizer."""

    MEZZOTINT = "mezzotint"


class MezzotintConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """A `quantization_config` that stands for the tensors it lies beside; its own entries are kept as they came."""

    def __init__(self, **entries: Any) -> None:
        self.entries = entries
        self.quant_method = Method.MEZZOTINT

    def to_dict(self) -> dict[str, Any]:
        return dict(self.entries)

    to_diff_dict = to_dict


class ModelOptConfig:
    """Tells ModelOpt's exports from diffusers' own ModelOpt checkpoints, which diffusers reads by itself."""

    @classmethod
    def from_dict(cls, entries: dict[str, Any], **kwargs: Any) -> QuantizationConfigMixin:
        if "quant_algo" in entries and "quant_type" not in entries:
            return MezzotintConfig(**entries)
        return NVIDIAModelOptConfig.from_dict(entries, **kwargs)


class MezzotintQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Prepares a meta-device model for one checkpoint; lives for one `from_pretrained`."""

    use_keep_in_fp32_modules = True
    is_serializable = False
    is_trainable = False
    is_compileable = True
    supports_parallel_loading = False

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        self.dtype = torch_dtype or torch.bfloat16
        return self.dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        files = [Path(file) for file in checkpoint_files]
        self.checkpoint = Checkpoint.of(header_of_files(files[0].parent, files, files[0].parent))
        return [key for key in loaded_keys if key in self.checkpoint.plain]

    def _process_model_before_weight_loading(
        self, model: torch.nn.Module, device_map: dict[str, Any] | None = None, **_: Any
    ) -> None:
        self.plan: LoadPlan = plan(self.checkpoint, model)
        device = torch.device((device_map or {}).get("", "cpu"))
        self.blank = insert_linears(self.plan, model, device, self.dtype)

    def maybe_update_state_dict(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: value for key, value in state_dict.items() if key in self.checkpoint.plain}

    def update_missing_keys(self, model: torch.nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        return [key for key in missing_keys if key.rpartition(".")[0] not in self.checkpoint.linears]

    def _process_model_after_weight_loading(self, model: torch.nn.Module, **_: Any) -> torch.nn.Module:
        self.report: LoadReport = report(self.plan, model, self.blank)
        return model


def register(auto: ModuleType) -> None:
    """Add the quantizer to diffusers' tables; `auto` is diffusers.quantizers.auto."""
    auto.AUTO_QUANTIZER_MAPPING[Method.MEZZOTINT.value] = MezzotintQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[Method.MEZZOTINT.value] = MezzotintConfig
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["modelopt"] = ModelOptConfig
