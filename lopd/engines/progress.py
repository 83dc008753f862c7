"""Progress of long work: a bar on a terminal, a line a minute where the bar is off."""

import logging
import time
from types import TracebackType

from tqdm import tqdm

LOG = logging.getLogger(__name__)
EVERY = 60.0  # seconds between lines


class Progress:
    """Counts what is finished, and shows it.

    Args:
        total: all that there is to do.
        initial: what was finished before; it does not count for the time that is left.
        unit, desc: names of one item and of the work.

    >>> with Progress(total=4, initial=1, unit="seq", desc="scoring") as progress:
    ...     progress.update(2)
    ...     progress.line(10.0)
    'scoring: 3/4 seq, 5 s left'
    """

    def __init__(self, *, total: int, initial: int = 0, unit: str, desc: str) -> None:
        self.total, self.initial, self.count = total, initial, initial
        self.unit, self.desc = unit, desc
        self.bar = tqdm(total=total, initial=initial, unit=unit, desc=desc)
        self.began = self.shown = time.monotonic()

    def update(self, count: int = 1) -> None:
        """Count what is done; without a terminal, log the time left now and then."""
        self.count += count
        self.bar.update(count)
        now = time.monotonic()
        if self.bar.disable and now - self.shown >= EVERY:
            self.shown = now
            LOG.info(self.line(now - self.began))

    def line(self, seconds: float) -> str:
        """What is finished `seconds` after the beginning, and the time that is left."""
        done = self.count - self.initial
        left = f", {duration(seconds / done * (self.total - self.count))} left" if done else ""
        return f"{self.desc}: {self.count}/{self.total} {self.unit}{left}"

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.close()


def duration(seconds: float) -> str:
    """A time in its largest units.

    >>> [duration(seconds) for seconds in (5, 100, 5400)]
    ['5 s', '2 min', '1 h 30 min']
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
