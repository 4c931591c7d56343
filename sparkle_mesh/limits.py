"""Every bound Sparkle keeps, with its unit in its name. Relations between bounds are asserted at the end."""

from __future__ import annotations

KIB = 1024
MIB = 1024 * KIB

# --- Wire: control messages ----------------------------------------------------------------------
CONTROL_MESSAGE_MAX_BYTES = 256 * KIB
NAME_MAX_CHARS = 255
ADDRESS_MAX_CHARS = 256
ADDRESSES_PER_PEER_MAX_COUNT = 16
PEER_ID_MAX_CHARS = 128
REASON_MAX_CHARS = 1024

# --- Fabric --------------------------------------------------------------------------------------
DEFAULT_PORT = 45654
DIAL_TIMEOUT_S = 10.0
OPEN_STREAM_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 5.0
IDENTITY_FILE_MAX_BYTES = 1 * KIB
FABRIC_EVENTS_MAX_COUNT = 4096
STREAM_READ_MAX_BYTES = 64 * KIB
SUBSCRIPTION_MAX_COUNT = 256
GOSSIP_MESSAGE_MAX_BYTES = 256 * KIB
GOSSIP_SEEN_MAX_COUNT = 16384
MEMORY_STREAM_BUFFER_MAX_BYTES = 256 * KIB
CONNECTIONS_MAX_COUNT = 1024
# Two that dial each other at once have two; more are for those that are lost and not yet noticed to be.
CONNECTIONS_PER_PEER_MAX_COUNT = 4
INBOUND_STREAMS_PER_CONNECTION_MAX_COUNT = 512
DIALS_AT_ONCE_MAX_COUNT = 32
# How long one address is tried before the next one is tried beside it.
DIAL_STAGGER_S = 0.25
# How long an address that was connected to has for its handshakes before the next address is tried as well.
DIAL_HANDSHAKE_PATIENCE_S = 2.0
DNS_RESULTS_MAX_COUNT = 8
# Accepted sockets that have not shown yet who they are; the oldest makes way for one more.
UNPROVEN_SOCKETS_MAX_COUNT = 128
UPGRADE_TIMEOUT_S = 5.0
LISTEN_BACKLOG_COUNT = 512
RAW_MAGIC_MAX_BYTES = 16
FRAME_WRITE_TIMEOUT_S = 30.0
# What one connection may have sent and nobody here has read, over all its streams.
UNREAD_BYTES_PER_CONNECTION_MAX = 32 * MIB
SOCKET_KEEPALIVE_IDLE_S = 15
# Of connections of the control plane, on which peers ping each other.
CONTROL_KEEPALIVE_IDLE_S = 40
SOCKET_KEEPALIVE_INTERVAL_S = 5
SOCKET_KEEPALIVE_PROBES_COUNT = 4
SOCKET_UNACKNOWLEDGED_TIMEOUT_S = 30
INTERFACE_ADDRESSES_CACHE_S = 5.0
# The headroom over a publication of a gossip message's topic, signature and the peer's own record.
GOSSIP_RPC_MAX_BYTES = 2 * GOSSIP_MESSAGE_MAX_BYTES
GOSSIP_TOPICS_PER_PEER_MAX_COUNT = 128
GOSSIP_MESSAGES_PER_S_MAX = 1000.0
GOSSIP_OUTBOX_MAX_COUNT = 128
# A message of libp2p's own protocols.
PROTOBUF_MESSAGE_MAX_BYTES = 64 * KIB
VARINT_MAX_BYTES = 9
PROTOBUF_ANSWER_TIMEOUT_S = 5.0

# --- Reaching peers behind NATs --------------------------------------------------------------------
# A circuit that carries less is used for nothing but to agree on a direct connection.
RELAY_USEFUL_MIN_BYTES = 64 * MIB
# What a node lends as a relay unless its owner says otherwise.
RELAY_RESERVATIONS_MAX_COUNT = 128
RELAY_RESERVATIONS_PER_NETWORK_MAX_COUNT = 32
RELAY_CIRCUITS_MAX_COUNT = 128
RELAY_CIRCUITS_PER_PEER_MAX_COUNT = 32
RELAY_CIRCUIT_MAX_S = 24 * 3600.0
RELAY_CIRCUIT_MAX_BYTES = 256 * 1024 * MIB
RELAY_BYTES_PER_S = 8e6
RELAY_RESERVATION_S = 3600.0
# A reservation is renewed when this part of its time is over, and never more often than the second says.
RELAY_RENEW_RATIO = 0.5
RELAY_RENEW_MIN_S = 60.0
RELAY_ANSWER_TIMEOUT_S = 8.0
# Of a connection through a relay: how often, for how long, and where both ends try to make it a direct one.
HOLE_PUNCH_ATTEMPTS_COUNT = 2
HOLE_PUNCH_REVERSAL_S = 1.0
HOLE_PUNCH_DIAL_S = 2.0
HOLE_PUNCH_TIMEOUT_S = 9.0
HOLE_PUNCH_ADDRESSES_MAX_COUNT = 8
IDENTIFY_PROTOCOLS_MAX_COUNT = 256
# Dials for others who want to know whether they can be dialed.
DIAL_BACK_TIMEOUT_S = 15.0
DIAL_BACKS_AT_ONCE_MAX_COUNT = 8
DIAL_BACK_ADDRESSES_MAX_COUNT = 2
DIAL_BACK_INTERVAL_S = 5.0

