"""Experiment files (YAML or JSON): the keys of the seed's schema, and what they mean here.

``load`` reads and checks a file; ``to_policy`` turns it into a :class:`kvcomp.Policy` for a prompt length and a depth.
What each key means, key by key:

``model_name``                          the model the figures were chosen for; named in reports
``model_layers``                        its depth: ``layer_index`` counts its layers and is scaled to the depth at hand
``max_sequence_length``                 its context: ``window_size`` and ``min_tokens`` scale with prompt / this
``selector.strategy``                   full | streaming | snap | pyramid | hybrid | ada | h2o
``selector.importance``                 ``attention`` (default), or ``key_norm`` for stored caches without attention
``selector.global_retain_ratio``        most tokens kept: of every layer that ``layer_budgets`` does not cover
``selector.layer_budgets``              most tokens kept at the listed layers, interpolated between first and last;
                                        ``priority`` (interpolated too): layers of low priority give up bytes first
``selector.window_size``                newest tokens, always kept, at 16 bit; streaming, left out: 1/8 of the prompt
``selector.min_tokens``                 least tokens that a layer keeps
``selector.clustering_k``               pooling width of the snap scores (odd: an even one is raised by one)
``selector.attention_temperature``      below 1 sharpens importance before the budget is planned
``quantization.enabled``                false: tokens are kept at 16 bit or dropped
``quantization.default_bits``           most bits of keys and values where ``key_bits``, ``value_bits`` are left out
``quantization.high_precision_guard``   most kept tokens that may stay at 16 bit, as a fraction (window and sinks apart)
``quantization.asymmetric``             false: no zero point
``quantization.group_size``             channels that share a scale
``quantization.stochastic_rounding``    seeded
``quantization.calibration_steps``      tokens from which the error of every bit width is measured
``budget.target_compression_ratio``     the one hard constraint: bf16 bytes / allocated bytes
``budget.min_throughput_gain``          acceptance limits, measured and reported as met or missed;
``budget.max_accuracy_drop``            nothing depends on them
``metrics``                             speeds and sizes for ``--simulate`` alone
"""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..policy import BITS, Policy
from ..selectors import H2O, AdaKV, Full, Hybrid, LayerRatio, Selector, Streaming

Strategy = Literal["full", "streaming", "snap", "pyramid", "hybrid", "ada", "h2o"]
Bits = Literal[2, 3, 4, 8, 16]
Ratio = Annotated[float, Field(gt=0, le=1)]
_MOST = 2**31 - 1  # layers, tokens
METRICS = frozenset(
    {f"{arm}_{figure}" for arm in ("baseline", "compressed") for figure in ("tps", "ttft_ms", "tpot_ms")} | {"layers"}
)
# First tokens that streaming and hybrid always keep (StreamingLLM's four).
SINKS = 4


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class LayerBudget(_Model):
    layer_index: int = Field(ge=0, le=_MOST)
    retain_ratio: Ratio
    priority: float = Field(1.0, gt=0, allow_inf_nan=False)


