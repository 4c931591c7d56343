"""The emulator's arithmetic: packets that are cut, rates, queues, delays, losses. Needs no root."""

from __future__ import annotations

import argparse
import ipaddress
import random
import struct

import pytest

PAYLOAD = 1448


@pytest.fixture
def packets(load_benchmark):
    return load_benchmark("_wan_packets")


@pytest.fixture
def link(load_benchmark):
    return load_benchmark("_wan_link")


@pytest.fixture
def emulator(load_benchmark):
    return load_benchmark("wan_emulator")


def tcp_frame(payload, *, version=4, flags=0x98, identification=65535, sequence=2**32 - 1000):
    """Return a segmented packet as the kernel hands it over: virtio_net_hdr, IP, TCP with timestamps, payload."""
    tcp = struct.pack("!HHIIBBHHH", 5000, 6000, sequence, 7, 8 << 4, flags, 500, 0, 0) + bytes(12)
    if version == 4:
        addresses = ipaddress.ip_address("10.77.0.1").packed + ipaddress.ip_address("10.77.0.2").packed
        length = 20 + len(tcp) + len(payload)
        ip = struct.pack("!BBHHHBBH", 0x45, 0, length, identification, 0x4000, 64, 6, 0) + addresses
    else:
        addresses = ipaddress.ip_address("fd00:77::1").packed + ipaddress.ip_address("fd00:77::2").packed
        ip = struct.pack("!IHBB", 6 << 28, len(tcp) + len(payload), 6, 64) + addresses
    kind = 1 if version == 4 else 4
    return struct.pack("=BBHHHH", 1, kind, len(ip) + len(tcp), PAYLOAD, len(ip), 16) + ip + tcp + payload


def test_sum_is_that_of_the_internet_checksum(packets):
    # The example of RFC 1071, section 3.
    assert packets.ones_complement_sum(bytes.fromhex("0001f203f4f5f6f7")) == 0xDDF2
    assert packets.ones_complement_sum(b"\x01\x02\x03") == 0x0402
    assert packets.ones_complement_sum(b"\xff\xff", 1) == 1


@pytest.mark.parametrize(("version", "headers"), [(4, 52), (6, 72)])
def test_wire_bytes_hold_the_headers_of_every_segment(packets, version, headers):
    burst = packets.parse(tcp_frame(bytes(10 * PAYLOAD + 5), version=version))
    assert (burst.segments, burst.headers, burst.segment) == (11, headers, headers + PAYLOAD)
    assert burst.wire_bytes == 10 * (PAYLOAD + headers) + headers + 5


def test_plain_packets_are_one_segment(packets):
    frame = bytes(10) + tcp_frame(b"x" * 100)[10:]
    burst = packets.parse(frame)
    assert (burst.segments, burst.wire_bytes) == (1, 20 + 32 + 100)
    assert burst.part(0, 1) is burst


def test_destinations_are_found(packets):
    assert packets.destination(tcp_frame(b"", version=4)) == ipaddress.ip_address("10.77.0.2").packed
    assert packets.destination(tcp_frame(b"", version=6)) == ipaddress.ip_address("fd00:77::2").packed
    assert packets.destination(bytes(40)) == b""


@pytest.mark.parametrize(("version", "addresses"), [(4, slice(22, 30)), (6, slice(18, 50))])
def test_parts_are_what_a_card_would_have_sent(packets, version, addresses):
    payload = random.Random(1).randbytes(5 * PAYLOAD + 100)
    burst = packets.parse(tcp_frame(payload, version=version))
    parts = [burst.part(0, 1), burst.part(1, 4), burst.part(4, 6)]
    assert [part.segments for part in parts] == [1, 3, 2]
    assert sum(part.wire_bytes for part in parts) == burst.wire_bytes
    assert b"".join(part.data[10 + part.headers :] for part in parts) == payload
    for part, skipped in zip(parts, (0, 1, 4), strict=True):
        data = part.data
        tcp = 10 + struct.unpack_from("=H", data, 6)[0]
        assert struct.unpack_from("!I", data, tcp + 4)[0] == (2**32 - 1000 + skipped * PAYLOAD) % 2**32
        if version == 4:
            assert struct.unpack_from("!HH", data, 12) == (len(data) - 10, (65535 + skipped) % 65536)
            assert packets.ones_complement_sum(data[10:30]) == 0xFFFF
        else:
            assert struct.unpack_from("!H", data, 14)[0] == len(data) - 10 - 40
        pseudo = packets.ones_complement_sum(data[addresses], 6 + len(data) - tcp)
        assert struct.unpack_from("!H", data, tcp + 16)[0] == pseudo
        assert packets.parse(data).wire_bytes == part.wire_bytes
    assert [part.data[10 + parts[0].headers - 32 + 13] for part in parts] == [0x90, 0x10, 0x18]  # CWR first, PSH last
    assert [part.data[1] != 0 for part in parts] == [False, True, True]


