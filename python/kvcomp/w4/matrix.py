"""The experiment matrix (YAML): the configurations C0, C1, ... and the workloads they are compared on.

``load`` reads and checks a file; ``Matrix.arms`` expands a configuration into the ones that run (C5: C5_m0, C5_m3,
C5_m5). What each key means, key by key:

``experiment``                         ``name``, ``date_frozen``, ``model`` or ``models``, ``model_revision``: what the
                                       matrix was written for; the model that runs is ``--model``
``fairness_constraints``
    ``.tokenizer``, ``.chat_template``,    what is the same for all configurations, in words
    ``.runtime``
    ``.decoding``                      greedy: temperature 0, no sampling, top_p 1; ``seed`` of the prompts
    ``.warmup_runs``                   passes of 128 tokens in and 32 out that are not measured
    ``.kv_cache_dtype``                auto: the framework's cache; kv16, kv8, kv4, kv3, kv2: kvcomp's packed one
``configs.<ID>.quant``
    ``.mode``                          none | fp8 (fp8_te) | w4a16_bnb | w4a16_bnb_dq | w4_shared_scale
    ``.dtype``                         bf16 | fp16: of everything that is not quantized, and of activations
    ``.scale_mbits``                   mantissa bits of the scales, 0 ... 10; -1: exact (fp16)
    ``.scale_mbits_sweep``             several of them: a configuration for each
    ``.group_size``                    inputs that share a scale: 32, 64, 128
    ``.quant_target``                  mlp | all: which layers
    ``.rounding``                      of scales: floor | nearest (default) | search
``workloads.offline_batch_decode``     ``prompt_lengths`` x ``output_lengths``, ``repeats``
``workloads.long_context_stress``      ``prompts``, ``output_len``; what does not fit is left out where
                                       ``enabled_if_memory_allows``, else an error
``workloads.online_serving``           needs a server: read, and refused where it is asked for
``metrics.performance``                the columns that are aggregated
``metrics.quality``                    ``harness`` kvcomp, ``tasks`` (families of kvcomp.eval.tasks), ``num_fewshot`` 0,
                                       ``report_relative_drop_vs``, ``acceptance_target_avg_relative_drop_pct``;
                                       ``min_reference_accuracy``, ``min_questions``: of a family that counts in that
                                       average (kvcomp.w4.acceptance)
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..eval.tasks import FAMILIES

MATRIX = Path("experiment_matrix.yaml")
Mode = Literal["none", "fp8", "fp8_te", "w4a16_bnb", "w4a16_bnb_dq", "w4_shared_scale"]
Target = Literal["mlp", "all"]
Rounding = Literal["floor", "nearest", "search"]
Metric = Literal[
    "ttft_ms", "tpot_ms", "tpot_p50_ms", "throughput_output_tok_s", "throughput_total_tok_s", "model_mem_mb",
    "peak_gpu_mem_mb", "joules_per_token",
]  # fmt: skip
_Mantissa = Annotated[int, Field(ge=-1, le=10)]
_Count = Annotated[int, Field(ge=1, le=2**31 - 1)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class Experiment(_Model):
    name: str = Field(min_length=1)
    date_frozen: str | None = None
    model: str | None = None
    models: list[str] = []
    model_revision: str = "main"


class Decoding(_Model):
    temperature: float = Field(default=0.0, ge=0, le=0)
    do_sample: Literal[False] = False
    top_p: float = Field(default=1.0, ge=1, le=1)
    seed: int = Field(default=42, ge=0)


class Fairness(_Model):
    tokenizer: str = ""
    chat_template: str = ""
    decoding: Decoding = Decoding()
    runtime: str = "torch"
    warmup_runs: int = Field(default=1, ge=0, le=100)
    kv_cache_dtype: Literal["auto", "kv16", "kv8", "kv4", "kv3", "kv2"] = "auto"


class Quant(_Model):
    mode: Mode
    dtype: Literal["bf16", "fp16"] = "bf16"
    scale_mbits: _Mantissa | None = None
    scale_mbits_sweep: list[_Mantissa] | None = Field(None, min_length=1)
    group_size: Literal[32, 64, 128] | None = None
    quant_target: Target | None = None
    rounding: Rounding | None = None

    @model_validator(mode="after")
    def _known_where_used(self) -> Quant:
        if self.mode == "w4_shared_scale":
            if (self.scale_mbits is None) == (self.scale_mbits_sweep is None):
                raise ValueError("expected one of scale_mbits and scale_mbits_sweep")
            return self
        unused = ["scale_mbits", "scale_mbits_sweep", "group_size", "rounding"]
        unused += ["quant_target"] if self.mode == "none" else []
        for name in unused:
            if getattr(self, name) is not None:
                raise ValueError(f"{name}: expected to be left out with mode {self.mode}, which does not use it")
        return self


class Config(_Model):
    name: str = ""
    runtime: Literal["torch"] = "torch"
    quant: Quant
    notes: str = ""


class OfflineWorkload(_Model):
    prompt_lengths: list[_Count] = Field(min_length=1)
    output_lengths: list[_Count] = Field(min_length=1)
    repeats: _Count = 3


class StressWorkload(_Model):
    prompts: list[_Count] = Field(min_length=1)
    output_len: _Count
    enabled_if_memory_allows: bool = True


class ServingWorkload(_Model):
    concurrency: list[_Count]
    prompt_len: _Count
    output_len: _Count
    num_prompts: _Count
    runner: str


class Workloads(_Model):
    offline_batch_decode: OfflineWorkload
    online_serving: ServingWorkload | None = None
    long_context_stress: StressWorkload | None = None


class Quality(_Model):
    harness: Literal["kvcomp", "lm-eval"] = "kvcomp"
    tasks: list[str] = list(FAMILIES)
    num_fewshot: Literal[0] = 0
    report_relative_drop_vs: str = "C0"
    acceptance_target_avg_relative_drop_pct: float = Field(default=3.0, ge=0, allow_inf_nan=False)
    min_reference_accuracy: float = Field(default=0.5, gt=0, le=1)
    min_questions: _Count = 20

    @model_validator(mode="after")
    def _own_tasks(self) -> Quality:
        if self.harness == "kvcomp":
            for task in self.tasks:
                if task not in FAMILIES:
                    raise ValueError(f"tasks: expected among {', '.join(FAMILIES)}, got {task}")
        return self


class Metrics(_Model):
    performance: list[Metric] = list(get_args(Metric))
    quality: Quality = Quality()


@dataclass(frozen=True)
class Arm:
    """One configuration that runs: ``config_id`` as in results (C5_m3), and how its weights are kept."""

    config_id: str
    name: str
    mode: Mode
    dtype: str = "bf16"
    scale_mbits: int = -1
    group_size: int = 128
    quant_target: Target = "mlp"
    rounding: Rounding = "nearest"


class Matrix(_Model):
    experiment: Experiment
    fairness_constraints: Fairness = Fairness()
    configs: dict[str, Config] = Field(min_length=1)
    workloads: Workloads
    metrics: Metrics = Metrics()

    def arms(self, config_id: str) -> list[Arm]:
        """What a configuration runs as; a sweep's members are named ``<ID>_m<bits>``, and can be asked for one by one.

        ValueError for an ID that is not in the matrix."""
        for name, config in self.configs.items():
            arms = _arms(name, config)
            if config_id == name:
                return arms
            found = [arm for arm in arms if arm.config_id == config_id]
            if found:
                return found
        known = [arm.config_id for name, config in self.configs.items() for arm in _arms(name, config)]
        raise ValueError(f"--config_id: expected among {', '.join(known)}, got {config_id}")


def _arms(config_id: str, config: Config) -> list[Arm]:
    quant = config.quant
    given = {
        name: value
        for name in ("group_size", "quant_target", "rounding")
        if (value := getattr(quant, name)) is not None
    }
    sweep = quant.scale_mbits_sweep
    bits = [-1 if quant.scale_mbits is None else quant.scale_mbits] if sweep is None else list(dict.fromkeys(sweep))
    return [
        Arm(
            config_id if sweep is None else f"{config_id}_m{value}",
            config.name,
            quant.mode,
            quant.dtype,
            value,
            **given,
        )
        for value in bits
    ]


def load(path: Path) -> Matrix:
    """Read a matrix. ValueError, in one sentence that names the file and the key, for anything that is not one."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Matrix.model_validate(values)
    except ValidationError as reason:
        first = reason.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ValueError(f"{path}: {where}: {first['msg']}, got {reprlib.repr(first['input'])}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as reason:
        raise ValueError(f"{path}: expected YAML, got: {' '.join(str(reason).split())[:200]}") from None
