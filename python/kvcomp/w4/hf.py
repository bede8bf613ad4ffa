"""transformers: W4Config is a quantization config, and from_pretrained and save_pretrained know the layers it makes.

import kvcomp.w4
model = AutoModelForCausalLM.from_pretrained(path, quantization_config=kvcomp.w4.W4Config(target="all"))
model.save_pretrained(folder)  # safetensors, of the packed bytes
model = AutoModelForCausalLM.from_pretrained(folder)
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import weights
from .linear import SharedScaleLinear
from .model import TARGETS, find_linears, replace_module
from .stack import stack_layers

METHOD = "kvcomp_w4"
FORMAT = 1  # of the packed bytes; csrc/kvcomp/w4.h


@register_quantization_config(METHOD)
class W4Config(QuantizationConfigMixin):  # type: ignore[misc]
    """4-bit weights.

    target: "mlp" or "all": which linear layers of a model's blocks.
    group_size: inputs that share a scale: 32, 64, 128.
    scale_mbits: mantissa bits of scales, 0 ... 10 (E5Mx); -1: fp16.
    rounding: of scales: "floor", "nearest", "search" (each the one of least squared error).
    skip: names of layers, or parts of their paths, that stay as they are.
    stacked: layers that a module calls with the same x (queries, keys and values; gate and up) are one product where x
        has few rows. What is saved does not depend on it.
    """

    def __init__(
        self,
        target: str = "mlp",
        group_size: int = 128,
        scale_mbits: int = 5,
        rounding: str = "nearest",
        skip: list[str] | None = None,
        stacked: bool = True,
        *,
        format_version: int = FORMAT,
        quant_method: str = METHOD,
    ) -> None:
        """``format_version``, ``quant_method``: of a checkpoint, read from its config."""
        if target not in TARGETS:
            raise ValueError(f"W4Config: target: expected one of {', '.join(TARGETS)}, got {target!r}")
        weights.check_format("W4Config", group_size, scale_mbits, rounding)
        if not isinstance(stacked, bool):
            raise ValueError(f"W4Config: stacked: expected True or False, got {stacked!r}")
        if format_version != FORMAT:
            raise ValueError(f"W4Config: format_version: expected {FORMAT}, got {format_version}")
        if quant_method != METHOD:
            raise ValueError(f"W4Config: quant_method: expected {METHOD}, got {quant_method!r}")
        self.quant_method = METHOD
        self.target, self.group_size, self.scale_mbits = target, group_size, scale_mbits
        self.rounding, self.skip = rounding, list(skip or [])
        self.stacked = stacked
        self.format_version = format_version


@register_quantizer(METHOD)
class W4Quantizer(HfQuantizer):  # type: ignore[misc]
    """Puts SharedScaleLinear where nn.Linear was; weights are quantized as they are read, or were
    before they were saved."""

    quantization_config: W4Config
    requires_calibration = False

    def _process_model_before_weight_loading(self, model: Any, **arguments: Any) -> Any:
        config = self.quantization_config
        for name in find_linears(model, config.target, config.skip):
            linear = model.get_submodule(name)
            with torch.device("meta"):
                layer = SharedScaleLinear(
                    linear.in_features, linear.out_features, config.group_size, config.scale_mbits,
                    linear.bias is not None, dtype=linear.weight.dtype,
                )  # fmt: skip
            layer.exponent = None  # until it is read, or found
            replace_module(model, name, layer)
        return model

    def _process_model_after_weight_loading(self, model: Any, **arguments: Any) -> Any:
        for name, module in model.named_modules():
            if not isinstance(module, SharedScaleLinear):
                continue
            if module.exponent is None:
                raise ValueError(f"W4Config: {name}._extra_state: expected in the checkpoint, got none")
            # Tensors of a mapped file lie where the file has them; kernels read 16 bytes at once.
            if module.weight.data_ptr() % 16:
                module.weight = module.weight.clone()
        if self.quantization_config.stacked:
            stack_layers(model)
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **arguments: Any) -> bool:
        parent, _, last = param_name.rpartition(".")
        return (
            not self.pre_quantized and last == "weight" and isinstance(model.get_submodule(parent), SharedScaleLinear)
        )

    def get_quantize_ops(self) -> Any:
        return _Quantize(self.quantization_config)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """``dtype``: of the layers that come back; None: the model's own, so that it runs as it is."""
        wanted = model.dtype if dtype is None else dtype
        for name, layer in list(model.named_modules()):
            if not isinstance(layer, SharedScaleLinear):
                continue
            with torch.device("meta"):
                linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            linear.weight = torch.nn.Parameter(layer.dequantize(wanted), requires_grad=False)
            bias = None if layer.bias is None else torch.nn.Parameter(layer.bias.to(wanted), requires_grad=False)
            linear.register_parameter("bias", bias)
            replace_module(model, name, linear)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


class _Quantize(ConversionOps):  # type: ignore[misc]
    """A weight of the checkpoint becomes packed bytes, before the next one is read."""

    def __init__(self, config: W4Config) -> None:
        self._config = config

    def convert(
        self,
        input_dict: dict[str, Any],
        *arguments: Any,
        full_layer_name: str,
        model: Any,
        missing_keys: set[str] | None = None,
        **others: Any,
    ) -> dict[str, torch.Tensor]:
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        parent = full_layer_name.rpartition(".")[0]
        layer = model.get_submodule(parent)
        if tuple(weight.shape) != (layer.out_features, layer.in_features):
            raise ValueError(
                f"W4Config: {full_layer_name}: expected ({layer.out_features}, {layer.in_features}), got "
                f"{tuple(weight.shape)}"
            )
        config = self._config
        packed, layer.exponent = weights.pack(weight, config.group_size, config.scale_mbits, config.rounding)
        if missing_keys is not None:
            missing_keys.discard(f"{parent}._extra_state")
        return {full_layer_name: packed.to(weight.device)}


def mark(model: Any, config: W4Config) -> None:
    """Makes a model whose layers were replaced one that save_pretrained and compiled generation know as quantized."""
    model.config.quantization_config = config
    model.hf_quantizer = W4Quantizer(config, pre_quantized=True)
    model.quantization_method = METHOD
    model.is_quantized = True