# --- Links ---------------------------------------------------------------------------------------
RECORD_MAX_BYTES = 1 * MIB
RECORD_TAG_MAX_BYTES = 32
# Payload buffers smaller than this are gathered into common records.
LINK_GATHER_MAX_BYTES = 64 * KIB
# Beyond this, waiting for the whole rest of a record costs less than being woken for parts of it.
LINK_LOW_WATER_MIN_BYTES = 64 * KIB
REKEY_INTERVAL_RECORDS = 2**16
LINK_HEADER_MAX_BYTES = 16 * KIB
LINK_PAYLOAD_MAX_BYTES = 2**40
LINK_HANDSHAKE_TIMEOUT_S = 10.0
LINK_HANDSHAKE_MAX_BYTES = 16 * KIB
LINK_CIPHERS_MAX_COUNT = 8
LINK_STREAMS_MAX_COUNT = 16
LINK_KINDS_MAX_COUNT = 8
# Up to this round trip a link has one stream: the host, the room or the campus.
LINK_NEAR_ROUND_TRIP_S = 2e-3
# A link over a longer way has so many streams that together they carry this rate though one packet in a thousand is
# lost, by Mathis's formula: a stream then has 1460 bytes * 1.22 / sqrt(0.001) in flight, whatever the round trip.
LINK_LOSSY_RATE_BYTES_PER_S = 8e6
LINK_LOSSY_STREAM_BYTES = 56_000
# Streams for large payloads where they do not slow down for a loss (BBR): more compete with each other.
LINK_STREAMS_BBR_COUNT = 1
# In this time what was measured of a link's bandwidth fades to a third of what is shown.
LINK_BANDWIDTH_SMOOTHING_S = 2.0
# How payloads are cut where a link has several streams: small enough that a message is soon spread over all of them
# and that a slow stream holds up little; large enough that the work per record does not count.
LINK_STRIPE_BYTES = 64 * KIB
# What the kernel takes for one of several streams ahead of what its congestion window lets out. More would be bound to
# a stream that may have stalled by the time. Less would not last until the sender's next turn on a busy machine: with
# 128 KiB, 16 MiB over 4 hosts at 100 Mbit/s took 5 s on two cores with a load of 8, with 1 MiB 2.7 s.
LINK_STREAM_UNSENT_MAX_BYTES = 1 * MIB
# Links agreed on whose data streams have not come yet.
LINK_PENDING_MAX_COUNT = 2048
LINK_PENDING_PER_PEER_MAX_COUNT = 4
# Offers of a peer that wait until this process wants the link too; the newest counts.
LINK_OFFERS_WAITING_MAX_COUNT = 2048
LINK_OFFER_WAIT_S = 600.0
# Connecting to all addresses of a peer, each tried a little after the one before; a host that drops packets must not
# use up the time of the others.
LINK_DIAL_TIMEOUT_S = 3.0
# Who was connected to is there, and may be busy.
LINK_WELCOME_TIMEOUT_S = 6.0
LINK_RETRY_S = 0.2
# How long closing waits for the peer to take what was sent.
LINK_LINGER_S = 1.0
# A payload up to this size travels in the same record as its header; copying it costs less than a second record.
LINK_INLINE_PAYLOAD_MAX_BYTES = 16 * KIB
# What is received ahead of what is asked for, so that small messages cost one system call for many.
LINK_READ_AHEAD_BYTES = 64 * KIB
# What a link moves without waiting before it lets other tasks run; an operation counts as so many bytes at least.
LINK_TURN_BYTES = 8 * MIB
LINK_TURN_OPERATION_BYTES = 128 * KIB
MEMORY_LINK_CAPACITY_BYTES = 1 * MIB
# Of a stream of the control plane that carries data: what one round trip can carry, and what a message of membership
# may have to wait behind, on a slow line for so many bytes' time.
LINK_STREAM_WINDOW_BYTES = 1 * MIB
LINK_STREAM_READ_MAX_BYTES = 256 * KIB
# How long after a link began to go over the control plane a direct connection is tried for it; each later pause is
# twice as long, up to the second.
LINK_UPGRADE_PAUSE_MIN_S = 1.0
LINK_UPGRADE_PAUSE_MAX_S = 300.0
SENDMSG_BUFFERS_MAX_COUNT = 64
# Addresses, not memory: pages of an arena are there once they are touched.
ARENA_MAX_BYTES = 2**40
ARENA_BOARD_BYTES = 8 * KIB

# --- Membership ----------------------------------------------------------------------------------
MESH_MEMBERS_MAX_COUNT = 1024
JOIN_TIMEOUT_S = 60.0
MESH_CLOSE_TIMEOUT_S = 15.0
# How often a thread that waits for the mesh looks for a Ctrl-C that came the moment before it began to wait.
SIGNAL_LOOK_INTERVAL_S = 0.25
MESH_PROOF_TIMEOUT_S = 10.0
# Connected peers that have not proven yet that they are of the mesh, in all and of one address: the oldest makes way
# for one more. And how long they may stay.
STRANGERS_MAX_COUNT = 160
STRANGERS_PER_ADDRESS_MAX_COUNT = 96
STRANGER_STAY_MAX_S = 20.0
# Of one peer, on which it has not proven anything yet.
MESH_STREAMS_PER_STRANGER_MAX_COUNT = 4
INVITE_ADDRESSES_MAX_COUNT = 16
KEY_FILE_MAX_BYTES = 4 * KIB
# What says that a training process is of a machine; it holds two peer ids, and is believed for so long from when it
# first came. Its owner makes another when half of that is over.
CERTIFICATE_MAX_BYTES = 512
CERTIFICATE_LIFETIME_S = 7 * 86400
CERTIFICATE_LIFETIME_MAX_S = 30 * 86400
CERTIFICATES_REMEMBERED_MAX_COUNT = 4096
# A list of revoked peers travels in every introduction.
REVOKED_PEERS_MAX_COUNT = 256
REVOCATIONS_MAX_BYTES = 36 * KIB
# How often the founder tells it once more, for those whom the news has not reached.
REVOCATIONS_RENEW_S = 60.0
REVOCATION_FILE_MAX_BYTES = 40 * KIB
# Tries to open a mesh stream, and the pause after the first; each later one is twice as long.
MESH_STREAM_ATTEMPTS_COUNT = 4
MESH_STREAM_RETRY_S = 0.25
# How long candidates must stay the same before a first view is proposed; how much longer the next-lowest waits.
VIEW_SETTLE_S = 0.3
# The same for one that was a member before: there is a mesh, most likely, that it has to find first.
REJOIN_SETTLE_S = 3.0
PROPOSER_STAGGER_S = 2.0
PROPOSAL_TIMEOUT_S = 5.0
PROPOSAL_RETRY_S = 0.2
# The same for a view that follows one: it is waited for by everybody who reduces.
VIEW_CHANGE_SETTLE_S = 0.05
VIEW_CHANGE_STAGGER_S = 0.5
VIEW_CHANGE_TIMEOUT_S = 1.5
VIEW_CHANGE_TIMEOUT_MAX_S = 24.0
VIEW_CHANGE_RETRY_S = 0.1
# When a newcomer that the last view has left out is a reason for another.
JOINER_RETRY_S = 1.0
# How long so few members may be left that they cannot decide, until that is told.
QUORUM_MISSING_S = 5.0
# Of the last views with their outcomes, for members that missed them.
VIEWS_REMEMBERED_MAX_COUNT = 8
# Lives of processes that are believed to be over.
MEMBERS_SUSPECTED_MAX_COUNT = 4 * MESH_MEMBERS_MAX_COUNT
PING_INTERVAL_S = 2.0
# Nobody waits for a node.
NODE_PING_INTERVAL_S = 30.0
NODE_SILENCE_TIMEOUT_S = 120.0
NODE_LOOK_INTERVAL_S = 5.0
# Of a larger mesh only so many are asked at a time, so that the load of a process does not grow with it.
PINGS_AT_ONCE_MAX_COUNT = 32
# A member that compiles may hold the interpreter for long; it may be silent for longer, up to the ceiling, if it was.
SUSPICION_FLOOR_S = 12.0
SUSPICION_CEILING_S = 30.0
# The least that a user may set as the ceiling.
SUSPICION_CEILING_MIN_S = 1.0
SUSPICION_LOOK_INTERVAL_S = 0.5
SILENCES_REMEMBERED_MAX_COUNT = 32
# When a connection is dropped on which nothing comes.
SILENCE_TIMEOUT_S = 60.0
# How long a member whose one connection has ended has to show that it is there, by its data link or another one.
RECONNECT_GRACE_S = 2.0
# How long a member has to answer when its data link has ended.
LINK_PROBE_S = 2.0
# How long a member that leaves waits until the others have a view without it.
LEAVE_TIMEOUT_S = 3.0
# How long the members of a view have to connect to each other.
VIEW_ENTRY_TIMEOUT_S = 15.0
VIEW_CHANGES_MAX_COUNT = 1024
# How long synchronising members wait for a view with newcomers, and leave it after that came to nothing.
ADMISSION_TIMEOUT_S = 3.0
ADMISSION_PAUSE_S = 10.0
# What is verified and sent at a time of a training state.
STATE_CHUNK_BYTES = 4 * MIB
STATE_ATTEMPTS_MAX_COUNT = 3
# News of a peer that was met: the pause in which another may tell it first; how often one looks for own news.
PRESENCE_SETTLE_S = 0.5
PRESENCE_LOOK_S = 10.0
MESH_PEERS_MAX_COUNT = 2048
# How many of them one public network may bring into a mesh without a key; what counts as one.
MESH_PEERS_PER_NETWORK_MAX_COUNT = 64
NETWORK_IPV4_PREFIX_BITS = 24
NETWORK_IPV6_PREFIX_BITS = 48
# Who breaks the protocol so often in so long is banned, each time for twice as long.
OFFENCES_MAX_COUNT = 3
OFFENCES_REMEMBERED_S = 600.0
BAN_MIN_S = 600.0
BAN_MAX_S = 86400.0
BANS_MAX_COUNT = 4096
MESH_OUTBOX_MAX_COUNT = 4096
PEER_EXCHANGE_MAX_COUNT = 64
PEER_EXCHANGE_SAMPLE_COUNT = 20
# Whoever is let go is told of others anew if it was told longer ago.
PEER_EXCHANGE_STALE_S = 300.0
# How soon trainers look for others in the DHT; then after twice as long each time.
TRAINERS_LOOK_MIN_S = 2.0
TRAINERS_LOOK_MAX_S = 120.0
LINK_METRICS_MAX_COUNT = 4096
OPERATIONS_PER_PROMISE_MAX_COUNT = 2048
# Of these, such as have begun in the epoch; others have ended with an earlier one, and are named for who comes later.
OPERATIONS_OPEN_MAX_COUNT = 1536
VIEWS_ELSEWHERE_MAX_COUNT = 64
# How often a mesh asks another of its name which of them goes on.
MEETING_INTERVAL_S = 1.0
# Of peers that are known, with which to begin when a process joins again.
REJOIN_ADDRESSES_MAX_COUNT = 64
MACHINE_HISTORY_MAX_COUNT = 256
NODE_EVENTS_MAX_COUNT = 1024

