"""Records that cannot be used: raised, or left out, counted and named (`--skip-bad-records`)."""

import logging
from dataclasses import dataclass, field

from lopd.errors import DataError

LOG = logging.getLogger(__name__)

_NAMED = 3  # records that are named when several are left out


@dataclass
class Skipped:
    """Records that are left out; raises their errors unless `allowed`."""

    source: str
    allowed: bool
    offered: bool = True  # whether the command has --skip-bad-records
    errors: list[DataError] = field(default_factory=list)
    kept: int = 0

    def handle(self, error: DataError) -> None:
        """Note a bad record, or raise its error if records may not be skipped."""
        if not self.allowed:
            remedy = (
                "; --skip-bad-records leaves such records out" if self.kept and self.offered else ""
            )
            raise DataError(f"{error}{remedy}") from error
        self.errors.append(error)

    def report(self) -> None:
        """Print how many records were left out, and the first of them."""
        if not self.errors:
            return
        named = "".join(f"\n  {error}" for error in self.errors[:_NAMED])
        more = f"\n  and {len(self.errors) - _NAMED} more" if len(self.errors) > _NAMED else ""
        total = len(self.errors) + self.kept
        LOG.warning(f"{self.source}: left out {len(self.errors)} of {total} records{named}{more}")
