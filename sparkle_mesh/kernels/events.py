"""What ran where and for how long: a table to read, and a file for Chrome's trace viewer (or Perfetto)."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sparkle_mesh import limits


@dataclass(frozen=True, slots=True)
class Event:
    """Something that took time.

    Attributes
    ----------
    name
        The kernel's.
    category
        ``"kernel"``, or ``"part"`` of one that devices share.
    device
        As ``"cuda:0"``.
    started_s, seconds
        By the context's clock.
    details
        What else is to be known of it.
    """

    name: str
    category: str
    device: str
    started_s: float
    seconds: float
    details: dict[str, float | int | str] = field(default_factory=dict)


class Profile:
    """What ran while it was open; see :meth:`.context.Context.profile`.

    Attributes
    ----------
    events
        In the order in which they ended; the oldest are dropped beyond ``limits.PROFILE_EVENTS_MAX_COUNT``.
    """

    def __init__(self) -> None:
        self.events: deque[Event] = deque(maxlen=limits.PROFILE_EVENTS_MAX_COUNT)

    def save(self, path: Path | str) -> None:
        """Write a trace that ``chrome://tracing`` and ui.perfetto.dev show."""
        events = list(self.events)
        devices = sorted({event.device for event in events})
        rows: list[dict[str, object]] = [
            {"name": "thread_name", "ph": "M", "pid": 1, "tid": number, "args": {"name": device}}
            for number, device in enumerate(devices)
        ]
        rows += [
            {
                "name": event.name,
                "cat": event.category,
                "ph": "X",
                "pid": 1,
                "tid": devices.index(event.device),
                "ts": event.started_s * 1e6,
                "dur": event.seconds * 1e6,
                "args": event.details,
            }
            for event in events
        ]
        Path(path).write_text(json.dumps({"traceEvents": rows, "displayTimeUnit": "ms"}), encoding="utf-8")

    def table(self) -> str:
        """Return one line for each kernel on each device, what took longest in all first."""
        sums: dict[tuple[str, str, str], list[float]] = {}
        for event in list(self.events):
            sums.setdefault((event.name, event.category, event.device), []).append(event.seconds)
        lines = [f"{'what':32} {'':6} {'device':12} {'times':>7} {'in all, ms':>12} {'median, us':>12}"]
        for (name, category, device), times in sorted(sums.items(), key=lambda item: -sum(item[1])):
            median = sorted(times)[len(times) // 2]
            lines.append(
                f"{name[:32]:32} {category:6} {device:12} {len(times):7} {sum(times) * 1e3:12.3f} {median * 1e6:12.1f}"
            )
        return "\n".join(lines)

    __str__ = table


class Recorder:
    """Takes events for whoever has a profile open; for any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[Profile] = []

    @property
    def is_wanted(self) -> bool:
        """Whether anybody wants to know."""
        return bool(self._open)

    @contextmanager
    def profile(self) -> Iterator[Profile]:
        """Yield a profile that takes in what happens until the block ends."""
        profile = Profile()
        with self._lock:
            self._open.append(profile)
        try:
            yield profile
        finally:
            with self._lock:
                self._open.remove(profile)

    def add(self, event: Event) -> None:
        """Tell of something that has ended."""
        with self._lock:
            for profile in self._open:
                profile.events.append(event)
