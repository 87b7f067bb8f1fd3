"""A diffusers quantizer, for `from_pretrained` and `save_pretrained` with quantized models.

diffusers builds the model on the meta device, lets a quantizer prepare it, then loads the remaining
tensors. The quantizer reads the same headers as `mezzotint.load` and inserts QuantLinears. It hides
the tensors that it has read from diffusers, which would cast float32 scales to the model's dtype.
A model of `mezzotint.load` gets a quantizer too, which diffusers uses to save or dequantize it.
"""

import importlib
import weakref
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import NVIDIAModelOptConfig, QuantizationConfigMixin

from mezzotint.checkpoint import Checkpoint
from mezzotint.errors import Unsupported
from mezzotint.formats.header import header_of_files
from mezzotint.integrations.model_state import (
    check_savable,
    dequantize,
    quantization_of,
    stored_tensors,
)
from mezzotint.loading import LoadPlan, LoadReport, Placement, plan, replace_linears, report
from mezzotint.nn import quant_linears


class Method(str, Enum):
    """The name of this quantizer in diffusers."""

    MEZZOTINT = "mezzotint"


class MezzotintConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """A `quantization_config` whose entries are kept unchanged.

    Only the stored tensors decide what is quantized.
    """

    def __init__(self, **entries: Any) -> None:
        self.entries = entries
        self.quant_method = Method.MEZZOTINT

    def to_dict(self) -> dict[str, Any]:
        return dict(self.entries)

    to_diff_dict = to_dict


class ModelOptConfig:
    """Routes ModelOpt's exports to Mezzotint; diffusers reads its own ModelOpt checkpoints."""

    @classmethod
    def from_dict(cls, entries: dict[str, Any], **kwargs: Any) -> QuantizationConfigMixin:
        if "quant_algo" in entries and "quant_type" not in entries:
            return MezzotintConfig(**entries)
        return NVIDIAModelOptConfig.from_dict(entries, **kwargs)


class ModelReference:
    """A weak reference from a quantizer to its model.

    A copy of the model has a copy of the quantizer, which refers to the copied model.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = weakref.ref(model)

    def __call__(self) -> Any:
        return self.model()

    def __reduce__(self) -> Any:
        return ModelReference, (self.model(),)


class MezzotintQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Prepares a meta-device model for one checkpoint, and saves and dequantizes it later."""

    use_keep_in_fp32_modules = True
    is_trainable = False
    is_compileable = True
    supports_parallel_loading = False

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        self.dtype = torch_dtype or torch.bfloat16
        return self.dtype

    def maybe_update_loaded_keys(
        self, loaded_keys: list[str], checkpoint_files: list[str]
    ) -> list[str]:
        files = [Path(file) for file in checkpoint_files]
        self.checkpoint = Checkpoint.of(header_of_files(files[0].parent, files, files[0].parent))
        return [key for key in loaded_keys if key in self.checkpoint.plain]

    def _process_model_before_weight_loading(
        self, model: torch.nn.Module, device_map: dict[str, Any] | None = None, **_: Any
    ) -> None:
        self.plan: LoadPlan = plan(self.checkpoint, model)
        device = torch.device((device_map or {}).get("", "cpu"))
        self.blank = replace_linears(self.plan, model, Placement(device), self.dtype)

    def maybe_update_state_dict(
        self, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        return {key: value for key, value in state_dict.items() if key in self.checkpoint.plain}

    def update_missing_keys(
        self, model: torch.nn.Module, missing_keys: list[str], prefix: str
    ) -> list[str]:
        inside = tuple(f"{name}." for name in self.checkpoint.linears)
        return [key for key in missing_keys if not key.startswith(inside)]

    def _process_model_after_weight_loading(
        self, model: torch.nn.Module, **_: Any
    ) -> torch.nn.Module:
        self.attach(model, report(self.plan, model, self.blank))
        return model

    def attach(self, model: Any, report: LoadReport) -> None:
        """Become the quantizer of a loaded model, and add its quantization to its configuration."""
        self.report, self.model = report, ModelReference(model)
        model.register_to_config(quantization_config=quantization_of(model))

    @property
    def is_serializable(self) -> bool:
        """True; diffusers reads this before it writes anything.

        Raises   Unsupported if a checkpoint could not represent the model
        """
        model = self.model()
        check_savable(model, self.report.path)
        model.register_to_config(quantization_config=quantization_of(model))
        return True

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, torch.Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        if not safe_serialization:
            raise Unsupported(
                "quantized weights can only be saved as safetensors",
                "omit safe_serialization=False.",
            )
        return stored_tensors(self.model(), state_dict), {}

    def _dequantize(self, model: Any) -> Any:
        dequantize(model)
        model._internal_dict = type(model.config)(
            {key: value for key, value in model.config.items() if key != "quantization_config"}
        )
        model.quantization_method = None
        return model


def mark_quantized(model: Any, report: LoadReport) -> None:
    """Give a model with quantized layers the attributes that diffusers needs to save it."""
    if not quant_linears(model):
        return
    model.is_quantized, model.quantization_method = True, Method.MEZZOTINT
    model.hf_quantizer = MezzotintQuantizer(MezzotintConfig())
    model.hf_quantizer.attach(model, report)


def _register(auto: ModuleType) -> None:
    """Add the quantizer to diffusers' tables; `auto` is diffusers.quantizers.auto."""
    auto.AUTO_QUANTIZER_MAPPING[Method.MEZZOTINT.value] = MezzotintQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[Method.MEZZOTINT.value] = MezzotintConfig
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["modelopt"] = ModelOptConfig


_register(importlib.import_module("diffusers.quantizers.auto"))
