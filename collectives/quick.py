"""Calls that the calling thread carries out itself, over shared memory, and hands to trio only where it must.

Handing every call to the thread in which trio runs, and waking up again, costs more than a small reduction. A
:class:`QuickCall` is the same operation, by the same code, on the same boards; it waits by blocking this thread. What
cannot be done here (losing a rank, calls that differ, a deadline, Ctrl-C) is finished in trio as for any other call,
from where it stands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparkle_mesh.clock import SYSTEM_CLOCK
from sparkle_mesh.collectives.board import OutOfTimeError
from sparkle_mesh.collectives.calls import Call
from sparkle_mesh.collectives.shared import Setback

if TYPE_CHECKING:
    from sparkle_mesh.collectives.group_threads import GroupThreads
    from sparkle_mesh.collectives.host_path import HostPath


@dataclass(slots=True)
class QuickCall:
    """One call: :meth:`run` it in the calling thread; whatever comes of that, but True, await :meth:`finish` in trio.

    Attributes
    ----------
    timeout_s
        In all.
    remake
        Returns the call for another view.
    """

    group: GroupThreads
    host: HostPath
    call: Call
    timeout_s: float
    remake: Callable[[], Call]
    _started_at: float = 0.0
    _entered: bool = False
    _setback: Setback | None = None
    _interrupted: bool = False

    def run(self) -> bool:
        """Carry it out; return whether it is done. Whatever it raises has interrupted it."""
        self._started_at = SYSTEM_CLOCK.now()
        try:
            self._entered = self.group.gate.try_to_enter()
            operation = self.group.start_quickly(self.call, self.host) if self._entered else None
            if operation is None:
                return False
            self.host.run_in_thread(operation, self.timeout_s)
            operation.finished.set()
            self.group.conclude(operation, self.call, SYSTEM_CLOCK.now() - self._started_at)
        except Setback as setback:
            self._setback = setback
            return False
        except OutOfTimeError:
            return False
        except BaseException:
            self._interrupted = True
            raise
        self._entered = False
        self.group.gate.leave()
        return True

    async def finish(self) -> None:
        """Do what :meth:`run` could not. Errors are those of any call."""
        left_s = max(self.timeout_s - (SYSTEM_CLOCK.now() - self._started_at), 0.0)
        operation = self.group.hosted if self._entered else None
        if operation is not None:
            try:
                await self.group.adopt(
                    operation,
                    self.call,
                    self.host,
                    timeout_s=self.timeout_s,
                    left_s=0.0 if self._interrupted else left_s,
                    setback=self._setback,
                    interrupted=self._interrupted,
                )
            finally:
                self.group.gate.leave()
            if not self._interrupted:
                await self.group.go_on(operation, self.call, left_s, self.remake)
            return
        if self._entered:
            self.group.gate.leave()
        if not self._interrupted:
            await self.group.perform(self.call, self.timeout_s, remake=self.remake)
