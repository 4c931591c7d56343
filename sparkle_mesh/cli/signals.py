"""The signals that end a node, heard from before the imports until the end.

While Python still imports, a signal is only noted: there is nothing to clean up and nobody to clean it up.
In trio's run it wakes whoever awaits :meth:`StopSignals.wait`. After the first signal the second ends the
process at once, by the operating system's own hand.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class StopSignals:
    """Hears SIGINT, SIGTERM and SIGHUP (unless that is ignored, as under ``nohup``).

    Attributes
    ----------
    received
        The first signal that came, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._heard = tuple(
            number for number in STOPPING if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN
        )

    def listen(self) -> None:
        """Begin to hear; only the main thread may."""
        for number in self._heard:
            signal.signal(number, self._note)

    def release(self) -> None:
        """Give the signals back to the system; one that came already takes effect now."""
        for number in self._heard:
            signal.signal(number, signal.SIG_DFL)
        if self.received is not None:
            os.kill(os.getpid(), self.received)

    async def wait(self) -> signal.Signals:
        """Return the first signal, that came or comes."""
        import trio  # not before it is needed: see the module's text

        with trio.open_signal_receiver(*self._heard) as signals:
            while self.received is None:
                self.received = signal.Signals(await anext(signals))
        self._let_the_next_end_at_once()
        return self.received

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._let_the_next_end_at_once()

    def _let_the_next_end_at_once(self) -> None:
        for number in self._heard:
            signal.signal(number, signal.SIG_DFL)
