"""Sampling and scoring on a Ray cluster: workers of one stage, which share its output folder.

The workers are those of `--worker i/n`: each takes whole shards and skips what others finished, so
the folder is the same as from one process, and a worker that dies costs the shard it was at. Ray
decides where they run and starts them again; all nodes need the same file system and packages.
"""

import logging
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import ray

from lopd.config.rollout import RolloutConfig
from lopd.config.score import ScoreConfig
from lopd.config.sft_data import SftDataConfig
from lopd.errors import ConfigError, LopdError, ShardError
from lopd.provenance import read_manifest
from lopd.store import RolloutStore, TeacherCache

LOG = logging.getLogger(__name__)

__all__ = ["run_stage"]

STAGES: dict[type, str] = {
    RolloutConfig: "rollout",
    SftDataConfig: "sft_data",
    ScoreConfig: "score",
}


def run_stage(
    config: Any,
    *,
    workers: int,
    num_gpus: float = 1,
    num_cpus: float = 1,
    max_retries: int = 3,
) -> Path:
    """Run a stage in several workers of a Ray cluster, and wait for them.

    It continues an interrupted run, as the stage does. Without `ray.init`, Ray connects to the
    cluster that `RAY_ADDRESS` names, or starts one on this machine.

    Args:
        config: a `RolloutConfig`, `SftDataConfig` or `ScoreConfig`, without `worker`. Its paths are
            read on every node.
        workers: number of workers; more than there are shards have nothing to do.
        num_gpus, num_cpus: what Ray reserves for each. A worker sees only its own GPUs; for vLLM
            with tensor parallelism give it as many.
        max_retries: how often Ray starts a worker again that died with its process or node.

    Returns:
        The folder, complete.

    Raises:
        ConfigError: the config is of another stage, or a number is out of range.
        LopdError: as the stage, if workers failed and the others could not finish their shards.
        ShardError: shards are missing because workers died.

    >>> run_stage(ScoreConfig(teacher="T", rollouts="r", out="c"), workers=0)
    Traceback (most recent call last):
    lopd.errors.ConfigError: workers: found 0; expected at least 1
    """
    if (stage := STAGES.get(type(config))) is None:
        known = ", ".join(each.__name__ for each in STAGES)
        raise ConfigError(f"config: found {type(config).__name__}; expected one of {known}")
    if workers < 1:
        raise ConfigError(f"workers: found {workers}; expected at least 1")
    if config.worker is not None:
        raise ConfigError(f"worker: found '{config.worker}'; leave it out, Ray numbers the workers")
    if isinstance(config, ScoreConfig) and config.plan:
        raise ConfigError("plan: found True; run 'lopd score --plan' in one process")
    if not ray.is_initialized():
        ray.init()
    _warn_of_gpus(num_gpus)
    work = ray.remote(_work).options(
        num_gpus=num_gpus, num_cpus=num_cpus, max_retries=max_retries, name=f"lopd {stage}"
    )
    tasks = [
        work.remote(stage, replace(config, worker=f"{index}/{workers}")) for index in range(workers)
    ]
    failures = [error for task in tasks if (error := _failure(task, tasks)) is not None]
    for error in failures:
        LOG.warning(f"{config.out}: a worker failed: {error}")
    _check_complete(config.out, failures)
    return Path(config.out)


def _warn_of_gpus(num_gpus: float) -> None:
    """Say that no node has the GPUs of a worker; one that has may still join."""
    nodes = [node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["Alive"]]
    if num_gpus > (most := max(nodes, default=0.0)):
        LOG.warning(
            f"num_gpus: found {num_gpus:g} for a worker, but no node of the cluster has more than "
            f"{most:g}; the workers wait for one that has; pass num_gpus=0 to run them on CPUs"
        )


def _work(stage: str, config: Any) -> None:
    """One worker, in a process of Ray."""
    logger = logging.getLogger("lopd")
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO)
    import_module(f"lopd.stages.{stage}").main(config)


def _failure(task: Any, tasks: list[Any]) -> Exception | None:
    """Wait for a worker; why it failed, or None. If the wait is interrupted, stop all workers."""
    try:
        ray.get(task)
    except ray.exceptions.RayTaskError as error:
        return error.cause if isinstance(error.cause, LopdError) else error
    except ray.exceptions.RayError as error:
        return error
    except BaseException:
        for each in tasks:
            ray.cancel(each)
        raise
    return None


def _check_complete(out: str, failures: list[Exception]) -> None:
    """Refuse a folder that lacks shards, with the reason of the first worker that failed."""
    known = [error for error in failures if isinstance(error, LopdError)]
    try:
        kind = read_manifest(out).kind
        if kind == "cache":
            TeacherCache.open(out, allow_incomplete=True).check_complete()
        else:
            RolloutStore.open(out, kind, allow_incomplete=True).check_complete()
    except LopdError as error:
        if known:
            raise known[0] from None
        if not failures:
            raise
        reason = (str(failures[0]).strip().splitlines() or [""])[-1]
        raise ShardError(
            f"{out}: unfinished, {len(failures)} workers failed ({type(failures[0]).__name__}: "
            f"{reason}); run it again to continue ({error})"
        ) from failures[0]
