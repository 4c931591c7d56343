"""What the emulator knows of packets: their wire size, where they go, and how to cut a segmented one.

The kernel hands over TCP packets of up to 64 KiB (GSO) behind a ``virtio_net_hdr`` of 10 bytes, which says where the
transport header begins and how large the segments are that a network card would make of them. Here such a packet
is a :class:`Burst`. It travels whole, and is charged for the headers of all its segments.
"""

from __future__ import annotations

import struct
from typing import Final

VNET_HEADER: Final = 10
MAX_FRAME: Final = VNET_HEADER + 65536 + 256

NEEDS_CSUM: Final = 1  # virtio_net_hdr flags: the checksum is still to be completed from csum_start on
GSO_NONE: Final = 0
_GSO_TCP: Final = (1, 4)  # virtio_net_hdr gso_type: TCP over IPv4, TCP over IPv6
_GSO_ECN: Final = 0x80
_TCP: Final = 6
_FIN_PSH: Final = 0x09
_CWR: Final = 0x80


def ones_complement_sum(data: bytes | bytearray | memoryview, start: int = 0) -> int:
    """Return the 16 bit one's complement sum of ``data`` added to ``start``, not inverted."""
    if len(data) % 2:
        data = bytes(data) + b"\0"
    total: int = start + sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total


class Burst:
    """One packet as the kernel handed it over: a plain one, or many TCP segments in one."""

    __slots__ = ("data", "headers", "segment", "segments", "wire_bytes")

    def __init__(self, data: bytes, headers: int, segment: int, segments: int) -> None:
        self.data = data  # virtio_net_hdr and the packet
        self.headers = headers  # bytes of IP and TCP headers; 0 for what is not segmented
        self.segment = segment  # bytes of one full segment on the wire, its headers included
        self.segments = segments
        self.wire_bytes = len(data) - VNET_HEADER + (segments - 1) * headers

    def part(self, start: int, stop: int) -> Burst:
        """Return segments ``start`` to ``stop`` as a packet of its own, with headers as those segments would have."""
        if start == 0 and stop == self.segments:
            return self
        payload = self.segment - self.headers
        body = VNET_HEADER + self.headers
        piece = self.data[body + start * payload : body + stop * payload]
        frame = bytearray(self.data[:body]) + piece
        _fix_ip(frame, start)
        _fix_tcp(frame, start * payload, first=start == 0, last=stop == self.segments)
        segments = stop - start
        if segments == 1:
            frame[1] = GSO_NONE
            frame[4:6] = b"\0\0"
        return Burst(bytes(frame), self.headers, self.segment if segments > 1 else self.headers + len(piece), segments)


def _fix_ip(frame: bytearray, skipped: int) -> None:
    """Set length, identification and header checksum for what ``frame`` holds now."""
    length = len(frame) - VNET_HEADER
    if frame[VNET_HEADER] >> 4 == 6:
        struct.pack_into("!H", frame, VNET_HEADER + 4, length - 40)
        return
    header = (frame[VNET_HEADER] & 15) * 4
    (identification,) = struct.unpack_from("!H", frame, VNET_HEADER + 4)
    struct.pack_into("!HH", frame, VNET_HEADER + 2, length, (identification + skipped) & 0xFFFF)
    struct.pack_into("!H", frame, VNET_HEADER + 10, 0)
    checksum = ~ones_complement_sum(frame[VNET_HEADER : VNET_HEADER + header]) & 0xFFFF
    struct.pack_into("!H", frame, VNET_HEADER + 10, checksum)


def _fix_tcp(frame: bytearray, skipped: int, *, first: bool, last: bool) -> None:
    """Advance the sequence number by ``skipped``; keep flags where they belong; renew the pseudo-header's sum."""
    (transport,) = struct.unpack_from("=H", frame, 6)
    tcp = VNET_HEADER + transport
    (sequence,) = struct.unpack_from("!I", frame, tcp + 4)
    struct.pack_into("!I", frame, tcp + 4, (sequence + skipped) & 0xFFFFFFFF)
    if not last:
        frame[tcp + 13] &= ~_FIN_PSH & 0xFF
    if not first:
        frame[tcp + 13] &= ~_CWR & 0xFF
    addresses = (
        slice(VNET_HEADER + 8, VNET_HEADER + 40)
        if frame[VNET_HEADER] >> 4 == 6
        else slice(VNET_HEADER + 12, VNET_HEADER + 20)
    )
    # NEEDS_CSUM: the receiving kernel (or card) sums from csum_start on, over this.
    struct.pack_into("!H", frame, tcp + 16, ones_complement_sum(frame[addresses], _TCP + len(frame) - tcp))


def parse(data: bytes) -> Burst:
    """Return the packet that ``data`` (a virtio_net_hdr and a packet) is."""
    kind = data[1] & ~_GSO_ECN
    if kind not in _GSO_TCP:
        size = len(data) - VNET_HEADER
        return Burst(data, 0, size, 1)
    payload, transport = struct.unpack_from("=HH", data, 4)
    headers = transport + (data[VNET_HEADER + transport + 12] >> 4) * 4
    segments = -(-(len(data) - VNET_HEADER - headers) // payload) or 1
    return Burst(data, headers, headers + payload, segments)


def destination(data: bytes) -> bytes:
    """Return the packet's destination address: 4 bytes, 16 for IPv6, or none for what is neither."""
    version = data[VNET_HEADER] >> 4
    if version == 4:
        return data[VNET_HEADER + 16 : VNET_HEADER + 20]
    return data[VNET_HEADER + 24 : VNET_HEADER + 40] if version == 6 else b""
