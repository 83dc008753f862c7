"""SIGINT and SIGTERM in training: the first stops after the step, the second at once.

A signal that arrives in an evaluation of held-out sequences stops after it, without another step.
"""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from transformers import TrainerCallback

from lopd.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals(TrainerCallback):
    """Saves a checkpoint and stops training at the end of the step in which a signal arrives.

    A context manager: within it, the two signals have this meaning. Signals can be handled in the
    main thread only; in others it does nothing.

    Args:
        gather: as in `MetricsAccumulator`; the processes stop together if one has a signal.
    """

    def __init__(self, gather: Callable[[Any], list[Any]]) -> None:
        self._gather = gather
        self._former: dict[int, Any] = {}
        self.received = 0  # number of the signal in this process; 0 for none
        self.agreed = 0  # number of the signal that stops all processes

    def __enter__(self) -> "StopSignals":
        self.received = self.agreed = 0
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received:
            raise Interrupted(
                signum,
                "stopped at once; the last checkpoint is kept, if one was saved: rerun the same "
                "command to continue from it",
            )
        self.received = signum
        name = signal.Signals(signum).name
        # Not print: the signal may arrive while the same stream is being written.
        text = f"\n{name}: saving a checkpoint after this step; a second signal stops at once\n"
        os.write(2, text.encode())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop once any process has received a signal."""
        if self.agree():
            control.should_save = control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As after a step, unless no step was made."""
        if state.global_step:
            self.on_step_end(args, state, control)

    def agree(self) -> int:
        """The number of the signal that stops all processes, 0 for none; all must call this."""
        self.agreed = self.agreed or max(self._gather(self.received))
        return self.agreed