# --- Capability records ---------------------------------------------------------------------------
# A record stays at its holders for so long after they last heard of its publisher: of a dead node it is gone within a
# minute. Whoever was not heard by a holder for long tells it so.
CAPABILITY_LIFETIME_S = 52.0
CAPABILITY_LIFETIME_MAX_S = 600.0
CAPABILITY_UNHEARD_S = 40.0
# How often it is renewed in so many words, and for how long it is held without that; how often that is looked at.
CAPABILITY_RENEW_S = 300.0
CAPABILITY_UNRENEWED_MAX_S = 800.0
CAPABILITY_LOOK_S = 4.0
CAPABILITY_TIDY_S = 20.0
# How often its holders are looked for anew, beside whenever one comes that is closer to its keys: after the first
# pause, then after twice as long, up to the second.
CAPABILITY_REPUBLISH_MIN_S = 60.0
CAPABILITY_REPUBLISH_S = 1200.0
# When newcomers come, once for all of them.
CAPABILITY_SETTLE_S = 0.5
CAPABILITY_HOLDERS_COUNT = 8
CAPABILITY_RECORD_MAX_BYTES = 8 * KIB
CAPABILITY_KEYS_MAX_COUNT = 66
DEVICES_PER_RECORD_MAX_COUNT = 32
DEVICE_DTYPES_MAX_COUNT = 32
# What one process holds of others, whoever asks it to.
# Their publishers stay connected, which takes some 9 bytes a second each, sent and received together.
# Much lower bounds drive records so deep that a search in a mesh of 200 does not end in time.
CAPABILITIES_HELD_MAX_COUNT = 256
CAPABILITIES_HELD_MAX_BYTES = 4 * MIB
# Under one key; what comes later is stored under keys below it. That there is some of it is remembered for so long.
CAPABILITIES_PER_KEY_MAX_COUNT = 48
CAPABILITY_OVERFLOW_S = 3600.0
# How often what is under one key may be divided in two.
CAPABILITY_DEPTH_MAX_COUNT = 12
# Keys looked at in one search, those below others included.
SEARCH_KEYS_MAX_COUNT = 512
CAPABILITIES_PER_ADDRESS_MAX_COUNT = 256
# Questions and answers of the mesh's own DHT.
KAD_MESSAGE_MAX_BYTES = 256 * KIB
# A message as it is sealed, and framed.
KAD_FRAME_MAX_BYTES = KAD_MESSAGE_MAX_BYTES + 64
KAD_ANSWER_RECORDS_MAX_BYTES = 192 * KIB
KAD_ANSWER_RECORDS_MAX_COUNT = 512
KAD_QUESTION_TIMEOUT_S = 1.5
KAD_STREAM_IDLE_S = 60.0
KAD_STREAMS_PER_PEER_MAX_COUNT = 4
# Of one peer, before its questions are answered later.
KAD_QUESTIONS_PER_S_MAX = 50.0
KAD_QUESTIONS_BURST_MAX_COUNT = 200
FOUND_DEVICES_MAX_COUNT = 4096

