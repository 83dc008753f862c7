"""Worker identity and shard assignment.

Workers share a folder: each first takes the shards whose number equals its index modulo the
count, then any that no worker has finished or claimed. The contents of a shard do not depend on
the worker that writes it.
"""

import os
import re
from dataclasses import dataclass

from lopd.errors import ConfigError


@dataclass(frozen=True)
class Worker:
    """Worker `index` of `count`; `local_rank` is its number on its machine, if it has one."""

    index: int = 0
    count: int = 1
    local_rank: int | None = None

    @property
    def is_single(self) -> bool:
        """Whether there are no other workers."""
        return self.count == 1

    def owns(self, shard: int) -> bool:
        """Whether a shard is assigned to this worker."""
        return shard % self.count == self.index

    def order(self, shards: list[int]) -> list[int]:
        """The shards assigned to it first, then those of the following workers."""
        return sorted(shards, key=lambda shard: ((shard - self.index) % self.count, shard))

    def __str__(self) -> str:
        return f"worker {self.index}/{self.count}"


def this_worker(text: str | None) -> Worker:
    """The worker that `text`, `i/n`, names; None reads torchrun's environment.

    Raises:
        ConfigError: not `i/n` with 0 <= i < n, or inconsistent torchrun variables.
    """
    where, found = "worker", text
    if text is None:
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return Worker()
        where, found = "RANK/WORLD_SIZE", f"{os.environ['RANK']}/{os.environ['WORLD_SIZE']}"
    match = re.fullmatch(r"(\d+)/(\d+)", found or "")
    if match is None or int(match[1]) >= int(match[2]):
        raise ConfigError(f"{where}: found '{found}'; expected i/n with i from 0 to n - 1")
    local = os.environ.get("LOCAL_RANK")
    if local is not None and not local.isdigit():
        raise ConfigError(f"LOCAL_RANK: found '{local}'; expected a number from 0")
    return Worker(int(match[1]), int(match[2]), None if local is None else int(local))
