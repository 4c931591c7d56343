from __future__ import annotations

import pytest
import trio

from sparkle_mesh import limits
from sparkle_mesh.fabric.hubs import EventHub, FabricCounters, TopicHub, run_guarded
from sparkle_mesh.fabric.interface import PeerConnected, PeerDisconnected, Published


async def test_a_subscriber_that_is_too_far_behind_loses_its_channel(monkeypatch):
    monkeypatch.setattr(limits, "FABRIC_EVENTS_MAX_COUNT", 2)
    counters = FabricCounters()
    hub = EventHub(counters)
    async with hub.subscribe(lambda: [PeerConnected("a", None, True)]) as slow, hub.subscribe(list) as fast:
        for name in ("b", "c"):
            hub.emit(PeerDisconnected(name))
            assert await fast.receive() == PeerDisconnected(name)
        assert await slow.receive() == PeerConnected("a", None, True)
        assert await slow.receive() == PeerDisconnected("b")
        with pytest.raises(trio.EndOfChannel):
            await slow.receive()
    assert counters.event_subscribers_dropped == 1


async def test_a_subscriber_that_closed_its_end_is_forgotten():
    hub = EventHub(FabricCounters())
    topics = TopicHub(FabricCounters())
    async with hub.subscribe(list) as events, topics.subscribe("t") as messages:
        await events.aclose()
        await messages.aclose()
        hub.emit(PeerDisconnected("a"))
        topics.deliver("t", Published("a", b""))
        assert not hub._subscribers


async def test_a_slow_reader_of_a_topic_loses_the_newest(monkeypatch):
    monkeypatch.setattr(limits, "SUBSCRIPTION_MAX_COUNT", 2)
    counters = FabricCounters()
    hub = TopicHub(counters)
    hub.deliver("t", Published("a", b"nobody"))
    async with hub.subscribe("t") as slow:
        assert "t" in hub
        async with hub.subscribe("t") as fast:
            for data in (b"1", b"2", b"3"):
                hub.deliver("t", Published("a", data))
                assert (await fast.receive()).data == data
        assert "t" in hub
        assert [(await slow.receive()).data for _ in range(2)] == [b"1", b"2"]
        with pytest.raises(trio.WouldBlock):
            slow.receive_nowait()
    assert "t" not in hub
    assert counters.publications_dropped == 1


async def test_closing_ends_every_subscription():
    events, topics = EventHub(FabricCounters()), TopicHub(FabricCounters())
    async with events.subscribe(list) as event_channel, topics.subscribe("t") as topic_channel:
        events.close()
        topics.close()
        for channel in (event_channel, topic_channel):
            with pytest.raises(trio.EndOfChannel):
                await channel.receive()


async def test_a_cancelled_handler_is_aborted_and_not_a_failure():
    counters = FabricCounters()
    aborted = trio.Event()

    async def abort() -> None:
        await trio.lowlevel.checkpoint()
        aborted.set()

    with trio.CancelScope() as scope:
        scope.cancel()
        await run_guarded("it", trio.sleep_forever, abort, counters)
    assert aborted.is_set()
    assert counters.handler_failures == 0


async def test_an_abort_that_hangs_is_left(autojump_clock):
    async def fail() -> None:
        raise ValueError

    start = trio.current_time()
    await run_guarded("it", fail, trio.sleep_forever, FabricCounters())
    assert trio.current_time() - start == limits.CLOSE_TIMEOUT_S