# --- Discovery -----------------------------------------------------------------------------------
# More peers than a mesh has members, so that those of other meshes and the dead do not crowd out the rest.
DISCOVERY_CONTACTS_MAX_COUNT = 2048
# Dials at once, and how many of them any one source of hints may occupy.
DISCOVERY_DIALS_MAX_COUNT = 12
DISCOVERY_DIALS_PER_SOURCE_MAX_COUNT = 4
# When both sides hear of each other at once the smaller peer id dials; the larger waits this long.
DISCOVERY_DIAL_GRACE_S = 1.0
DISCOVERY_DIAL_JITTER_S = 0.1
DISCOVERY_BACKOFF_MIN_S = 0.5
DISCOVERY_BACKOFF_MAX_S = 60.0
# Somebody waits for a configured address: it is tried more often.
DISCOVERY_CONFIGURED_BACKOFF_MAX_S = 10.0
DISCOVERY_REFUSED_BACKOFF_MIN_S = 15.0
DISCOVERY_REFUSED_BACKOFF_MAX_S = 600.0
# How long the connection of a peer that was refused stays, so that it can read why.
DISCOVERY_REFUSED_LINGER_S = 1.0
# A peer that was just started again is dialed at once, but not more often than this.
DISCOVERY_FRESH_RETRY_S = 2.0
# A connection that ends sooner counts as a failed dial.
DISCOVERY_STABLE_CONNECTION_S = 5.0
DISCOVERY_FORGET_S = 600.0
DISCOVERY_TIDY_S = 1.0
DISCOVERY_FORGET_FAILURES_COUNT = 8
DISCOVERY_CACHED_FAILURES_COUNT = 3
DISCOVERY_EVENTS_RETRY_S = 1.0
# Connections that a node aims at and accepts, to other nodes; those that are kept whoever comes; see degree.py.
NODE_DEGREE_TARGET_COUNT = 10
NODE_DEGREE_MAX_COUNT = 16
NODE_DEGREE_BUSY_MAX_COUNT = 512
NODE_DEGREE_NEAR_COUNT = 4
NODE_DEGREE_CHOSEN_COUNT = 4
NODE_DEGREE_INBOUND_COUNT = 4
NODE_DEGREE_TRAINERS_MAX_COUNT = 32
TRAINER_NODES_TARGET_COUNT = 4
TRAINER_NODES_MAX_COUNT = 10
# Since its last use a connection is busy, and then done with; so long who came last is not let go.
DEGREE_BUSY_S = 60.0
DEGREE_IDLE_S = 90.0
DEGREE_GRACE_S = 15.0
DEGREE_LOOK_S = 5.0
# After how long one that had enough peers is tried again; and by a process that has nobody else.
SPARED_BACKOFF_S = 300.0
SPARED_ALONE_BACKOFF_S = 10.0
# The table of whom to ask: peers in each range of distance, and of one network in one and in all.
ROUTING_BUCKET_MAX_COUNT = 20
ROUTING_NETWORK_BUCKET_MAX_COUNT = 4
ROUTING_NETWORK_MAX_COUNT = 16
ROUTING_FAILURES_MAX_COUNT = 2
ROUTING_REFRESH_S = 600.0
# Each time one's own place is looked up; each so many times another one, which leads to peers that are far apart.
ROUTING_REFRESHES_PER_OTHER_COUNT = 6
# When one comes that is near, there may be more: the pause before one looks, and until one looks again.
ROUTING_NEAR_SETTLE_S = 2.0
ROUTING_NEAR_PAUSE_S = 30.0
# One lookup: its time, peers asked at once and in all, names taken from each, and when the next is asked beside one.
LOOKUP_TIMEOUT_S = 4.0
LOOKUP_PARALLEL_COUNT = 4
LOOKUP_PEERS_MAX_COUNT = 64
LOOKUP_NAMED_MAX_COUNT = 16
LOOKUP_PATIENCE_S = 0.3
# Of the closest, how many may be of one public network: of a crowd there, the others hold what it does not.
LOOKUP_NETWORK_MAX_COUNT = 3
LOOKUPS_AT_ONCE_MAX_COUNT = 8
# The same in the public DHT, whose peers are far away, many of them gone, and may be asked for longer; how many closest
# peers are told, and how many addresses of one are looked at.
PUBLIC_DHT_TIMEOUT_S = 60.0
PUBLIC_DHT_PARALLEL_COUNT = 8
PUBLIC_DHT_PEERS_MAX_COUNT = 160
PUBLIC_DHT_NAMED_MAX_COUNT = 24
PUBLIC_DHT_PATIENCE_S = 3.0
PUBLIC_DHT_HOLDERS_COUNT = 20
PUBLIC_DHT_ADDRESSES_MAX_COUNT = 32
# Bootstrap peers: names that stand for others, and what they come to; how many of them stay connected.
DNS_TIMEOUT_S = 5.0
BOOTSTRAP_LOOKUPS_MAX_COUNT = 64
BOOTSTRAP_DEPTH_MAX_COUNT = 4
BOOTSTRAP_PEERS_MAX_COUNT = 32
BOOTSTRAP_CONNECTED_COUNT = 3
BOOTSTRAP_LOOK_S = 5.0
BOOTSTRAP_OFFLINE_S = 60.0
BOOTSTRAP_STABLE_S = 300.0
BOOTSTRAP_BACKOFF_MAX_S = 600.0
# Whether others can dial this process: whom that is asked, how long it counts, how often it is asked anew.
REACH_OBSERVERS_MAX_COUNT = 16
REACH_REPORT_MAX_AGE_S = 3600.0
REACH_TEST_S = 300.0
REACH_LOOK_S = 15.0
REACH_SETTLE_S = 1.0
# Places at relays that carry much; and in all, with those that are only good to agree on a direct connection.
REACH_RELAYS_COUNT = 2
REACH_PLACES_MAX_COUNT = 4
REACH_RELAY_RETRY_S = 60.0
# Asking the router to pass connections on: for how long, and how it is asked (RFC 6886).
PORT_MAPPING_S = 3600.0
PORT_MAPPING_RENEW_MIN_S = 60.0
PORT_MAPPING_RETRY_S = 900.0
NAT_PMP_PORT = 5351
NAT_PMP_ATTEMPTS_COUNT = 4
NAT_PMP_WAIT_S = 0.25
NAT_PMP_MESSAGE_MAX_BYTES = 16
UPNP_DISCOVERY_MS = 2000
# How often the public DHT is looked at for others of the mesh: from the first pause, each twice as long, to the last.
PUBLIC_DHT_MEET_MIN_S = 2.0
PUBLIC_DHT_MEET_MAX_S = 1800.0
DISCOVERY_STATUS_JOIN_MAX_COUNT = 32
# 239.0.0.0/8 is for use within a site (RFC 2365); one hop, so that it stays on the local network.
BEACON_GROUP = "239.83.80.75"
BEACON_PORT = 45655
BEACON_HOPS_MAX_COUNT = 1
# Fits one packet on any network, tunnels included.
BEACON_MAX_BYTES = 1200
# When the first beacons go out, in seconds after the start (jitter is added).
BEACON_START_TIMES_S = (0.0, 0.1, 0.4, 1.5)
BEACON_START_JITTER_S = 0.05
BEACON_INTERVAL_S = 10.0
BEACON_ANSWER_DELAY_MIN_S = 0.01
BEACON_ANSWER_DELAY_MAX_S = 0.08
# A newcomer's repeated questions are answered once in this time.
BEACON_NEWCOMER_S = 5.0
BEACON_NEWCOMERS_MAX_COUNT = 512
# Beacons taken from one host (which may run many processes), and from all together.
BEACONS_PER_HOST_BURST_COUNT = 256
BEACONS_PER_HOST_PER_S = 64.0
BEACONS_BURST_COUNT = 1024
BEACONS_PER_S = 512.0
BEACON_HOSTS_MAX_COUNT = 256
# Linux lets one socket join 20 groups.
BEACON_INTERFACES_MAX_COUNT = 16
REGISTRY_ENTRY_MAX_BYTES = 16 * KIB
REGISTRY_ENTRIES_MAX_COUNT = 1024
REGISTRY_MESHES_MAX_COUNT = 16
REGISTRY_POLL_S = 0.25
REGISTRY_POLL_FAST_S = 15.0
REGISTRY_POLL_SLOW_S = 1.0
REGISTRY_CHECK_S = 10.0
# Entries of processes that cannot be seen from here are left alone until they are so old; the living renew theirs.
REGISTRY_FOREIGN_MAX_AGE_S = 24 * 3600.0
REGISTRY_RENEW_S = 3600.0
# A process's start time as two readers see it may differ by this much (adjusted clocks).
PROCESS_START_TOLERANCE_S = 2.0
PEER_CACHE_PEERS_MAX_COUNT = 64
PEER_CACHE_FILE_MAX_BYTES = 512 * KIB
PEER_CACHE_FILES_MAX_COUNT = 64
PEER_CACHE_MAX_AGE_S = 30 * 24 * 3600.0
PEER_CACHE_WRITE_DELAY_S = 5.0

