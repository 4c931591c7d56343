from __future__ import annotations

import os
import stat

import pytest

from sparkle_mesh import limits, wire
from sparkle_mesh.discovery.cache import VERSION, CachedPeer, CacheFile, PeerCache

ADDRESS = "/ip4/192.168.1.4/tcp/7"


@pytest.fixture
def cache(tmp_path, tag, wall_clock, entropy):
    return PeerCache(tmp_path, tag, clock=wall_clock, entropy=entropy)


def peer(peer_id, seen_at, *addresses):
    return CachedPeer(peer_id=peer_id, addresses=addresses or (ADDRESS,), seen_at=seen_at)


def test_what_was_saved_is_loaded_last_seen_first(cache, wall_clock):
    now = wall_clock.time
    assert cache.load() == ()
    cache.save([peer("A", now - 10), peer("B", now)])
    assert cache.load() == (peer("B", now), peer("A", now - 10))
    assert stat.S_IMODE(cache.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(cache.path.parent.stat().st_mode) == 0o700


def test_saving_adds_to_what_others_saved(cache, wall_clock):
    now = wall_clock.time
    cache.save([peer("A", now - 10), peer("B", now - 5)])
    cache.save([peer("B", now - 20, "/ip4/1.2.3.4/tcp/1"), peer("C", now)], unreachable=frozenset({"A"}))
    assert cache.load() == (peer("C", now), peer("B", now - 5))
    cache.save([peer("B", now, "/ip4/1.2.3.4/tcp/2")])
    assert peer("B", now, "/ip4/1.2.3.4/tcp/2") in cache.load()


def test_nothing_left_removes_the_file(cache, wall_clock):
    cache.save([peer("A", wall_clock.time)])
    cache.save([], unreachable=frozenset({"A"}))
    assert not cache.path.exists()
    cache.save([])
    assert cache.load() == ()


def test_peers_are_bounded_and_the_newest_stay(cache, wall_clock):
    now = wall_clock.time
    cache.save([peer(f"P{number}", now - number) for number in range(2 * limits.PEER_CACHE_PEERS_MAX_COUNT)])
    loaded = cache.load()
    assert len(loaded) == limits.PEER_CACHE_PEERS_MAX_COUNT
    assert loaded[0].peer_id == "P0"


@pytest.mark.parametrize("distance", [limits.PEER_CACHE_MAX_AGE_S + 1, -limits.PEER_CACHE_MAX_AGE_S - 1, float("nan")])
def test_peers_of_another_time_are_ignored(cache, wall_clock, distance):
    cache.save([peer("A", wall_clock.time - distance), peer("B", wall_clock.time)])
    assert [cached.peer_id for cached in cache.load()] == ["B"]


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"\x83\xa7version\x01", b"x" * (limits.PEER_CACHE_FILE_MAX_BYTES + 1)]
)
def test_a_damaged_file_is_set_aside_and_told(cache, wall_clock, caplog, content):
    cache.path.parent.mkdir()
    cache.path.write_bytes(content)
    assert cache.load() == ()
    assert "is damaged" in caplog.text
    assert cache.path.with_suffix(".damaged").read_bytes() == content
    assert not cache.path.exists()
    cache.save([peer("A", wall_clock.time)])
    assert len(cache.load()) == 1


@pytest.mark.parametrize("change", [{"version": VERSION + 1}, {"mesh_tag": b"u" * 32}])
def test_a_file_of_another_version_or_mesh_is_set_aside(cache, tag, caplog, change):
    cache.path.parent.mkdir()
    cache.path.write_bytes(wire.encode(CacheFile(**{"version": VERSION, "mesh_tag": tag, "peers": (), **change})))
    assert cache.load() == ()
    assert "is damaged" in caplog.text


def test_a_damaged_file_that_cannot_be_moved_is_told(cache, caplog):
    cache.path.parent.mkdir()
    cache.path.write_bytes(b"garbage")
    (cache.path.with_suffix(".damaged") / "full").mkdir(parents=True)
    assert cache.load() == ()
    assert "cannot be moved" in caplog.text


def test_what_is_no_file_is_told(cache, wall_clock, caplog):
    cache.path.mkdir(parents=True)
    assert cache.load() == ()
    assert "cannot be read" in caplog.text
    cache.save([peer("A", wall_clock.time)])
    assert "cannot be cached" in caplog.text
    assert list(cache.path.parent.iterdir()) == [cache.path]


def test_a_folder_that_cannot_be_made_is_told(tmp_path, cache, wall_clock, caplog):
    (tmp_path / "peers").write_text("in the way")
    cache.save([peer("A", wall_clock.time)])
    assert "cannot be cached" in caplog.text


def test_files_of_the_meshes_used_last_stay(tmp_path, wall_clock, entropy, monkeypatch):
    monkeypatch.setattr(limits, "PEER_CACHE_FILES_MAX_COUNT", 3)
    paths = []
    for number in range(5):
        cache = PeerCache(tmp_path, bytes([number]) * 32, clock=wall_clock, entropy=entropy)
        cache.save([peer("A", wall_clock.time)])
        os.utime(cache.path, (number, number))
        paths.append(cache.path)
        (tmp_path / "peers" / "folder").mkdir(exist_ok=True)
    last = PeerCache(tmp_path, b"z" * 32, clock=wall_clock, entropy=entropy)
    last.save([peer("A", wall_clock.time)])
    kept = {path for path in (tmp_path / "peers").iterdir() if path.is_file()}
    assert kept == {last.path, *paths[3:]}


def test_the_name_of_the_file_does_not_tell_the_tag(cache, tag):
    assert tag.hex()[:16] not in cache.path.name
