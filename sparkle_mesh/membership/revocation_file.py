"""The file that keeps who a mesh's founder is and whom it has revoked, for the next start and for other processes.

Its place is the data directory, whose owner may decide both. Whatever process of the owner has heard of a newer list
writes it; none is replaced by an older one of the same founder.
"""

from __future__ import annotations

import logging
from hashlib import sha256
from pathlib import Path

from sparkle_mesh import limits, wire
from sparkle_mesh.clock import SYSTEM_ENTROPY, Entropy
from sparkle_mesh.errors import ProtocolError, UsageError
from sparkle_mesh.fabric.interface import PeerId
from sparkle_mesh.files import make_private_folder, read_bounded, write_private
from sparkle_mesh.membership.revocations import EncodedRevocations, RevocationList

logger = logging.getLogger(__name__)

FOLDER = "revocations"


class _File(wire.Message, frozen=True, kw_only=True):
    version: wire.Count
    founder: wire.PeerIdText
    revocations: EncodedRevocations | None = None


class RevocationFile:
    """Keeps one mesh's list.

    Parameters
    ----------
    mesh
        The mesh's tag.
    """

    def __init__(self, data_dir: Path, mesh: bytes, *, entropy: Entropy = SYSTEM_ENTROPY) -> None:
        self._mesh, self._entropy = mesh, entropy
        self.path = data_dir / FOLDER / f"{sha256(mesh).hexdigest()[:32]}.revocations"

    def load(self, founder: PeerId | None = None) -> RevocationList:
        """Return the list that is kept. A file that cannot be used is told in the log, and counts as none.

        Parameters
        ----------
        founder
            The mesh's; the one that is kept if None.
        """
        kept = self._read()
        revocations = RevocationList(self._mesh, founder or (kept.founder if kept is not None else None))
        if kept is None:
            return revocations
        if kept.founder != revocations.founder:
            logger.warning("%s is of founder %s; it is not believed, and goes", self.path, kept.founder)
        elif kept.revocations is not None:
            try:
                revocations.take(kept.revocations)
            except ProtocolError as error:
                logger.warning("%s is not believed: %s", self.path, error)
        return revocations

    def save(self, revocations: RevocationList) -> None:
        """Keep ``revocations``, unless a newer list of the same founder is kept; nothing if there is no founder.

        Raises
        ------
        UsageError
            If it could not be written.
        """
        if revocations.founder is None:
            return
        kept = self._read()
        is_same = kept is not None and kept.founder == revocations.founder
        if is_same and self.load(revocations.founder).sequence >= revocations.sequence:
            return
        content = _File(version=1, founder=revocations.founder, revocations=revocations.encoded)
        try:
            make_private_folder(self.path.parent)
            write_private(self.path, wire.encode(content), self._entropy)
        except OSError as error:
            raise UsageError(f"{self.path} cannot be written: {error.strerror or error}") from error

    def _read(self) -> _File | None:
        try:
            data = read_bounded(self.path, limits.REVOCATION_FILE_MAX_BYTES)
            content = wire.decode(data, _File, max_bytes=limits.REVOCATION_FILE_MAX_BYTES)
        except FileNotFoundError:
            return None
        except (OSError, ProtocolError) as error:
            logger.warning("%s cannot be used: %s; going on without", self.path, error)
            return None
        if content.version != 1:
            logger.warning(
                "%s is of version %d, and this program reads 1; going on without", self.path, content.version
            )
            return None
        return content
