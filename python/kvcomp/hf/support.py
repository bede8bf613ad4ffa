"""What kvcomp.Cache can hold: models of plain causal full attention with one K and one V per KV head. All else is
refused here, by name, before anything is changed."""

from typing import Any

from transformers.cache_utils import get_layer_types_and_kwargs

HEAD_DIMS = (64, 80, 96, 128, 256)  # kvc_head_dim_ok in csrc/kvcomp/format.h
# Models whose attention adds a learned logit to the softmax (the attention functions' argument `s_aux`). Configurations
# do not say so; what is not listed is caught when the argument arrives.
SINK_MODELS = (
    *("gpt_oss", "granite_swa", "granitemoe_swa", "flint", "openai_privacy_filter"),
    *("deepseek_v4", "hy_v4", "mimo_v2_flash"),
)


def decoder_config(config: Any) -> Any:
    """The part of `config` that the decoder's attention modules hold: the whole, for a text model."""
    if not hasattr(config, "get_text_config") or not hasattr(config, "_attn_implementation"):
        raise TypeError(f"Cache: config: expected a transformers configuration, got {type(config).__name__}")
    return config.get_text_config(decoder=True)


def _refuse(expected: str, got: str) -> NotImplementedError:
    return NotImplementedError(f"Cache: config: expected {expected}, got {got}")


def count_layers(config: Any) -> int:
    """Layers of the decoder `config`; NotImplementedError naming what kvcomp cannot hold."""
    if getattr(config, "is_encoder_decoder", False):
        raise _refuse("a decoder-only model", f"{config.model_type}, an encoder-decoder")
    if config.model_type in SINK_MODELS:
        raise _refuse("attention without sinks", f"{config.model_type}, which passes s_aux")
    if getattr(config, "output_attentions", False):
        raise _refuse("output_attentions=False", "True (a packed cache has no attention matrix to give)")
    if getattr(config, "num_kv_shared_layers", None):
        raise _refuse("a cache of its own for every layer", f"num_kv_shared_layers={config.num_kv_shared_layers}")
    try:
        types: list[str] = get_layer_types_and_kwargs(config)[0]
        heads = getattr(config, "num_attention_heads", None)
        head_dim = getattr(config, "head_dim", None)
    except (AttributeError, KeyError) as error:  # heterogeneous models refuse to name one value for all layers
        raise _refuse("the same attention in every layer", f"{config.model_type} ({error})") from error
    for index, kind in enumerate(types):
        if kind != "full_attention":
            raise _refuse("full_attention in every layer", f"{kind} in layer {index}")
    if getattr(config, "kv_lora_rank", None):
        raise _refuse("K and V per head", f"{config.model_type} with MLA (kv_lora_rank={config.kv_lora_rank})")
    if heads is None:
        raise _refuse("attention layers", f"{config.model_type}, a recurrent model")
    head_dim = head_dim or config.hidden_size // heads
    if head_dim not in HEAD_DIMS:
        raise _refuse(f"head_dim in {HEAD_DIMS}", str(head_dim))
    return len(types)


def check_arguments(module: Any, arguments: dict[str, Any]) -> None:
    """Refuses what the attention function of a packed layer is asked for and does not do."""

    def refuse(name: str, got: str) -> NotImplementedError:
        return NotImplementedError(f"Cache: {name}: expected none with a packed cache, got {got}")

    if arguments.get("s_aux") is not None:
        raise refuse("s_aux", f"attention sinks in {type(module).__name__}")
    if arguments.get("sliding_window") is not None:
        raise refuse("sliding_window", str(arguments["sliding_window"]))
    if arguments.get("position_bias") is not None:
        raise refuse("position_bias", "a bias")
    if arguments.get("output_attentions", getattr(module.config, "output_attentions", False)):
        raise refuse("output_attentions", "True (a packed cache has no attention matrix to give)")
    if arguments.get("is_causal") is False:
        raise refuse("is_causal=False", "attention to later tokens")
    if arguments.get("dropout"):
        raise refuse("dropout", str(arguments["dropout"]))
