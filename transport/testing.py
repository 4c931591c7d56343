"""The conformance suite for links: what every kind of link must do, whatever carries its bytes.

``check_link`` runs it over pairs of connected links. It needs no test framework; a check that fails raises
AssertionError (or TooSlowError where a link hangs).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Final, TypeAlias

import trio

from sparkle_mesh.transport import link_checks
from sparkle_mesh.transport.link import Link
from sparkle_mesh.transport.link_checks import Check

__all__ = ["LINK_CHECKS", "Check", "MakePair", "check_link", "run_check"]

#: Makes two connected links and closes what is left of them afterwards.
MakePair: TypeAlias = Callable[[], AbstractAsyncContextManager[tuple[Link, Link]]]

_CHECK_TIMEOUT_S: Final = 30.0

LINK_CHECKS: Final[tuple[Check, ...]] = (
    link_checks.messages_arrive_in_order_both_ways,
    link_checks.payloads_of_any_size,
    link_checks.buffers_may_be_split_anyhow,
    link_checks.payloads_in_parts,
    link_checks.buffers_of_any_type,
    link_checks.a_payload_can_be_discarded,
    link_checks.senders_take_turns,
    link_checks.stats_count_what_passed,
    link_checks.misuse_is_told_and_harmless,
    link_checks.one_receiver_at_a_time,
    link_checks.a_clogged_peer_stops_the_sender,
    link_checks.closing_is_seen_at_both_ends,
    link_checks.a_sender_learns_of_the_end,
    link_checks.what_was_sent_arrives_though_sending_back_fails,
    link_checks.what_was_sent_before_the_end_arrives,
    link_checks.a_large_message_before_the_end_arrives,
    link_checks.closing_wakes_those_who_wait,
    link_checks.closing_wakes_a_clogged_sender,
    link_checks.closing_there_wakes_a_clogged_sender,
    link_checks.a_cancelled_wait_for_a_header_loses_nothing,
    link_checks.a_cancelled_send_closes,
    link_checks.a_cancelled_receive_closes,
    link_checks.busy_links_let_others_run,
)


async def check_link(make_pair: MakePair) -> None:
    """Run every check of :data:`LINK_CHECKS`, each over a new pair.

    Raises
    ------
    AssertionError, trio.TooSlowError
        With a note that names the check.
    """
    for check in LINK_CHECKS:
        await run_check(check, make_pair)


async def run_check(check: Check, make_pair: MakePair) -> None:
    """Run one check over a new pair."""
    try:
        with trio.fail_after(_CHECK_TIMEOUT_S):
            async with make_pair() as (one, other):
                await check(one, other)
    except BaseException as error:
        error.add_note(f"in the link check {check.__name__}")
        raise