def plain(packets, size):
    return packets.Burst(bytes(size + 10), 0, size, 1)


def test_rate_is_exact_over_time_however_late_one_asks(packets, link):
    queue = link.Queue(8e6, 1 << 20)  # a byte takes a microsecond
    ends = [queue.send(plain(packets, 1000), 0.0, 0.0)[1] for _ in range(100)]
    assert ends[0] == pytest.approx(0.001)
    assert ends[-1] == pytest.approx(0.1)
    assert queue.send(plain(packets, 1000), 5.0, 5.0) == (5.0, pytest.approx(5.001))


def test_bursts_are_passed_on_as_they_come_in_and_end_after_their_last_byte(packets, link):
    burst = packets.parse(tcp_frame(bytes(10 * PAYLOAD)))
    fast = link.Queue(80e6, 1 << 20)
    _, ends = fast.send(burst, 1.0, 2.0)
    assert ends == pytest.approx(2.0 + 1500 * 1e-7)
    slow = link.Queue(8e6, 1 << 20)
    _, ends = slow.send(burst, 1.0, 1.0001)
    assert ends == pytest.approx(1.0 + 15000e-6)


def test_what_trickles_in_leaves_room_between(packets, link):
    queue = link.Queue(80e6, 20_000)
    slow = packets.parse(tcp_frame(bytes(10 * PAYLOAD)))  # over a second, where it would take 1.5 ms
    assert queue.send(slow, 0.0, 1.0)[1] == pytest.approx(1.0 + 1500e-7)
    fast = packets.parse(tcp_frame(bytes(10 * PAYLOAD)))
    assert queue.admit(fast, 0.5) is fast
    assert queue.send(fast, 0.5, 0.5)[1] == pytest.approx(0.5015)
    # But no more than the link carries: these came at the same time.
    queue.send(slow, 2.0, 3.0)
    assert queue.send(fast, 2.0, 2.0)[1] == pytest.approx(2.003)


def test_short_pauses_of_a_card_are_no_pauses(packets, link):
    queue = link.Queue(8e6, 1 << 20, 0.0005)
    burst = packets.parse(tcp_frame(bytes(2 * PAYLOAD)))
    assert queue.send(burst, 1.0, 1.0) == (0.9995, pytest.approx(1.0025))
    assert queue.send(burst, 1.0028, 1.0028)[0] == pytest.approx(1.0025)
    assert queue.send(plain(packets, 100), 1.0058, 1.0058)[0] == pytest.approx(1.0058)


def test_full_queue_drops_what_comes_last(packets, link):
    queue = link.Queue(8e6, 6000)
    burst = packets.parse(tcp_frame(bytes(3 * PAYLOAD)))
    assert queue.admit(burst, 0.0) is burst
    queue.send(burst, 0.0, 0.0)
    assert queue.admit(burst, 0.0).segments == 1
    assert queue.admit(plain(packets, 1501), 0.0) is None
    assert queue.dropped_segments == 3
    assert queue.admit(burst, 0.0031).segments == 3  # it has sent for a while
    assert queue.admit(plain(packets, 9000), 1.0) is not None  # larger than the queue, and the link is idle