# --- Collectives ---------------------------------------------------------------------------------
COLLECTIVE_TIMEOUT_S = 600.0
TIMEOUT_MAX_S = 1e9
# An exact test of two strided arrays for shared memory is exponential: beyond this much work assume that they share.
ARRAYS_SHARING_MAX_WORK_COUNT = 10_000
# What is received, reduced and digested at a time, one record: larger ones no longer fit a core's cache in between.
COLLECTIVE_PART_BYTES = RECORD_MAX_BYTES
# What one message carries. Smaller ones cost more turns of the scheduler per byte; larger ones are out of the caches
# by the time they are passed on.
COLLECTIVE_SEGMENT_BYTES = 4 * COLLECTIVE_PART_BYTES
# Vectors are not cut into smaller ones so that steps overlap: a message costs about as much as so many bytes.
COLLECTIVE_SEGMENT_MIN_BYTES = 512 * KIB
# The same over slow lines, where the time of the last one counts.
COLLECTIVE_SEGMENT_SLOW_MIN_BYTES = 64 * KIB
# Data that may be sent to a peer before it has begun the same operation; the peer holds it until then.
COLLECTIVE_EAGER_MAX_BYTES = 64 * KIB
# Operations that a peer may have begun, and given up, before this rank has come to them.
COLLECTIVE_OPERATIONS_AHEAD_MAX_COUNT = 1024
# How often a callback for progress is called.
PROGRESS_INTERVAL_S = 0.05
# Operations of a group in flight; further calls wait. Of those in any order (tags, two ranks) more could deadlock.
COLLECTIVE_IN_FLIGHT_MAX_COUNT = 32
COLLECTIVE_UNORDERED_MAX_COUNT = 1024
# Tags, and pairs of ranks that send to each other with each of them.
COLLECTIVE_STREAMS_MAX_COUNT = 4096
# Streams of operations have numbers below this; where only two ranks take part, so much above.
COLLECTIVE_STREAM_NUMBERS_COUNT = 2**30
# Control messages waiting for a peer that takes none; then it counts as lost.
COLLECTIVE_OUTBOX_MAX_COUNT = 4096
COLLECTIVE_ARRAYS_MAX_COUNT = 65536
COLLECTIVE_ARRAYS_DESCRIBED_MAX_COUNT = 16
# Vectors of one call, on the wire a number of 16 bits.
COLLECTIVE_LANES_MAX_COUNT = 2**16
COLLECTIVE_DESCRIPTION_MAX_CHARS = 4096
COLLECTIVE_PLANS_CACHED_MAX_COUNT = 64
COLLECTIVE_BUFFERS_POOLED_MAX_BYTES = 512 * MIB
COLLECTIVE_BUFFERS_POOLED_MAX_COUNT = 8

# What ranks send each other to learn how fast their lines are, and how long they do at most, per pair.
CALIBRATION_MESSAGE_BYTES = 64 * KIB
CALIBRATION_LINE_MAX_BYTES = 8 * MIB
CALIBRATION_LINE_S = 0.1
CALIBRATION_LINE_MAX_S = 1.0
CALIBRATION_ROUND_TRIPS_COUNT = 16
# Faster lines than this are as good as any: processors take no more.
TOPOLOGY_LINE_MAX_BYTES_PER_S = 500e6
TOPOLOGY_LINE_MIN_BYTES_PER_S = 1e3
TOPOLOGY_LATENCY_MAX_S = 60.0
# --- Codecs of array data ------------------------------------------------------------------------
# Encoded and decoded at a time: a few float32 temporaries of so many elements stay in a core's own cache, and NumPy's
# cost per call does not count.
CODEC_PIECE_COUNT = 64 * KIB
# What an index of 32 bits can tell apart.
CODEC_INDEXED_MAX_COUNT = 2**32
# Arrays whose residuals are kept between calls.
FEEDBACK_KEYS_MAX_COUNT = 4096

# Lines that differ by less are taken to be equal: measurements do.
TOPOLOGY_EQUAL_LINES_RATIO = 1.25
# By how much a link may send faster than its part of a line.
TOPOLOGY_PACE_RATIO = 1.4
# Up to so many ranks all orders of a ring are tried.
TOPOLOGY_RING_EXACT_MAX_COUNT = 7
TOPOLOGY_RING_ROUNDS_COUNT = 16
# Up to so many ranks it is counted what their schedules send from host to host.
TRAFFIC_RANKS_MAX_COUNT = 32

# --- Collectives among the ranks of one host -------------------------------------------------------
# One per dtype of a call.
SHARED_LANES_MAX_COUNT = 32
# What is reduced before the others go on with it, of all ranks together: as much as stays in a cache that they share,
# and per rank enough that meeting costs little beside it.
SHARED_CHUNK_BYTES = 4 * MIB
SHARED_CHUNK_PART_BYTES = 1 * MIB
# How many chunks a rank may be ahead of the slowest.
SHARED_CHUNKS_AHEAD_COUNT = 3
# Operands are read and added in blocks that stay in a core's own cache.
SHARED_BLOCK_BYTES = 256 * KIB
# Arrays up to this size are copied into shared memory: that costs less than reading them where they are.
SHARED_STAGED_MAX_BYTES = 2 * MIB
# How often a rank that waits yields its core to the others before it sleeps.
SHARED_YIELDS_COUNT = 30

