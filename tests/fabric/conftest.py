"""Fixtures of the fabric's tests."""

from __future__ import annotations

import pytest

from sparkle_mesh.errors import LinkClosedError


class ScriptedStream:
    """A ``FabricStream`` that reads from given bytes, at most ``piece`` at a time, and keeps what is written."""

    peer_id = "scripted-peer"

    def __init__(self, data: bytes = b"", piece: int = 1 << 20) -> None:
        self.data = data
        self.piece = piece
        self.written = b""
        self.largest_read = 0
        self.closed = False

    async def read(self, max_bytes: int) -> bytes:
        self.largest_read = max(self.largest_read, max_bytes)
        count = min(max_bytes, self.piece)
        data, self.data = self.data[:count], self.data[count:]
        return data

    async def write(self, data: bytes) -> None:
        if self.closed:
            raise LinkClosedError("closed")
        self.written += data

    async def aclose(self) -> None:
        self.closed = True

    async def reset(self) -> None:
        self.closed = True


@pytest.fixture
def scripted_stream() -> type[ScriptedStream]:
    return ScriptedStream