def test_rate_changes_count_from_now_on(packets, link):
    queue = link.Queue(8e6, 1 << 20)
    queue.send(plain(packets, 10_000), 0.0, 0.0)
    queue.change(link.Queue(4e6, 1 << 20), 0.005)
    assert queue.free_at == pytest.approx(0.015)


def test_queues_hold_a_bandwidth_delay_product(link):
    assert link.Settings(100e6, 100e6, delay_s=0.025).queue_for(100e6) == 625_000
    assert link.Settings(100e6, 100e6).queue_for(100e6) == 512 << 10
    assert link.Settings(queue_bytes=70_000).queue_for(1e9) == 70_000


@pytest.mark.parametrize(
    "wrong", [{"up_bits_per_s": 0}, {"delay_s": -1}, {"delay_s": 61}, {"loss": 1.1}, {"queue_bytes": 0}]
)
def test_impossible_settings_are_refused(link, wrong):
    with pytest.raises(ValueError, match="must"):
        link.Settings(**wrong)


def test_losses_hit_segments_at_their_rate_and_by_their_seed(link):
    def lose(seed):
        loss = link.Loss(0.01, seed)
        return [tuple(loss.passing(44)) for _ in range(5000)], loss.lost_segments

    ranges, lost = lose("a")
    assert lost == pytest.approx(0.01 * 44 * 5000, rel=0.1)
    passed = sum(stop - start for one in ranges for start, stop in one)
    assert passed + lost == 44 * 5000
    assert lose("a") == (ranges, lost)
    assert lose("b")[0] != ranges


@pytest.mark.parametrize(("share", "passing"), [(0.0, [(0, 9)]), (1.0, [])])
def test_all_or_nothing_is_lost(link, share, passing):
    loss = link.Loss(share, "")
    assert [loss.passing(9) for _ in range(3)] == [passing] * 3


def test_wire_is_what_full_segments_leave_and_one_round_trip(load_benchmark):
    scenario = load_benchmark("_wan_scenarios").SCENARIOS["wan"]
    seconds = scenario.wire_seconds(16 << 20, 1500)
    assert seconds == pytest.approx(1.5 * (16 << 20) / (12.5e6 * 1448 / 1500) + 0.05)


@pytest.mark.parametrize(
    ("parse", "good", "value", "wrong"),
    [
        ("parse_rate", "100mbit", 100e6, "100mb"),
        ("parse_rate", "1.5Gbit", 1.5e9, "0bit"),
        ("parse_delay", "25ms", 0.025, "25"),
        ("parse_delay", "100us", 1e-4, "-1ms"),
        ("parse_loss", "0.1%", 0.001, "101%"),
        ("parse_loss", "0.5", 0.5, "%"),
    ],
)
def test_units_are_read_and_others_refused(emulator, parse, good, value, wrong):
    assert getattr(emulator, parse)(good) == pytest.approx(value)
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{wrong}' is not a"):
        getattr(emulator, parse)(wrong)


def test_one_value_is_for_all_hosts(emulator):
    assert emulator.per_host("--rate", [7], 3) == [7, 7, 7]
    with pytest.raises(emulator.EmulatorError, match="--rate has 2 values for 3 hosts"):
        emulator.per_host("--rate", [1, 2], 3)


def test_places_are_filled_in_and_other_braces_stay(emulator):
    assert emulator.fill_in("{host}/{hosts} {x} {}", {"host": "1", "hosts": "4"}) == "1/4 {x} {}"


def test_other_users_are_told_in_one_line(emulator, monkeypatch, capsys):
    monkeypatch.setattr(emulator.kernel.os, "geteuid", lambda: 1000)
    assert emulator.main(["--", "true"]) == 2
    assert capsys.readouterr().err == (
        "wan_emulator.py: emulated networks need root, and this is user 1000: run it with sudo\n"
    )


def test_busy_or_late_emulators_are_not_trusted(emulator):
    effort = {"cpu_share": 0.5, "packets": 1000, "late_packets": 1, "latest_s": 0.002}
    assert "WARNING" not in emulator.describe_effort(effort)
    assert "WARNING" in emulator.describe_effort(effort | {"cpu_share": 0.85})
    assert "WARNING" in emulator.describe_effort(effort | {"late_packets": 50})
