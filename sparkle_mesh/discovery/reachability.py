"""Whether others can dial this process: a machine without I/O that weighs what they say.

Nobody knows of itself whether it is behind a NAT or a firewall. Others tell where they see it come from, and whether
they could dial it there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sparkle_mesh import limits
from sparkle_mesh.fabric.interface import Address, PeerId
from sparkle_mesh.fabric.networks import ip_of, is_local_address


@dataclass(slots=True)
class _Report:
    """What one observer said last."""

    at: float
    seen_at: Address | None = None
    dialed: bool | None = None


class Reachability:
    """Collects reports.

    Parameters
    ----------
    forced
        What the owner says, which counts whatever others do; None to find out.
    """

    def __init__(self, forced: str | None = None) -> None:
        self._forced = forced
        self._listening: tuple[Address, ...] = ()
        self._mapped: Address | None = None
        self._reports: dict[PeerId, _Report] = {}

    def listens(self, addresses: Sequence[Address]) -> None:
        """This process listens on ``addresses``."""
        self._listening = tuple(addresses)

    def mapped(self, address: Address | None) -> None:
        """The router passes on what comes to ``address``, as it says; None if it does not."""
        self._mapped = address

    def seen(self, observer: PeerId, address: Address | None, now: float) -> None:
        """``observer`` sees this process come from ``address``, dialing from the port on which it listens."""
        self._report(observer, now).seen_at = address

    def dialed_back(self, observer: PeerId, reached: bool, now: float) -> None:
        """``observer`` could dial this process, or could not."""
        self._report(observer, now).dialed = reached

    def _report(self, observer: PeerId, now: float) -> _Report:
        self._forget(now)
        if observer not in self._reports and len(self._reports) >= limits.REACH_OBSERVERS_MAX_COUNT:
            del self._reports[min(self._reports, key=lambda peer: self._reports[peer].at)]
        report = self._reports.setdefault(observer, _Report(now))
        report.at = now
        return report

    def _forget(self, now: float) -> None:
        for peer_id in [p for p, report in self._reports.items() if now - report.at > limits.REACH_REPORT_MAX_AGE_S]:
            del self._reports[peer_id]

    def seen_at(self) -> tuple[Address, ...]:
        """Return where others see this process come from, what most of them say first: where to punch holes."""
        counts = Counter(report.seen_at for report in self._reports.values() if report.seen_at is not None)
        addresses = [address for address, _ in counts.most_common(limits.HOLE_PUNCH_ADDRESSES_MAX_COUNT)]
        own = [address for address in self._listening if not is_local_address(address)]
        return tuple(dict.fromkeys((*addresses, *own)))

    def candidates(self) -> tuple[Address, ...]:
        """Return the addresses at which others may be able to dial this process, to be tried by them."""
        found = dict.fromkeys(address for address in self._listening if not is_local_address(address))
        if self._mapped is not None:
            found[self._mapped] = None
        found.update(dict.fromkeys(self.seen_at()))
        return tuple(found)[: limits.ADDRESSES_PER_PEER_MAX_COUNT]

    def verdict(self) -> str:
        """Return ``"public"`` if others can dial this process, ``"private"`` if not, ``"unknown"`` before they tell."""
        if self._forced is not None:
            return self._forced
        answers = [report.dialed for report in self._reports.values() if report.dialed is not None]
        if answers:
            # One liar among several is not believed.
            return "public" if 2 * sum(answers) >= len(answers) else "private"
        # Nobody has tried. Who is seen at an address that it does not have is behind a NAT.
        own = {ip_of(address) for address in self._listening}
        seen = [ip_of(report.seen_at) for report in self._reports.values() if report.seen_at is not None]
        return "private" if seen and not any(ip in own for ip in seen) else "unknown"

    def advertised(self) -> tuple[Address, ...]:
        """Return where this process can be dialed beside the addresses on which it listens."""
        if self.verdict() != "public":
            return ()
        # What only a few say may be the address of somebody whom others are to be sent to.
        told = (self._mapped, *self.seen_at()[:1])
        return tuple(dict.fromkeys(a for a in told if a is not None and a not in self._listening))
