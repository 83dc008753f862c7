"""The batch size of generation: given, or what the memory at hand holds; then recorded.

It changes only rounding. An interrupted run continues with the number in its manifest, whatever
memory is free then, so that it ends with the same bytes on a CPU.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from lopd.config.device import resolve_device
from lopd.config.inference import GenerationOptions
from lopd.models.architecture import head_rows_of
from lopd.models.machine import free_bytes
from lopd.provenance import MANIFEST_NAME, read_manifest

LOG = logging.getLogger(__name__)

MOST = {"cuda": 256, "cpu": 64}  # more is hardly faster
SHARE = 0.9  # of the free memory; the rest is for temporaries and fragmentation
UNKNOWN = 16
MIB = 2**20
LOGIT_BYTES = 40  # an id of the vocabulary, in fp32 and fp64 copies while a token is drawn

Config = TypeVar("Config", bound=GenerationOptions)


def with_batch_size(
    config: Config,
    models: Collection[str],
    prompts: Sequence[Sequence[int]],
    *,
    loaded: bool = False,
) -> Config:
    """The settings of a stage with its batch size resolved, so that its manifest names one.

    Args:
        config: settings with `out`.
        models: folders of the models that generate, one at a time.
        prompts: tokens of each.
        loaded: whether the weights are in memory already.
    """
    settings: Any = config
    if settings.batch_size is not None or getattr(settings, "engine", "") == "vllm":
        return config
    if (size := _recorded(Path(settings.out))) is None:
        device = resolve_device(settings.device)
        devices = [device]
        if device.type == "cuda" and getattr(settings, "engine_options", None) is not None:
            devices = [torch.device("cuda", n) for n in range(torch.cuda.device_count())]
        free = sum(map(free_bytes, devices))
        length = max(map(len, prompts), default=1) + settings.max_new_tokens
        most, dtype = MOST[device.type], settings.dtype
        size = min(_fitting(model, dtype, length, free, most, loaded) for model in models)
    return replace(config, batch_size=size)


def _fitting(model: str, dtype: str, length: int, free: int, most: int, loaded: bool) -> int:
    """The largest power of two of sequences that fits in the free bytes; prints it."""
    from lopd.training.dry_run import cache_bytes, meta_model, storage_bytes

    try:
        dry = meta_model(model, dtype).eval()
        short, long = (cache_bytes(dry, tokens) for tokens in (4, 8))
    except Exception as error:  # of a family that does not run on the meta device
        size = min(most, UNKNOWN)
        LOG.warning(f"batch size: {size}; its memory cannot be estimated ({type(error).__name__})")
        return size
    weights = 0 if loaded else storage_bytes([*dry.parameters(), *dry.buffers()])
    sequence = short + (length - 4) * (long - short) // 4 + LOGIT_BYTES * head_rows_of(dry)
    room, size = int(free * SHARE) - weights, 1
    while size * 2 <= most and size * 2 * sequence <= room:
        size *= 2
    LOG.info(
        f"batch size: {size} (auto; a sequence of {length} tokens takes {sequence / MIB:.3g} MiB, "
        f"and {max(room, 0) / MIB:.3g} MiB are free for them)"
    )
    return size


def _recorded(out: Path) -> int | None:
    """The batch size of the run that began in a folder; None if there is none."""
    if not (out / MANIFEST_NAME).is_file():
        return None
    config: Mapping[str, Any] = read_manifest(out).config
    size = config.get("batch_size")
    return size if type(size) is int and size > 0 else None
