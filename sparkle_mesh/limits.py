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

# --- Links ---------------------------------------------------------------------------------------
RECORD_MAX_BYTES = 1 * MIB
RECORD_TAG_BYTES = 16
REKEY_INTERVAL_RECORDS = 2**16
LINK_HEADER_MAX_BYTES = 16 * KIB
LINK_PAYLOAD_MAX_BYTES = 2**40
LINK_HANDSHAKE_TIMEOUT_S = 10.0

# --- Membership ----------------------------------------------------------------------------------
MESH_MEMBERS_MAX_COUNT = 1024
JOIN_TIMEOUT_S = 60.0
MESH_PROOF_TIMEOUT_S = 10.0
INVITE_ADDRESSES_MAX_COUNT = 16
# How long the set of candidates must stay as it is before a first view is proposed, and how much longer
# each next-lowest candidate waits before it steps in for a silent proposer.
VIEW_SETTLE_S = 0.3
PROPOSER_STAGGER_S = 2.0
PROPOSAL_TIMEOUT_S = 5.0
PROPOSAL_RETRY_S = 0.2
PING_INTERVAL_S = 2.0
SILENCE_TIMEOUT_S = 15.0
PRESENCE_INTERVAL_S = 10.0
MESH_PEERS_MAX_COUNT = 2048
MESH_OUTBOX_MAX_COUNT = 4096
PEER_EXCHANGE_MAX_COUNT = 64
LINK_METRICS_MAX_COUNT = 4096
OPERATIONS_PER_PROMISE_MAX_COUNT = 1024
# A member whose control stream ended may have its last data still in flight: wait this long for the
# end of its data link before calling operations off.
LINK_DRAIN_S = 1.0
VIEWS_ELSEWHERE_MAX_COUNT = 64
MACHINE_HISTORY_MAX_COUNT = 256
NODE_EVENTS_MAX_COUNT = 1024

# --- Collectives ---------------------------------------------------------------------------------
COLLECTIVE_TIMEOUT_S = 600.0

# --- Relations -----------------------------------------------------------------------------------
assert LINK_HEADER_MAX_BYTES < RECORD_MAX_BYTES
assert PING_INTERVAL_S * 3 < SILENCE_TIMEOUT_S
assert MESH_PROOF_TIMEOUT_S < JOIN_TIMEOUT_S
assert VIEW_SETTLE_S < PROPOSER_STAGGER_S < PROPOSAL_TIMEOUT_S < SILENCE_TIMEOUT_S
