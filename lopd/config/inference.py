"""Settings of the inference engine, shared by the stages that sample and score.

`engine_options` is a YAML mapping of further options for the chosen engine. They change only
rounding, so they are not part of a recipe.

    engine="transformers"   device_map
    engine="vllm"           tensor_parallel_size, pipeline_parallel_size, enforce_eager,
                            gpu_memory_utilization, max_num_batched_tokens, max_num_seqs,
                            max_model_len, enable_prefix_caching, enable_chunked_prefill,
                            cpu_offload_gb, distributed_executor_backend

For data parallelism, start several workers (`--worker i/n`, or torchrun) on one folder.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from lopd.config.device import check_device
from lopd.config.dtype import AUTO
from lopd.config.fields import Settings, parse_range, setting, setting_of
from lopd.config.model_code import CodeOptions
from lopd.config.parse import check_keys
from lopd.config.prompts import PromptOptions
from lopd.config.strict_yaml import parse_yaml
from lopd.config.training import refuse_unused
from lopd.config.values import typed
from lopd.errors import ConfigError

DTYPES = (AUTO, "float32", "bfloat16", "float16")
# name: (types, range if it is a number, words for an error message)
_Option = tuple[tuple[type, ...], str | None, str]
_COUNT: _Option = ((int,), "[1, inf)", "a positive integer")
_SWITCH: _Option = ((bool,), None, "true or false")
_OPTIONS: dict[str, dict[str, _Option]] = {
    "transformers": {"device_map": ((str, dict), None, "a name such as auto, or a mapping")},
    "vllm": {
        "tensor_parallel_size": _COUNT,
        "pipeline_parallel_size": _COUNT,
        "enforce_eager": _SWITCH,
        "gpu_memory_utilization": ((int, float), "(0, 1]", "a number in (0, 1]"),
        "max_num_batched_tokens": _COUNT,
        "max_num_seqs": _COUNT,
        "max_model_len": _COUNT,
        "enable_prefix_caching": _SWITCH,
        "enable_chunked_prefill": _SWITCH,
        "cpu_offload_gb": ((int, float), "[0, inf)", "0 or a positive number"),
        "distributed_executor_backend": ((str,), None, "a name"),
    },
}
_REFUSED = {
    "data_parallel_size": "vLLM supports it only across several processes; start that many with "
    "--worker i/n, or with torchrun",
    "enable_lora": "adapters are not supported, and vLLM silently drops one on the LM head; "
    "merge it into its base model first (model.merge_and_unload())",
    "max_logprobs": "it follows from k",
    "logprobs_mode": "it follows from what is stored",
}

_engine = partial(setting, group="Engine")
_sampling = partial(setting, group="Sampling")


@dataclass(frozen=True)
class Sampling(Settings):
    """How answers are drawn. `temperature=0` is greedy decoding."""

    max_new_tokens: int = _sampling(
        within="[1, inf)", help="Maximum length of an answer, in tokens."
    )
    temperature: float = _sampling(
        1.0, within="[0, inf)", help="Sampling temperature; 0 is greedy."
    )
    top_p: float = _sampling(
        1.0,
        within="(0, 1]",
        help="Sample from the smallest set of tokens with this probability mass.",
    )

    @property
    def is_raw(self) -> bool:
        """Whether the model is sampled as it is, so that sampled and raw log-probs are equal."""
        return self.temperature == 1.0 and self.top_p == 1.0


@dataclass(kw_only=True)
class InferenceOptions(CodeOptions):
    """Dtype and device of a model that samples or scores."""

    dtype: str = _engine(
        AUTO,
        choices=DTYPES,
        help="Dtype of the model's weights; auto is bfloat16 on GPUs that compute it, otherwise "
        "float32.",
    )
    device: str = setting(
        "auto", group="Devices and processes", identity=False, help="auto, cpu, cuda or cuda:N."
    )


@dataclass(kw_only=True)
class GenerationOptions(InferenceOptions, PromptOptions):
    """Settings of the stages that sample answers."""

    limit: int | None = setting(
        None,
        within="[1, inf)",
        group="Model and data",
        help="Use only the first N prompts; all by default.",
    )
    max_new_tokens: int = setting_of(Sampling, "max_new_tokens", default=4096)
    temperature: float = setting_of(Sampling, "temperature")
    top_p: float = setting_of(Sampling, "top_p")
    seed: int = setting(0, within="(-inf, inf)", group="Sampling", help="Seed of the sampling.")
    batch_size: int | None = _engine(
        None,
        within="[1, inf)",
        identity=False,
        help="Sequences decoded together (transformers engine); by default what fits in memory, at "
        "most 64 on a CPU and 256 on a GPU.",
    )

    def sampling(self) -> Sampling:
        """How answers are drawn."""
        return Sampling(self.max_new_tokens, self.temperature, self.top_p)


@dataclass(kw_only=True)
class ScoringOptions(InferenceOptions):
    """Settings of the stages that score sequences."""

    tokens_per_batch: int = _engine(
        16384,
        within="[1, inf)",
        identity=False,
        help="Padded tokens per forward pass (transformers engine).",
    )


@dataclass(kw_only=True)
class EngineOptions(InferenceOptions):
    """Settings of the inference engine of a stage that can use any of them."""

    engine: str = _engine("transformers", choices=tuple(_OPTIONS), help="Inference engine.")
    engine_options: dict[str, Any] | str | None = setting(
        None,
        group="Engine",
        identity=False,
        help="Further options of the engine, a YAML mapping such as '{gpu_memory_utilization: "
        "0.8}'.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.engine == "transformers":
            check_device(self.device)
        elif self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(
                f"device: found '{self.device}'; vllm expects auto, cpu or cuda; choose its GPUs "
                "with CUDA_VISIBLE_DEVICES"
            )
        options = self.options()
        if "device_map" in options and self.device != "auto":
            raise ConfigError(
                f"device: found '{self.device}' and a device_map, which places the model; leave "
                "device at auto"
            )

    def options(self) -> dict[str, Any]:
        """`engine_options` as a mapping, checked for the engine."""
        return parse_options(self.engine, self.engine_options)


@dataclass(kw_only=True)
class SamplingOptions(EngineOptions, GenerationOptions):
    """Settings that `lopd sft-data` and `lopd rollout` share."""

    prompts: str = setting(
        identity=False,
        help="JSONL, JSON or parquet file, or a folder of them, with 'prompt' or 'messages' in "
        "each record; docs/pipeline.md lists other shapes.",
    )
    out: str = setting(identity=False, help="Folder to write; an interrupted run is continued.")
    num_samples: int = setting(
        1, within="[1, inf)", group="Sampling", help="Number of answers to each prompt."
    )
    shard_size: int = setting(
        1024, within="[1, inf)", group="Model and data", help="Sequences per shard file."
    )
    worker: str | None = setting(
        None,
        group="Devices and processes",
        identity=False,
        help="i/n: be worker i (from 0) of n workers on this folder.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature == 0 and self.num_samples > 1:
            raise ConfigError(
                f"num_samples: found {self.num_samples} with temperature 0, at which all answers "
                "to a prompt are the same; set a temperature above 0, or num_samples to 1"
            )
        if self.temperature == 0:
            refuse_unused(self, ("top_p",), "temperature 0 takes the most probable token")
        if self.engine == "vllm":
            why = "vllm forms its own batches; set max_num_seqs in engine_options"
            refuse_unused(self, ("batch_size",), why)


def parse_options(engine: str, options: dict[str, Any] | str | None) -> dict[str, Any]:
    """A mapping, or its YAML; raises ConfigError for an option that the engine does not have."""
    if options is None:
        return {}
    if isinstance(options, str):
        options = parse_yaml(options, "engine_options")
    for name in options:
        if name in _REFUSED:
            raise ConfigError(f"engine_options: {name}: {_REFUSED[name]}")
    check_keys(options, list(_OPTIONS[engine]), f"engine_options of {engine}")
    found = {}
    for name, given in options.items():
        kinds, within, words = _OPTIONS[engine][name]
        value = _typed_map(given) if isinstance(given, dict) else given
        value = typed(kinds, value)
        if value is None or (within and value not in parse_range(within)):
            raise ConfigError(f"engine_options: {name}: found {given!r}; expected {words}")
        found[name] = value
    return found


def _typed_map(places: dict[str, Any]) -> dict[str, Any]:
    """A device_map in which the numbers of GPUs are numbers."""
    return {part: typed((int, str), place) for part, place in places.items()}
