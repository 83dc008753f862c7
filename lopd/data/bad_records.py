"""Bad records of an input: an error, or skipped and counted (`--skip_bad_records`)."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from lopd.errors import DataError

FLAG = "--skip_bad_records"
HELP = "Skip records that cannot be used: print and count them, and go on with the rest."
_SHOWN = 5


@dataclass
class BadRecords:
    """What happens to the records that a reader refuses.

    >>> bad = BadRecords(skip=True)
    >>> for line in ("1", "x", "3"):
    ...     with bad.guard():
    ...         if not line.isdigit():
    ...             raise DataError(f"found {line!r}; expected a number")
    >>> bad.count, bad.messages
    (1, ["found 'x'; expected a number"])
    """

    skip: bool
    count: int = 0
    messages: list[str] = field(default_factory=list)  # of the first few

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Handle one record: a DataError in the body is counted, or names the flag.

        Raises:
            DataError: the record is bad, and bad records are not skipped.
        """
        try:
            yield
        except DataError as error:
            if not self.skip:
                raise type(error)(f"{error}; or pass {FLAG}") from error
            self.count += 1
            if self.count <= _SHOWN:
                self.messages.append(str(error))

    def report(self) -> None:
        """Print what was skipped, if anything, on stderr."""
        if not self.count:
            return
        for message in self.messages:
            print(f"skipped: {message}", file=sys.stderr)
        more = f", of which the first {_SHOWN} are shown" if self.count > _SHOWN else ""
        print(f"skipped {self.count} bad records{more} ({FLAG})", file=sys.stderr)
