"""`HeldSignals`: Ctrl-C and SIGTERM wait for the end of a step, so that no update or file is left half done."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_HELD = (signal.SIGINT, signal.SIGTERM)


class HeldSignals:
    """Holds SIGINT and SIGTERM while its block runs and delivers the one received when the block is left.

    A second signal does not wait: it raises KeyboardInterrupt where it arrives. Outside the main thread, where Python
    handles no signals, and for a signal that the process ignores, nothing is changed.

    Attributes
    ----------
    received : int or None
        The signal that waits.

    Examples
    --------
    >>> try:
    ...     with HeldSignals() as held:
    ...         signal.raise_signal(signal.SIGINT)
    ...         print("this block ends first:", held.received == signal.SIGINT)
    ... except KeyboardInterrupt:
    ...     print("then it is interrupted")
    this block ends first: True
    then it is interrupted
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> HeldSignals:
        if threading.current_thread() is threading.main_thread():
            for number in _HELD:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: a handler that Python cannot restore
                    self._before[number] = signal.signal(number, self._hold)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.received is not None and error is None:
            signal.raise_signal(self.received)

    def _hold(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
