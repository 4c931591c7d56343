"""Errors out of nurseries: bare where there is only one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio

from sparkle_mesh.errors import PeerLostError, SparkleError


@contextmanager
def bare_errors() -> Iterator[None]:
    """Raise the one error inside an exception group bare, so that callers can catch it by its type.

    Cancellations beside it do not count; groups of several errors, or of cancellations alone, pass as they are.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        errors = [leaf for leaf in leaves(group) if not isinstance(leaf, trio.Cancelled)]
        if len(errors) == 1:
            error = errors[0]
            raise error from error.__cause__
        raise


@contextmanager
def one_error() -> Iterator[None]:
    """Raise one of several errors of ours that tasks have ended with: one that ends more than a view first.

    Other errors are not hidden behind them: then the group passes as it is.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        errors = [leaf for leaf in leaves(group) if not isinstance(leaf, trio.Cancelled)]
        if not errors or not all(isinstance(error, SparkleError) for error in errors):
            raise
        raise min(errors, key=lambda error: isinstance(error, PeerLostError)) from group


def is_cancellation(error: BaseException) -> bool:
    """Whether ``error`` says that a task was cancelled, and nothing else: alone, or as a group out of nurseries."""
    if isinstance(error, BaseExceptionGroup):
        return all(isinstance(leaf, trio.Cancelled) for leaf in leaves(error))
    return isinstance(error, trio.Cancelled)


def leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    """Return the errors in a group, those of groups within it included."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from leaves(error)
        else:
            yield error
