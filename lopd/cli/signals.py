"""SIGINT and SIGTERM: they end a command in order, with a message, wherever they arrive."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lopd.errors import Interrupted

RESEND_S = 0.05


@contextmanager
def ending_in_order() -> Iterator[None]:
    """Let SIGTERM, which schedulers send, raise an exception as SIGINT does; neither gets lost.

    Python prints and drops what a handler raises inside a finalizer (`__del__`, or the callback of
    a weak reference). Such a signal is sent again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can handle signals
        return
    former_hook, resent = sys.unraisablehook, []

    def send_again(dropped: Any) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            former_hook(dropped)
            return
        signum = getattr(dropped.exc_value, "signum", signal.SIGINT)
        ident = threading.main_thread().ident
        resent.append(threading.Timer(RESEND_S, signal.pthread_kill, (ident, signum)))
        resent[-1].daemon = True
        resent[-1].start()

    former = signal.signal(signal.SIGTERM, _interrupt)
    sys.unraisablehook = send_again
    try:
        yield
    finally:
        for timer in resent:
            timer.cancel()
        sys.unraisablehook = former_hook
        signal.signal(signal.SIGTERM, former)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise Interrupted(signum)
