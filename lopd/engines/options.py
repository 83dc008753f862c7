"""Settings of the engine, shared by the stages that sample and score.

`engine_options` is a YAML mapping of further options of the chosen engine. They change results by
rounding only, so they are not part of a recipe.

    engine="transformers"   device_map
    engine="vllm"           tensor_parallel_size, pipeline_parallel_size, enforce_eager,
                            gpu_memory_utilization, max_num_batched_tokens, max_num_seqs,
                            max_model_len, enable_prefix_caching, enable_chunked_prefill,
                            cpu_offload_gb, distributed_executor_backend

For data parallelism, start several workers (`--worker i/n`, or torchrun) on one folder.
"""

from dataclasses import dataclass, field
from typing import Any

from lopd.config.parse import check_keys
from lopd.engines import check_engine
from lopd.errors import ConfigError
from lopd.models.load import resolve_device, resolve_dtype

_Check = tuple[type | tuple[type, ...], float, float, str]
_COUNT: _Check = (int, 1, float("inf"), "a positive integer")
_SWITCH: _Check = (bool, 0, 1, "true or false")
_NAME: _Check = (str, 0, 0, "a name")
_TAKEN: dict[str, dict[str, _Check]] = {
    "transformers": {"device_map": ((str, dict), 0, 0, "a name such as auto, or a mapping")},
    "vllm": {
        "tensor_parallel_size": _COUNT,
        "pipeline_parallel_size": _COUNT,
        "enforce_eager": _SWITCH,
        "gpu_memory_utilization": ((int, float), 0, 1, "a number in (0, 1]"),
        "max_num_batched_tokens": _COUNT,
        "max_num_seqs": _COUNT,
        "max_model_len": _COUNT,
        "enable_prefix_caching": _SWITCH,
        "enable_chunked_prefill": _SWITCH,
        "cpu_offload_gb": ((int, float), 0, float("inf"), "0 or a positive number"),
        "distributed_executor_backend": _NAME,
    },
}
_REFUSED = {
    "data_parallel_size": "vLLM takes it only from several processes: start that many with "
    "--worker i/n, or by torchrun",
    "enable_lora": "adapters are not supported, and vLLM drops one on the LM head without a "
    "word; merge it into its base model first (model.merge_and_unload())",
    "max_logprobs": "it follows from k",
    "logprobs_mode": "it follows from what is stored",
}


@dataclass(kw_only=True)
class EngineOptions:
    """What every stage that samples or scores says of its engine."""

    engine: str = field(default="transformers", metadata={"help": "transformers or vllm."})
    engine_options: str | None = field(
        default=None,
        metadata={"help": "More for the engine, a YAML mapping: '{gpu_memory_utilization: 0.8}'."},
    )
    dtype: str = field(default="bfloat16", metadata={"help": "float32, bfloat16 or float16."})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda or cuda:N."})

    def __post_init__(self) -> None:
        check_engine(self.engine)
        resolve_dtype(self.dtype)
        if self.engine == "transformers":
            resolve_device(self.device)
        elif self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(
                f"device: found '{self.device}'; vllm takes auto, cpu or cuda and is given its "
                "GPUs by CUDA_VISIBLE_DEVICES"
            )
        options = self.options()
        if "device_map" in options and self.device != "auto":
            raise ConfigError(
                f"device: found '{self.device}' beside a device_map, which places the model; "
                "leave device at auto"
            )

    def options(self) -> dict[str, Any]:
        """`engine_options` as a mapping, checked for the engine."""
        return parse_options(self.engine, self.engine_options)


def parse_options(engine: str, text: str | None) -> dict[str, Any]:
    """A mapping from YAML, or ConfigError that names the option and what it expects."""
    if text is None:
        return {}
    import yaml

    try:
        options = yaml.safe_load(text)
    except yaml.YAMLError:
        options = None
    if not isinstance(options, dict):
        raise ConfigError(
            f"engine_options: found '{text}'; expected a YAML mapping, '{{name: value, ...}}'"
        )
    for name in options:
        if name in _REFUSED:
            raise ConfigError(f"engine_options: {name}: {_REFUSED[name]}")
    check_keys(options, list(_TAKEN[engine]), f"engine_options of {engine}")
    for name, value in options.items():
        kinds, low, high, words = _TAKEN[engine][name]
        numeric = isinstance(value, int | float)
        good = isinstance(value, kinds) and isinstance(value, bool) == (kinds is bool)
        if good and numeric:
            good = low <= value <= high and (name != "gpu_memory_utilization" or value > 0)
        if not good:
            raise ConfigError(f"engine_options: {name}: found {value!r}; expected {words}")
    return options