# How long a rank that was cancelled goes on with what is committed, so that nobody is left with half of it.
SHARED_FINISH_S = 1.0
# A call that is given up where all ranks are about to return may still hear how it has ended.
DOUBT_PATIENCE_S = 0.5
SHARED_WORK_KEPT_MAX_BYTES = 256 * MIB

# --- Devices, status, the node's control socket ---------------------------------------------------
DEVICES_MAX_COUNT = 256
DEVICE_FEATURES_MAX_COUNT = 64
DEVICE_DETECTION_TIMEOUT_S = 5.0
STATUS_ADDRESSES_MAX_COUNT = 1024
STATUS_DISCOVERY_MAX_COUNT = 64
CONTROL_REQUEST_MAX_BYTES = 4 * KIB
CONTROL_REPLY_MAX_BYTES = 16 * MIB
CONTROL_CLIENTS_MAX_COUNT = 16
# The node answers from memory: a client that is slower than this is stuck.
CONTROL_CLIENT_TIMEOUT_S = 5.0
# How long a command waits for the node to answer, one that is just starting included.
CONTROL_ASK_TIMEOUT_S = 10.0
CONTROL_WAIT_MAX_S = 86400
CONTROL_POLL_INTERVAL_S = 0.05
CONTROL_BACKLOG_MAX_COUNT = 64
LOCK_FILE_MAX_BYTES = 32
# Lines that may wait for a reader of the node's output; more are dropped and counted.
OUTPUT_LINES_MAX_COUNT = 4096
OUTPUT_FLUSH_TIMEOUT_S = 2.0

# --- Kernels --------------------------------------------------------------------------------------
KERNEL_RANK_MAX_COUNT = 8
KERNEL_ELEMENTS_MAX_COUNT = 1 << 40
KERNEL_NODES_MAX_COUNT = 4096
KERNEL_INPUTS_MAX_COUNT = 64
KERNEL_OUTPUTS_MAX_COUNT = 64
# Operands of one operation: of a concatenation, say.
KERNEL_OPERANDS_MAX_COUNT = 256
# Of what is left of its part a device takes one of so many pieces at a time: the rest others can take over.
SHARE_PIECES_COUNT = 3
# Whoever does less is of no use.
SHARE_RATE_MIN_PER_S = 1e-6
# What is taken for the rate of a device that nobody has measured.
UNMEASURED_FLOPS_PER_S = 10e9
UNMEASURED_BYTES_PER_S = 1e9
# Methods of arrays with their arguments, each a kernel.
ARRAY_METHODS_MAX_COUNT = 1024
# Of the last so many times that a kernel took the median counts.
COST_CORRECTION_TIMES_COUNT = 7
COST_CORRECTIONS_MAX_COUNT = 4096
# Kernels made ready for one device; what one profile remembers.
PREPARED_PROGRAMS_MAX_COUNT = 512
PROFILE_EVENTS_MAX_COUNT = 100_000
# What takes less on one device is not worth sharing; what is expected of sharing, beside the best alone, to do it.
SHARED_WORK_MIN_S = 2e-3
SHARED_GAIN_MAX_RATIO = 0.9
# Into so many parts at least could shared work be cut.
SHARED_GRAINS_COUNT = 64
# Of the runs of one kernel these are timed: the first, and then one in so many.
TIMED_RUNS_COUNT = 7
TIMED_RUNS_PERIOD_COUNT = 16
# Kernels that were submitted and wait for a thread.
SUBMITTED_MAX_COUNT = 4096

# --- Kernels from others --------------------------------------------------------------------------
# How many reductions compute one and the same expression, each for itself, before it is stored for them.
KERNEL_RECOMPUTED_MAX_COUNT = 4
# A kernel as bytes: as many nodes as there can be, with shapes of usual length.
KERNEL_ENCODED_MAX_BYTES = 256 * KIB
# What is around it where it says what it takes.
KERNEL_DECLARATION_MAX_BYTES = 256
# Of all nodes together: what looks at a kernel goes through all of them.
KERNEL_OPERANDS_IN_ALL_MAX_COUNT = 1 << 15
# What a kernel from elsewhere may take if its receiver says nothing else: an hour of a slow processor, or so.
KERNEL_FLOPS_MAX_COUNT = 1 << 45
KERNEL_MOVED_MAX_BYTES = 1 << 44
KERNEL_MEMORY_MAX_BYTES = 64 * 1024 * MIB


# --- Devices and their memory ----------------------------------------------------------------------
# Of blocks in the CPU's memory: a cache line, and the widest vector register.
MEMORY_ALIGNMENT_BYTES = 64
# Blocks of the CPU's memory from this size on are compared with what is free: Linux would grant them, and end us later.
HOST_CHECKED_MIN_BYTES = 64 * MIB
# Freed blocks that a pool keeps: this part of the device's memory, and of the host's no more than the second.
POOL_KEPT_RATIO = 0.25
POOL_KEPT_HOST_MAX_BYTES = 1024 * MIB
# The smallest block that a pool asks for. Between powers of two there are as many sizes as the second says.
# A device that lacks memory is asked again while others give some back, so often at most.
POOL_ROOM_TRIES_COUNT = 3
POOL_BLOCK_MIN_BYTES = 256
POOL_SIZES_PER_OCTAVE_COUNT = 8
# Through pinned memory goes what is larger than the first, in blocks of the second, by so many threads with two each.
STAGED_COPY_MIN_BYTES = 256 * KIB
STAGING_BLOCK_BYTES = 4 * MIB
STAGING_THREADS_MAX_COUNT = 4
STAGING_BLOCKS_MAX_COUNT = 2 * STAGING_THREADS_MAX_COUNT
# Work on the CPU's memory is cut in pieces of this size for threads, no more of them than the second says.
THREAD_PIECE_BYTES = 4 * MIB
DEVICE_THREADS_MAX_COUNT = 16
# Between two devices with no direct way, through the host.
HOST_STEP_BYTES = 32 * MIB
COMPILED_KERNELS_MAX_COUNT = 1024
# Of a compiler's output in an error message.
COMPILER_OUTPUT_MAX_CHARS = 8192
# Blocks of 16 random bytes that NumPy makes at once: its arrays stay in the cache.
RANDOM_BLOCKS_AT_ONCE_COUNT = 8192
# A device's profile: how long measuring takes at most, how long one measurement should, the largest arrays.
PROFILE_BUDGET_S = 1.5
PROFILE_STEP_S = 0.03
PROFILE_COPY_MAX_BYTES = 128 * MIB
PROFILE_MATRIX_MIN_COUNT = 64
PROFILE_MATRIX_MAX_COUNT = 4096
PROFILE_LAUNCHES_COUNT = 200
PROFILE_FILE_MAX_BYTES = 64 * KIB
# Of all machines that share a data directory, a node reads no more.
PROFILES_READ_MAX_COUNT = 256

