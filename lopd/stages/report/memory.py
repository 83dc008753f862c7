"""The memory that a run was planned to take, by part, from its settings and its cache."""

import logging
from dataclasses import dataclass, fields
from typing import Any

from lopd.config.training import MemoryOptions, MemorySettings
from lopd.errors import LopdError
from lopd.stages.report.facts import Run
from lopd.training.dry_run import meta_model
from lopd.training.memory import MemoryPlanner

LOG = logging.getLogger(__name__)
MEASURED = "peak_mib"  # of the log; a CPU's is not measured


@dataclass(frozen=True)
class Memory:
    """The plan of a run, and the peak that it logged."""

    planned: dict[str, int]  # bytes by part, and in total
    measured: float | None  # bytes


def memory_of(run: Run, longest: int, k: int) -> Memory | None:
    """The memory of a run on one device; None if it cannot be planned, with a message why.

    Args:
        longest: tokens of the longest sequence.
        k: tokens of a teacher's list.
    """
    values: dict[str, Any] = {
        item.name: run.settings[item.name]
        for item in fields(MemoryOptions)
        if item.name in run.settings
    }
    for name in ("objective", "dense_share", "tolerance"):
        if run.settings.get(name) is not None:
            values[name] = run.settings[name]
    try:
        settings = MemorySettings(sequence_length=longest, k=k, **values)
        planner = MemoryPlanner(meta_model(run.folder, settings.dtype, settings))
        estimate = planner.estimate(settings)
    except (LopdError, TypeError, ValueError) as error:  # settings of another version
        LOG.warning(f"{run.folder}: its memory cannot be planned ({error})")
        return None
    peaks = [value for _, value in run.curves.get(MEASURED, [])]
    planned = {**vars(estimate), "total": estimate.total}
    return Memory(planned, max(peaks) * 2**20 if peaks else None)
