"""Measures the ways between ranks before the first collective, and makes of it what all ranks know alike.

Ranks send each other a little at full speed, each to one other at a time and from one other at a time, so that what
is measured is a line and not a share of one: to the next rank, to the one opposite, to the one before; they begin each
of these together. What each has received, and the latencies of its links, are then gathered by all.

Where ranks share memory nothing is measured: only processors limit them.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final

import numpy as np
import trio

from sparkle_mesh import limits
from sparkle_mesh.collectives.reduction import Array
from sparkle_mesh.collectives.topology import DEFAULT_LATENCY_S, Topology
from sparkle_mesh.errors import LinkClosedError, ProtocolError
from sparkle_mesh.transport.link import Link
from sparkle_mesh.transport.shared_memory import SharedMemoryLink

logger = logging.getLogger(__name__)

_READY: Final = b"ready"
_PROBE: Final = b"probe"
_LAST_PROBE: Final = b"last probe"


async def measure_lines(rank: int, size: int, links: Mapping[int, Link]) -> Array:
    """Measure how fast others can send to ``rank``.

    All ranks do this at the same time, before anything else is sent over ``links``. A link over which something else
    comes is closed: its other end does not measure. Cancelled, this closes links in the middle of what is sent.

    Returns
    -------
    array of float64, shape (2, size)
        Bytes per second from each rank, 0 where that was not measured; and the seconds to each, NaN likewise.
    """
    rates, latencies = measured = np.stack([np.zeros(size), np.full(size, np.nan)])
    # Before there is anything to wait behind.
    for other, link in links.items():
        if link.stats.latency_s is not None:
            latencies[other] = link.stats.latency_s
    for ahead in sorted({1, size // 2, size - 1} - {0}) if links else ():
        following, before = (rank + ahead) % size, (rank - ahead) % size
        await _meet(links)
        async with trio.open_nursery() as nursery:
            if not _shares_memory(links[following]):
                nursery.start_soon(_send_probes, links[following])
            if not _shares_memory(links[before]):
                async with _closed_if_unfit(links[before]):
                    rates[before] = await _receive_probes(links[before])
    return measured


def _shares_memory(link: Link) -> bool:
    return isinstance(link, SharedMemoryLink)


@asynccontextmanager
async def _closed_if_unfit(link: Link) -> AsyncIterator[None]:
    """Whoever uses next a link that has ended, or over which came what is no probe, learns of it."""
    try:
        yield
    except LinkClosedError:
        return
    except ProtocolError as error:
        logger.warning("closing the link to peer %s: %s", link.peer_id, error)
        await link.aclose()


async def _meet(links: Mapping[int, Link]) -> None:
    """Wait until all ranks are here; those whose links have ended are not waited for."""

    async def hear(link: Link) -> None:
        async with _closed_if_unfit(link):
            header, nbytes = await link.receive_header()
            if bytes(header) != _READY or nbytes:
                raise ProtocolError(f"{nbytes} bytes with header {bytes(header)[:16]!r} came before probes of lines")

    async with trio.open_nursery() as nursery:
        for link in links.values():
            nursery.start_soon(hear, link)
            with suppress(LinkClosedError):
                await link.send(_READY)


async def _send_probes(link: Link) -> None:
    payload = bytes(limits.CALIBRATION_MESSAGE_BYTES)
    # TCP finds out what a line carries in so many round trips.
    seconds = 2 * (link.stats.latency_s or 0.0) * limits.CALIBRATION_ROUND_TRIPS_COUNT
    try:
        # Cancelled within a message, a link would be closed: time is looked at between them.
        until = trio.current_time() + min(max(seconds, limits.CALIBRATION_LINE_S), limits.CALIBRATION_LINE_MAX_S)
        for _ in range(limits.CALIBRATION_LINE_MAX_BYTES // limits.CALIBRATION_MESSAGE_BYTES):
            await link.send(_PROBE, (payload,))
            if trio.current_time() >= until:
                break
        await link.send(_LAST_PROBE)
    except LinkClosedError:
        return


async def _receive_probes(link: Link) -> float:
    """Return the greatest rate at which half of the probes came in, one after the other.

    Raises
    ------
    LinkClosedError, ProtocolError
    """
    scratch = np.empty(limits.CALIBRATION_MESSAGE_BYTES, np.uint8)
    times: list[float] = []
    while True:
        header, nbytes = await link.receive_header()
        if bytes(header) == _LAST_PROBE and not nbytes:
            break
        if bytes(header) != _PROBE or nbytes != scratch.nbytes or len(times) > _most_probes():
            raise ProtocolError(f"{nbytes} bytes with header {bytes(header)[:16]!r} came where probes of lines belong")
        await link.receive_into((scratch,))
        times.append(trio.current_time())
    # Neither while TCP is still finding out, nor while it waits for something that was lost.
    span = max(len(times) // 2, 1)
    gaps = [later - earlier for earlier, later in zip(times, times[span:], strict=False)]
    return span * scratch.nbytes / max(min(gaps), 1e-9) if gaps else 0.0


def _most_probes() -> int:
    return limits.CALIBRATION_LINE_MAX_BYTES // limits.CALIBRATION_MESSAGE_BYTES


def describe_ways(measured: Array, host: bytes) -> Array:
    """Return what a rank tells the others: a row of float64 for :func:`make_topology`, of ``2 + 2 * size``."""
    # 48 bits fit into a float's precision.
    numbers = [float(int.from_bytes(host[at : at + 6], "big")) for at in (0, 6)]
    return np.concatenate([numbers, *measured])


def make_topology(rows: Array) -> Topology:
    """Return what follows from the rows of all ranks, whatever numbers are in them; the same from the same rows."""
    size = len(rows)
    ids = [tuple(row[:2].tolist()) for row in rows]
    hosts = tuple(ids.index(one) for one in ids)
    rates = _within(rows[:, 2 : 2 + size], 0.0, limits.TOPOLOGY_LINE_MAX_BYTES_PER_S, 0.0)
    # Ranks of one host have one line; of whom nothing is known is taken to be as good as any.
    line_of = {host: _line(rates, hosts, host) for host in set(hosts)}
    shared = [line_of[host] for host in hosts]
    usual = max(shared) or limits.TOPOLOGY_LINE_MAX_BYTES_PER_S
    latencies = _within(rows[:, 2 + size :], 0.0, limits.TOPOLOGY_LATENCY_MAX_S, DEFAULT_LATENCY_S)
    both = np.maximum(latencies, latencies.T)
    if 2 * both.max(initial=0.0) >= limits.LINK_NEAR_ROUND_TRIP_S and rates.any():
        # Over a long way so short a measurement says too little of one line to make others wait for it, or not.
        shared = [float(np.median(rates[rates > 0]))] * size
    return Topology(
        size,
        hosts,
        tuple(max(line or usual, limits.TOPOLOGY_LINE_MIN_BYTES_PER_S) for line in shared),
        tuple(tuple(row) for row in both.tolist()),
    )


def _line(rates: Array, hosts: Sequence[int], host: int) -> float:
    """What the ranks of a host can both send to other hosts and receive, at the same time; within a host all, if alone.

    What was sent to the same rank ahead was sent together: the rates of those add up.
    """
    size = len(hosts)
    alone = len(set(hosts)) == 1
    out, into = [0.0] * size, [0.0] * size
    for receiver in range(size):
        for sender in range(size):
            ahead = (receiver - sender) % size
            if alone:
                out[ahead] = max(out[ahead], float(rates[receiver, sender]))
            elif hosts[sender] != hosts[receiver]:
                out[ahead] += float(rates[receiver, sender]) if hosts[sender] == host else 0.0
                into[ahead] += float(rates[receiver, sender]) if hosts[receiver] == host else 0.0
    most_out, most_into = max(out), max(into)
    line = min(most_out, most_into) if most_out and most_into else max(most_out, most_into)
    return min(line, limits.TOPOLOGY_LINE_MAX_BYTES_PER_S)


def _within(numbers: Array, low: float, high: float, instead: float) -> Array:
    """``numbers`` between the bounds, and ``instead`` for what is none."""
    bounded: Array = np.clip(np.nan_to_num(numbers, nan=instead, posinf=high, neginf=low), low, high)
    return bounded