# --- Tracing --------------------------------------------------------------------------------------
# Graphs that one kernel keeps, each for operands of other types; those used longest ago are forgotten.
KERNEL_TRACES_MAX_COUNT = 64
# Elements that a loop over a traced array goes through: each is nodes of its own.
KERNEL_UNROLL_MAX_COUNT = 64
# Types of operands that are known to be of kernels, so that a call need not look again.
KERNEL_OPERAND_TYPES_MAX_COUNT = 1024
# Lists within lists among a kernel's arguments and results.
KERNEL_STRUCTURE_MAX_DEPTH = 32


# Products of matrices of certain shapes that are known to be right.
CHECKED_PRODUCTS_MAX_COUNT = 1024
# In one dimension: cuBLAS counts in 32 bits.
CUBLAS_LENGTH_MAX_COUNT = 2**31 - 1

# --- Generated kernels ----------------------------------------------------------------------------
# Work items of a group: many enough to fill a processor of any GPU, few enough for the registers of each.
GENERATED_GROUP_MAX_COUNT = 256
# What one work item fetches at once: the most that GPUs do.
GENERATED_ACCESS_BYTES = 16
# Operations times elements that are written out for one work item, so that compilers stay fast.
GENERATED_UNROLLED_MAX_COUNT = 512
# Blocks that one kernel takes: OpenCL devices may take no more than 1024 bytes of arguments.
GENERATED_POINTERS_MAX_COUNT = 120
# Below it places are counted in 32 bits, in which GPUs divide several times as fast.
GENERATED_NARROW_MAX_COUNT = 1 << 31
# Groups that a reduction is split into, if it is as large: some times as many as run at once on a large GPU.
GENERATED_REDUCE_GROUPS_COUNT = 4096
# What a work item reduces before it is split further.
GENERATED_REDUCE_WORDS_COUNT = 16

# --- Executing on processors ----------------------------------------------------------------------
CPU_THREADS_MAX_COUNT = 256
# What the values between two operations take, all together, in one thread: a core's own cache (L2), about.
CPU_SCRATCH_BYTES = 1 * MIB
# Where many threads work on one kernel they would wait for each other between pieces as short as these: with 16 of them
# longer ones, though they go through a slower cache, take half as long.
CPU_MANY_THREADS_COUNT = 5
CPU_MANY_THREADS_SCRATCH_BYTES = 4 * MIB
CPU_MANY_THREADS_TILE_MAX_COUNT = 512 * KIB
# Calls into NumPy take about a microsecond, and threads wait for each other around them: longer pieces hide both.
CPU_TILE_MAX_COUNT = 256 * KIB
# Kernels of very many values would leave pieces too short to be worth a call.
CPU_TILE_MIN_COUNT = 4 * KIB
# Of pieces that are read across their rows: lines of memory that are fetched are used whole.
CPU_TILE_SIDE_COUNT = 32
# Rows so short are gone through column by column: NumPy's own loops cost more than their elements.
CPU_SHORT_ROW_MAX_COUNT = 16
# What is added up beside each other: the sums of the levels of a pairwise sum stay in the cache.
CPU_KEPT_MAX_COUNT = 8 * KIB
# A reduction is cut into about so many parts, however many threads there are: its bits depend on the cut.
CPU_REDUCTION_PARTS_COUNT = 64
# Of reductions that need no buffers: longer pieces, if there are as many of them, for all threads.
CPU_DIRECT_TILE_MAX_COUNT = 1024 * KIB
CPU_DIRECT_TILES_COUNT = 16
# So many rows are added up one after the other; NumPy's pairwise sums do the same with a few at a time.
CPU_ROWS_IN_TURN_COUNT = 32
# Rows so long are added up by one call for all of them; for shorter ones one half of them is added to the other.
CPU_LONG_ROW_MIN_COUNT = 1 * KIB
# Indices of pieces that are made once and kept with a prepared step.
CPU_PIECES_KEPT_MAX_COUNT = 4 * KIB
# Work for less than some tens of microseconds is not worth waking other threads: operations on single elements.
CPU_SHARED_MIN_COUNT = 256 * KIB
# How many portions each thread gets on average: those that are slowed down take fewer.
CPU_PORTIONS_PER_THREAD_COUNT = 8
# Memory of values between steps that is kept for the next run.
CPU_POOL_MAX_BYTES = 256 * MIB
# Side of the pieces that float16 matrices are converted in, to be multiplied as float32.
CPU_HALF_TILE_SIDE_COUNT = 1024
# Products of matrices below that many multiplications are done by one thread each, if there are several.
CPU_SMALL_PRODUCT_MAX_COUNT = 1 << 21
# Shorter runs take as long by NumPy. To compile a function takes as long as some hundred times these: it is done for
# what has computed as many elements before, and not at the first run.
C_RUN_MIN_COUNT = 4 * KIB
C_COMPILED_MIN_COUNT = 64 * KIB
# Calls take some microseconds: what is called for is longer, and short enough for threads to end together.
C_PIECE_MIN_COUNT = 64 * KIB
C_PIECE_MAX_COUNT = 512 * KIB
# Shorter rows leave little to vector instructions.
C_ROW_MIN_BYTES = 128
# Results that no cache of a core's would hold go past all of them, in runs of so many elements.
C_STREAMED_MIN_BYTES = 32 * MIB
C_STREAMED_COUNT = 1 * KIB
# Of one process, in all and at a time; each takes some tens of KiB, and about 0.1 s.
C_FUNCTIONS_MAX_COUNT = 512
C_FUNCTIONS_WANTED_MAX_COUNT = 8
C_COMPILE_TIMEOUT_S = 60.0
# How soon a compiler is ended when nobody needs it any more.
C_COMPILER_LOOK_S = 0.05
C_COMPILER_END_S = 1.0


# --- Arrays of other libraries -------------------------------------------------------------------
# Types of arrays (torch.Tensor, its subclasses, ...) of which is remembered which libraries they are of.
FOREIGN_TYPES_CACHED_MAX_COUNT = 64
# Pinned host memory that is kept for the next call with arrays of GPUs: pinning takes longer than copying. A model's
# gradients go through one block.
PINNED_BUFFERS_POOLED_MAX_BYTES = 4096 * MIB
# Arrays start at multiples of this within it: of a cache line, and of what copies run fastest from.
PINNED_ALIGNMENT_BYTES = 256

