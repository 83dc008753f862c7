"""Which of several processes this one is, and which shards it begins with.

Workers share a folder: each takes the shards whose number is its own modulo the count, then
any that nobody has finished or is at. What a shard holds does not depend on who writes it.
"""

import os
import re
from dataclasses import dataclass

from lopd.errors import ConfigError


@dataclass(frozen=True)
class Worker:
    """Worker `index` of `count`; `local_rank` is its number on its machine, None when alone."""

    index: int = 0
    count: int = 1
    local_rank: int | None = None

    @property
    def alone(self) -> bool:
        return self.count == 1

    def owns(self, shard: int) -> bool:
        return shard % self.count == self.index

    def order(self, shards: list[int]) -> list[int]:
        """Its own shards first, then those of the workers after it."""
        return sorted(shards, key=lambda shard: ((shard - self.index) % self.count, shard))

    def __str__(self) -> str:
        return f"worker {self.index}/{self.count}"


def this_worker(given: str | None) -> Worker:
    """The worker that `i/n` names or, without it, that torchrun's environment does.

    Raises:
        ConfigError: not `i/n` with 0 <= i < n, or torchrun variables that do not fit together.
    """
    where, found = "worker", given
    if given is None:
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
