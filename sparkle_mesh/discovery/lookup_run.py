"""Carries a lookup out: asks whom :class:`.lookup.Lookup` names, when it says."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from sparkle_mesh.discovery.lookup import Lookup
from sparkle_mesh.errors import SparkleError
from sparkle_mesh.wire import PeerAddress

logger = logging.getLogger(__name__)


async def run_lookup(lookup: Lookup, ask: Callable[[PeerAddress], Awaitable[None]]) -> list[PeerAddress]:
    """Ask until ``lookup`` is over; return the closest that answered.

    Parameters
    ----------
    ask
        Asks one peer and tells ``lookup.answered``, or raises SparkleError: then it counts as failed.
    """
    progress = trio.Event()

    async def ask_one(peer: PeerAddress) -> None:
        try:
            await ask(peer)
        except SparkleError as error:
            logger.debug("in a lookup: %s", error)
            lookup.failed(peer.peer_id)
        progress.set()

    async with trio.open_nursery() as nursery:
        while not lookup.is_over(trio.current_time()):
            progress = trio.Event()
            for peer in lookup.due(trio.current_time()):
                nursery.start_soon(ask_one, peer)
            with trio.move_on_at(lookup.next_wakeup(trio.current_time())):
                await progress.wait()
        nursery.cancel_scope.cancel()
    return lookup.closest()
