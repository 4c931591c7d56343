"""Publish and subscribe over py-libp2p's GossipSub, bounded and without a thread of its own."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakKeyDictionary

import trio
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.pubsub.rpc_queue import RpcQueue

from sparkle_mesh import limits
from sparkle_mesh.errors import UsageError
from sparkle_mesh.fabric.guards import GuardedHost, GuardedTasks
from sparkle_mesh.fabric.hubs import FabricCounters, TopicHub
from sparkle_mesh.fabric.interface import Accepts, Published

PROTOCOLS = (TProtocol("/meshsub/1.1.0"), TProtocol("/meshsub/1.0.0"))


class _SeenMessages:
    """Ids of the messages seen last. py-libp2p's own has no bound and sweeps in a thread."""

    def __init__(self) -> None:
        self._ids: OrderedDict[bytes, None] = OrderedDict()

    def has(self, message_id: bytes) -> bool:
        return message_id in self._ids

    def add(self, message_id: bytes) -> bool:
        is_new = message_id not in self._ids
        self._ids[message_id] = None
        if len(self._ids) > limits.GOSSIP_SEEN_MAX_COUNT:
            self._ids.popitem(last=False)
        return is_new


class _BoundedPubsub(Pubsub):
    """Delivers straight to subscribers' bounded channels; drops what is over the bounds before anything else.

    The original writes to a peer's stream from several tasks at once, which mixes messages that take more than
    one frame, and goes on using a stream on which a message was cut short.
    """

    def __init__(self, host: GuardedHost, router: GossipSub, topics: TopicHub, counters: FabricCounters) -> None:
        self._topics = topics
        self._counters = counters
        self._writing: WeakKeyDictionary[INetStream, trio.Lock] = WeakKeyDictionary()
        super().__init__(
            host,
            router,
            strict_signing=True,
            max_inbound_rpc_size=limits.GOSSIP_RPC_MAX_BYTES,
            max_subscriptions_per_rpc=limits.GOSSIP_TOPICS_PER_PEER_MAX_COUNT,
            max_subscriptions_per_peer=limits.GOSSIP_TOPICS_PER_PEER_MAX_COUNT,
        )
        self.seen_messages.stop()
        vars(self)["seen_messages"] = _SeenMessages()

    def _is_subscribed_to_msg(self, msg: rpc_pb2.Message) -> bool:
        if len(msg.topicIDs) != 1 or len(msg.data) > limits.GOSSIP_MESSAGE_MAX_BYTES:
            self._counters.publications_malformed += 1
            return False
        # Before it is looked at any further: what is not accepted is not worth a check of its signature.
        return self._topics.takes(msg.topicIDs[0], ID(msg.from_id).to_base58(), bytes(msg.data))

    async def handle_sending_messages(self, peer_id: ID, stream: INetStream, queue: RpcQueue) -> None:
        # The original's 32 places are fewer than one burst.
        queue._queue.max_size = limits.GOSSIP_OUTBOX_MAX_COUNT
        await super().handle_sending_messages(peer_id, stream, queue)

    async def write_msg(self, stream: INetStream, rpc_msg: rpc_pb2.RPC) -> bool:
        async with self._writing.setdefault(stream, trio.Lock()):
            written = await super().write_msg(stream, rpc_msg)
            if not written:
                await stream.reset()
            return written

    def notify_subscriptions(self, publish_message: rpc_pb2.Message) -> None:
        publisher = ID(publish_message.from_id)
        if publisher != self.my_id:
            published = Published(publisher.to_base58(), bytes(publish_message.data))
            self._topics.deliver(publish_message.topicIDs[0], published)


class Gossip:
    """The topics of one host. Constructing it makes the host speak GossipSub; :meth:`start` makes it gossip."""

    def __init__(self, host: GuardedHost, counters: FabricCounters) -> None:
        self._topics = TopicHub(counters)
        self._router = GossipSub(
            PROTOCOLS,
            degree=5,
            degree_low=4,
            degree_high=8,
            heartbeat_interval=1,
            # The defaults drop ordinary use: ten messages a second, and any mesh whose peers share an address.
            max_messages_per_topic_per_second=limits.GOSSIP_MESSAGES_PER_S_MAX,
            eclipse_protection_enabled=False,
            # It changes the interval of heartbeats and the degree by guesses about the network's health.
            adaptive_gossip_enabled=False,
        )
        self._pubsub = _BoundedPubsub(host, self._router, self._topics, counters)
        # Readers of a topic here: the first joins it, the last leaves it.
        self._readers: Counter[str] = Counter()
        self._joining = trio.Lock()

    def start(self, tasks: GuardedTasks) -> None:
        for service in (self._pubsub, self._router):
            vars(service)["_manager"] = tasks
            tasks.run_task(service.run)

    async def publish(self, topic: str, data: bytes) -> None:
        if len(data) > limits.GOSSIP_MESSAGE_MAX_BYTES:
            raise UsageError(f"a publication takes {len(data)} bytes; at most {limits.GOSSIP_MESSAGE_MAX_BYTES} may be")
        await self._pubsub.publish(topic, data)

    @asynccontextmanager
    async def subscribe(
        self, topic: str, accepts: Accepts | None = None
    ) -> AsyncIterator[trio.MemoryReceiveChannel[Published]]:
        async with self._topics.subscribe(topic, accepts) as messages:
            self._readers[topic] += 1
            try:
                async with self._joining:
                    await self._pubsub.subscribe(topic)
                yield messages
            finally:
                self._readers[topic] -= 1
                with trio.move_on_after(limits.CLOSE_TIMEOUT_S) as scope:
                    scope.shield = True
                    async with self._joining:
                        if not self._readers[topic]:
                            del self._readers[topic]
                            await self._pubsub.unsubscribe(topic)

    def close(self) -> None:
        """End every subscription."""
        self._topics.close()