# --- Relations -----------------------------------------------------------------------------------
assert LINK_HEADER_MAX_BYTES + LINK_INLINE_PAYLOAD_MAX_BYTES < RECORD_MAX_BYTES < 2**24
assert LINK_INLINE_PAYLOAD_MAX_BYTES < LINK_STRIPE_BYTES <= RECORD_MAX_BYTES
assert LINK_DIAL_TIMEOUT_S + LINK_WELCOME_TIMEOUT_S < LINK_HANDSHAKE_TIMEOUT_S
assert LINK_PENDING_PER_PEER_MAX_COUNT < LINK_PENDING_MAX_COUNT
assert MESH_MEMBERS_MAX_COUNT < LINK_PENDING_MAX_COUNT
assert MEMORY_LINK_CAPACITY_BYTES > LINK_HEADER_MAX_BYTES
assert LINK_STREAM_WINDOW_BYTES * CONNECTIONS_PER_PEER_MAX_COUNT < UNREAD_BYTES_PER_CONNECTION_MAX
assert CONNECTIONS_MAX_COUNT < FABRIC_EVENTS_MAX_COUNT
assert UPGRADE_TIMEOUT_S < DIAL_TIMEOUT_S
assert HOLE_PUNCH_ATTEMPTS_COUNT * (HOLE_PUNCH_REVERSAL_S + HOLE_PUNCH_DIAL_S) < HOLE_PUNCH_TIMEOUT_S < DIAL_TIMEOUT_S
assert COLLECTIVE_PART_BYTES <= RECORD_MAX_BYTES
assert COLLECTIVE_PART_BYTES % 64 == COLLECTIVE_PART_BYTES % LINK_STRIPE_BYTES == 0
assert COLLECTIVE_EAGER_MAX_BYTES <= COLLECTIVE_SEGMENT_MIN_BYTES <= COLLECTIVE_SEGMENT_BYTES
assert COLLECTIVE_IN_FLIGHT_MAX_COUNT <= COLLECTIVE_UNORDERED_MAX_COUNT <= COLLECTIVE_OPERATIONS_AHEAD_MAX_COUNT
assert 2 * (COLLECTIVE_IN_FLIGHT_MAX_COUNT + COLLECTIVE_UNORDERED_MAX_COUNT) < COLLECTIVE_OUTBOX_MAX_COUNT
assert COLLECTIVE_IN_FLIGHT_MAX_COUNT + COLLECTIVE_UNORDERED_MAX_COUNT < OPERATIONS_OPEN_MAX_COUNT
assert OPERATIONS_OPEN_MAX_COUNT < OPERATIONS_PER_PROMISE_MAX_COUNT
assert COLLECTIVE_DESCRIPTION_MAX_CHARS * 3 < LINK_HEADER_MAX_BYTES
# A piece is whole blocks of every codec.
assert CODEC_PIECE_COUNT % 256 == 0
assert CONTROL_REQUEST_MAX_BYTES < CONTROL_REPLY_MAX_BYTES
assert LOOKUP_TIMEOUT_S < CONTROL_CLIENT_TIMEOUT_S < CONTROL_ASK_TIMEOUT_S
# Nodes hear each other often enough; what they do not, is made up for in time.
assert NODE_PING_INTERVAL_S + 1.25 * NODE_LOOK_INTERVAL_S < CAPABILITY_UNHEARD_S
assert CAPABILITY_UNHEARD_S + 2.5 * CAPABILITY_LOOK_S < CAPABILITY_LIFETIME_S < 60.0
assert CAPABILITY_RENEW_S * 2.5 < CAPABILITY_UNRENEWED_MAX_S
# Where there is no room is told again, before it is forgotten.
assert CAPABILITY_REPUBLISH_S * 2.5 < CAPABILITY_OVERFLOW_S
assert KAD_ANSWER_RECORDS_MAX_BYTES + LOOKUP_NAMED_MAX_COUNT * 4 * KIB <= KAD_MESSAGE_MAX_BYTES
assert PING_INTERVAL_S * 3 < SILENCE_TIMEOUT_S
assert NODE_PING_INTERVAL_S * 3 < NODE_SILENCE_TIMEOUT_S
assert PING_INTERVAL_S * 3 < SUSPICION_FLOOR_S < SUSPICION_CEILING_S < SILENCE_TIMEOUT_S
assert MESH_PROOF_TIMEOUT_S < STRANGER_STAY_MAX_S < JOIN_TIMEOUT_S
assert STRANGERS_PER_ADDRESS_MAX_COUNT < STRANGERS_MAX_COUNT
# What all of them are refused for at one moment is told in events.
assert STRANGERS_MAX_COUNT * MESH_STREAMS_PER_STRANGER_MAX_COUNT < NODE_EVENTS_MAX_COUNT
# With as many connections as each may have they leave room for those who are of the mesh.
assert STRANGERS_MAX_COUNT * CONNECTIONS_PER_PEER_MAX_COUNT + UNPROVEN_SOCKETS_MAX_COUNT < CONNECTIONS_MAX_COUNT
assert VIEW_SETTLE_S < PROPOSER_STAGGER_S < PROPOSAL_TIMEOUT_S < SILENCE_TIMEOUT_S
assert DISCOVERY_DIALS_PER_SOURCE_MAX_COUNT * 2 <= DISCOVERY_DIALS_MAX_COUNT
assert DISCOVERY_CONTACTS_MAX_COUNT >= MESH_MEMBERS_MAX_COUNT
assert BEACON_START_TIMES_S[-1] < BEACON_NEWCOMER_S < BEACON_INTERVAL_S
assert CERTIFICATE_LIFETIME_S <= CERTIFICATE_LIFETIME_MAX_S
assert REVOKED_PEERS_MAX_COUNT * (PEER_ID_MAX_CHARS + 2) + 1 * KIB < REVOCATIONS_MAX_BYTES < REVOCATION_FILE_MAX_BYTES
assert REVOCATIONS_MAX_BYTES * 2 < CONTROL_MESSAGE_MAX_BYTES
assert NODE_DEGREE_TARGET_COUNT < NODE_DEGREE_MAX_COUNT <= PEER_EXCHANGE_SAMPLE_COUNT < PEER_EXCHANGE_MAX_COUNT
assert NODE_DEGREE_MAX_COUNT < NODE_DEGREE_BUSY_MAX_COUNT < CONNECTIONS_MAX_COUNT
assert CAPABILITY_UNHEARD_S < DEGREE_BUSY_S < DEGREE_IDLE_S < SPARED_BACKOFF_S
assert STAGED_COPY_MIN_BYTES < STAGING_BLOCK_BYTES
assert PROFILE_BUDGET_S > 10 * PROFILE_STEP_S
assert REGISTRY_RENEW_S * 2 < REGISTRY_FOREIGN_MAX_AGE_S