class SelectorConfig(_Model):
    strategy: Strategy
    importance: Literal["attention", "key_norm"] = "attention"
    global_retain_ratio: Ratio = 0.25
    window_size: int | None = Field(None, ge=1, le=_MOST)
    min_tokens: int = Field(32, ge=1, le=_MOST)
    layer_budgets: list[LayerBudget] = []
    clustering_k: int = Field(8, ge=1, le=_MOST - 1)
    attention_temperature: float = Field(1.0, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _known_where_used(self) -> SelectorConfig:
        indices = [budget.layer_index for budget in self.layer_budgets]
        if len(set(indices)) < len(indices):
            raise ValueError("layer_budgets: expected every layer_index once, got one twice")
        # A key that the strategy would not look at is an error, where it was written.
        unused = {
            "full": ("global_retain_ratio", "min_tokens", "layer_budgets", "clustering_k"),
            "streaming": ("layer_budgets", "clustering_k", "importance", "attention_temperature"),
            "ada": ("layer_budgets",),
            "h2o": ("layer_budgets",),
        }.get(self.strategy, ())
        for name in unused:
            if name in self.model_fields_set and getattr(self, name) != type(self).model_fields[name].get_default():
                raise ValueError(
                    f"{name}: expected to be left out with strategy {self.strategy}, which does not use it"
                )
        return self


class QuantizationConfig(_Model):
    enabled: bool = True
    default_bits: Bits = 4
    key_bits: Bits | None = None
    value_bits: Bits | None = None
    high_precision_guard: float = Field(0.1, ge=0, le=1)
    asymmetric: bool = True
    group_size: int = Field(16, ge=16, le=256, multiple_of=16)
    stochastic_rounding: bool = True
    calibration_steps: int = Field(256, ge=16, le=_MOST)


class BudgetConfig(_Model):
    target_compression_ratio: float = Field(ge=1, allow_inf_nan=False)
    min_throughput_gain: float = Field(1.0, ge=0, allow_inf_nan=False)
    max_accuracy_drop: float = Field(0.02, ge=0, le=1)


class ExperimentConfig(_Model):
    model_name: str = Field(min_length=1)
    model_layers: int | None = Field(None, ge=1, le=_MOST)
    max_sequence_length: int = Field(128000, ge=1, le=_MOST)
    selector: SelectorConfig
    quantization: QuantizationConfig = Field(default_factory=lambda: QuantizationConfig.model_validate({}))
    budget: BudgetConfig
    metrics: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = {}

    @model_validator(mode="after")
    def _fits_together(self) -> ExperimentConfig:
        unknown = sorted(set(self.metrics) - METRICS)
        if unknown:
            raise ValueError(f"metrics: expected keys among {', '.join(sorted(METRICS))}, got {unknown[0]}")
        if self.selector.layer_budgets and self.model_layers is None:
            raise ValueError("model_layers: expected the depth that layer_budgets count on, got none")
        for budget in self.selector.layer_budgets:
            if self.model_layers is not None and budget.layer_index >= self.model_layers:
                raise ValueError(
                    f"selector.layer_budgets: expected layer_index below model_layers = {self.model_layers}, "
                    f"got {budget.layer_index}"
                )
        return self

    @property
    def uncompressed(self) -> bool:
        """The framework's own cache: everything kept, nothing quantized, no bytes to save."""
        whole = self.selector.strategy == "full" or (
            self.selector.global_retain_ratio == 1 and not self.selector.layer_budgets
        )
        return whole and not self.quantization.enabled and self.budget.target_compression_ratio == 1


class _Loader(yaml.SafeLoader):
    """A mapping with a key twice is an error, in the place of the last one winning."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = key_node.value
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key} twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load(path: Path | str) -> ExperimentConfig:
    """An experiment file. ValueError with one sentence naming the key; OSError where the file cannot be read."""
    path = Path(path)
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as reason:
        # Text that is no UTF-8 or no YAML; and for scalars that are not of their tag's type (`!!int x`, `!!bool x`,
        # `!!timestamp x`, 2001-99-99), keys that are lists and deep nesting PyYAML fails with whatever Python raises.
        said = " ".join(str(reason).split())
        raise ValueError(f"config: {path}: expected YAML, got something else ({said})") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"config: {path}: expected keys and values, got {type(loaded).__name__}")
    return parse(loaded, name=str(path))


def parse(values: dict[Any, Any], *, name: str) -> ExperimentConfig:
    """The same, of values read already; ``name`` is what errors call them."""
    try:
        return ExperimentConfig.model_validate(values)
    except ValidationError as reason:
        raise ValueError(f"config: {name}: {_sentence(reason)}") from None


_REPR = reprlib.Repr()
_REPR.maxlevel = 2
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 80


def _shown(value: object) -> str:
    """repr, never long: a few aliases make values of any size."""
    try:
        return " ".join(_REPR.repr(value).split())
    except ValueError:  # Python prints no integer of thousands of digits
        return "a number of too many digits"


def _sentence(reason: ValidationError) -> str:
    """The first thing that is wrong, as ``key: expected ..., got ...``."""
    first = reason.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    kind, context, given = first["type"], first.get("ctx", {}), first["input"]
    if kind == "extra_forbidden":
        return f"{key}: expected a known key, got an unknown one"
    if kind == "missing":
        return f"{key}: expected a value, got none"
    if kind == "value_error":
        return f"{key}.{context['error']}" if key else str(context["error"])
    bounds = {"greater_than": "> {gt}", "greater_than_equal": ">= {ge}", "less_than_equal": "<= {le}"}
    if kind in bounds:
        return f"{key}: expected a number {bounds[kind].format(**context)}, got {_shown(given)}"
    if kind == "literal_error":
        return f"{key}: expected {context['expected']}, got {_shown(given)}"
    wanted = first["msg"].removeprefix("Input should be ")
    return f"{key}: expected {wanted}, got {_shown(given)}"


def load_policy(path: Path | str, *, prompt_tokens: int | None = None) -> Policy:
    """The policy of an experiment file; ``prompt_tokens`` left out: its ``max_sequence_length``."""
    config = load(path)
    return to_policy(config, prompt_tokens=prompt_tokens or config.max_sequence_length)


def to_policy(config: ExperimentConfig, *, prompt_tokens: int, seed: int = 0) -> Policy:
    """The policy of an experiment for prompts of ``prompt_tokens`` tokens, at any depth."""
    if config.uncompressed:
        return Policy(bits=16, seed=seed)
    quantization = config.quantization
    return Policy(
        target_ratio=config.budget.target_compression_ratio,
        select=_selector(config, prompt_tokens),
        sinks=SINKS if config.selector.strategy in ("streaming", "hybrid") else 0,
        window=scaled_window(config, prompt_tokens),
        group=quantization.group_size if quantization.enabled else None,
        seed=seed,
        zero_point=quantization.asymmetric,
        stochastic=quantization.stochastic_rounding,
        classes=classes(config),
        guard=quantization.high_precision_guard if quantization.enabled else None,
        importance_temperature=config.selector.attention_temperature,
        calibration_tokens=quantization.calibration_steps,
    )


def most_bits(config: ExperimentConfig) -> tuple[int, int]:
    """The most bits of keys and of values outside window, sinks and guard."""
    quantization = config.quantization
    if not quantization.enabled:
        return 16, 16
    return quantization.key_bits or quantization.default_bits, quantization.value_bits or quantization.default_bits


def classes(config: ExperimentConfig) -> tuple[tuple[int, int], ...]:
    """The (k_bits, v_bits) that tokens outside window, sinks and guard may take: the configured bits, or fewer."""
    if not config.quantization.enabled:
        return ((16, 16),)
    k_most, v_most = most_bits(config)
    return tuple((k, v) for k in BITS for v in BITS if k <= k_most and v <= v_most)


def scaled(tokens: int, config: ExperimentConfig, prompt_tokens: int) -> int:
    """A count that was chosen for ``max_sequence_length``, at another prompt length; at least 1."""
    return max(1, round(tokens * prompt_tokens / config.max_sequence_length))


def scaled_window(config: ExperimentConfig, prompt_tokens: int) -> int:
    """Newest tokens that stay at 16 bit. Left out: an eighth of the prompt for streaming (at least 16), else none."""
    if config.selector.window_size is not None:
        return scaled(config.selector.window_size, config, prompt_tokens)
    return max(16, prompt_tokens // 8) if config.selector.strategy == "streaming" else 0


def pool_width(config: ExperimentConfig) -> int:
    """Pooling needs a middle: an even width is raised by one."""
    return config.selector.clustering_k | 1


def layer_ratios(config: ExperimentConfig) -> tuple[LayerRatio, ...]:
    """The listed layers, and ``global_retain_ratio`` with priority 1 from their neighbours outwards, so that what lies
    before the first and behind the last listed layer keeps that much."""
    listed = sorted(config.selector.layer_budgets, key=lambda budget: budget.layer_index)
    if not listed or config.model_layers is None:
        return ()
    others = {0, listed[0].layer_index - 1, listed[-1].layer_index + 1, config.model_layers - 1}
    others = {i for i in others if 0 <= i < config.model_layers} - set(
        range(listed[0].layer_index, listed[-1].layer_index + 1)
    )
    ratios = [LayerRatio(layer_index=i, retain_ratio=config.selector.global_retain_ratio) for i in others]
    ratios += [LayerRatio(**budget.model_dump()) for budget in listed]
    return tuple(sorted(ratios, key=lambda ratio: ratio.layer_index))


def _selector(config: ExperimentConfig, prompt_tokens: int) -> Selector:
    selector = config.selector
    least = scaled(selector.min_tokens, config, prompt_tokens)
    keep = min(1.0, max(selector.global_retain_ratio, least / prompt_tokens))
    if selector.strategy == "full":
        return Full()
    if selector.strategy == "streaming":
        return Streaming(keep=keep)
    if selector.strategy == "ada":
        return AdaKV(pool=pool_width(config), keep=keep)
    if selector.strategy == "h2o":
        return H2O(pool=pool_width(config), keep=keep)
    return Hybrid(
        pool=pool_width(config),
        keep=selector.global_retain_ratio,
        base="snap" if selector.strategy == "snap" else "pyramid",
        layer_ratios=layer_ratios(config),
        model_layers=config.model_layers,
        min_tokens=least,
    )
