"""Every exception Sparkle raises on purpose.

The children of :class:`SparkleError` are siblings by cause, so that a caller can tell its own mistake
(:class:`UsageError`) from a peer's (:class:`ProtocolError`), from something that has ended
(:class:`ClosedError`), from a wait that ran out (:class:`DeadlineError`), from a member that died
(:class:`PeerLostError`), from ranks that do not agree (:class:`AgreementError`) and from a device that
fails (:class:`DeviceError`).
"""

from __future__ import annotations


class SparkleError(Exception):
    """Base of every error Sparkle raises on purpose."""


# --- The caller's mistakes ---------------------------------------------------------------------


class UsageError(SparkleError, ValueError):
    """The caller asked for something that cannot be; the message says what and what to do instead."""


class ForkedProcessError(UsageError):
    """A mesh or a context was used in a forked child; only the process that opened it may use it."""


class IdentityError(UsageError):
    """A key file is damaged, readable by others, or not ours; it is left as it was."""


# --- A peer's faults ---------------------------------------------------------------------------


class ProtocolError(SparkleError):
    """A peer sent bytes that break the protocol; its link is closed and counted."""


class AuthenticationError(ProtocolError):
    """A proof or an authenticated record did not verify: forged, replayed, reordered or truncated."""


class WrongKeyError(AuthenticationError):
    """Two processes met that do not hold the same mesh key (or do not mean the same mesh)."""


class VersionError(ProtocolError):
    """A peer speaks a version of a protocol that this one does not."""


# --- Things that have ended --------------------------------------------------------------------


class ClosedError(SparkleError):
    """The thing was closed, here or by the peer, before or during the call."""


class LinkClosedError(ClosedError):
    """A link to a peer is closed."""


class MeshClosedError(ClosedError):
    """The mesh was left or closed."""


class ExcludedError(MeshClosedError):
    """The other members went on without this process, because it was silent or could not be reached."""


class QuorumLostError(MeshClosedError):
    """So many members are lost that those left cannot decide for the mesh; others may go on without them."""


class MeshMergedError(MeshClosedError):
    """Another mesh of this name was met, which goes on: ``synchronize`` brings this process into it, as a newcomer."""


class UnreachableError(SparkleError):
    """A peer could not be reached at any of its addresses; the message lists each and why."""


class LinkRefusedError(UnreachableError):
    """A peer was reached and does not want a link; the message gives its reason."""


# --- Waits that ran out ------------------------------------------------------------------------


class DeadlineError(SparkleError, TimeoutError):
    """A deadline passed; the message names what was awaited and from whom."""


class JoinTimeoutError(DeadlineError):
    """Too few peers agreed on a view within ``timeout_s``."""


class CollectiveTimeoutError(DeadlineError):
    """A collective did not finish within ``timeout_s``; the message names the absent ranks."""


# --- Members -----------------------------------------------------------------------------------


class PeerLostError(SparkleError):
    """A member of the view died, closed its links, or fell silent."""


class AgreementError(SparkleError):
    """The ranks of a view do not agree on something they must agree on."""


class MismatchError(AgreementError, ValueError):
    """Ranks called different collectives, or the same one with other shapes, dtypes or ops."""


class DivergenceError(AgreementError):
    """Ranks computed results with different digests; nothing was written to the caller's arrays."""


class CollectiveAbortedError(AgreementError):
    """Another rank gave the collective up (cancelled, interrupted or failed locally)."""


class OutcomeUnknownError(AgreementError, DeadlineError):
    """This rank gave up when others may have the result already; it has left the group.

    Arrays are as they were, but for those of ``mesh.allocate``, which may hold a part of the result.
    """


# --- Devices -----------------------------------------------------------------------------------


class DeviceError(SparkleError):
    """A device, or its driver, could not do what it was asked."""


class OutOfMemoryError(DeviceError, MemoryError):
    """A device has too little free memory; the message names the device, what was asked and what is free."""


class CompileError(DeviceError):
    """A device's compiler refused a kernel's source; the message holds what the compiler said."""


class ReleasedError(ClosedError):
    """A buffer, or a block of a device's memory, was used after it had been released."""


# --- The machine's node ------------------------------------------------------------------------


class NodeRunningError(SparkleError):
    """A node runs on this data directory already; the message names its process."""


class NoNodeError(SparkleError):
    """No node answers on this data directory."""


class NodeBusyError(SparkleError):
    """The node refused or broke off a request on its control socket; the message says why."""


# --- Kernels -----------------------------------------------------------------------------------


class KernelError(SparkleError, ValueError):
    """A kernel cannot be what it is said to be: an operation, a type or a number in it is wrong."""


class KernelStoppedError(SparkleError):
    """A kernel was given up before its end, as asked; what its outputs hold is undefined."""


class TraceError(KernelError):
    """A function cannot be made a kernel; the message names its file and line, what was wrong, and what to do."""
