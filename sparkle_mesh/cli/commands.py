"""The commands of ``sparkle-node``: options in, one answer or one clear line out."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from sparkle_mesh import limits
from sparkle_mesh.cli.render import (
    failed,
    found_devices_text,
    one_line,
    peers_text,
    printable,
    profiles_text,
    revoked_text,
    status_text,
    to_json,
)
from sparkle_mesh.cli.signals import StopSignals
from sparkle_mesh.environment import IDENTITY_NAME, resolve_data_dir
from sparkle_mesh.errors import IdentityError, NoNodeError, SparkleError, UsageError

if TYPE_CHECKING:
    from sparkle_mesh.cli.launch import Launch
    from sparkle_mesh.cli.output import LogFormat

F = TypeVar("F", bound=Callable[..., Any])

EXIT_FAILED, EXIT_WRONG_USE = 1, 2
#: Of a disk that stdout goes to. (A pipe that nobody reads is click's affair.)
_OUTPUT_ERRORS = (errno.ENOSPC, errno.EFBIG, errno.EIO)


@dataclass(frozen=True)
class Session:
    """What this process was given beside its arguments."""

    stop: StopSignals
    launch: Launch | None = None


def run_command_line(arguments: Sequence[str], stop: StopSignals, *, launch: Launch | None = None) -> int:
    """Carry out ``arguments`` and return the exit code: 0, 1 for a failure, 2 for wrong use.

    Parameters
    ----------
    stop
        Listening already; commands other than the node itself give the signals back.
    launch
        Opens the node, by default the real one.
    """
    try:
        result = sparkle_node.main(
            args=list(arguments), prog_name="sparkle-node", standalone_mode=False, obj=Session(stop, launch)
        )
    except click.UsageError as error:
        return _complain(f"{error.format_message()} (see `sparkle-node --help`)", EXIT_WRONG_USE)
    except click.ClickException as error:
        return _complain(error.format_message(), EXIT_FAILED)
    except SparkleError as error:
        wrong_use = isinstance(error, UsageError) and not isinstance(error, IdentityError)
        return _complain(str(error), EXIT_WRONG_USE if wrong_use else EXIT_FAILED)
    except OSError as error:
        if error.errno not in _OUTPUT_ERRORS:
            raise
        with suppress(OSError):
            sys.stdout.close()
        return _complain(f"the output could not be written: {error.strerror or error}", EXIT_FAILED)
    return result if isinstance(result, int) else 0


def _complain(message: str, code: int) -> int:
    click.echo(f"sparkle-node: {one_line(message)}", err=True)
    return code


def _data_dir_option(function: F) -> F:
    return click.option(
        "--data-dir",
        type=click.Path(file_okay=False),
        help="Where everything is kept.  [default: $SPARKLE_DATA_DIR, else the user's data folder]",
    )(function)


def _json_option(function: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


def _wait_option(function: F) -> F:
    return click.option(
        "--wait",
        "wait_s",
        type=click.IntRange(0, limits.CONTROL_WAIT_MAX_S),
        metavar="SECONDS",
        default=0,
        help="If no node runs, wait this long for one to be started.",
    )(function)


def _show_version(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        from sparkle_mesh.version import __version__

        click.echo(f"sparkle-node {__version__}")
        context.exit()


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 when it ended as asked (Ctrl-C included), 1 when it failed, 2 when it was called wrongly.",
)
@click.option("--mesh", metavar="NAME", help="The mesh to take part in.  [default: the invite's, else 'sparkle']")
@click.option(
    "--key-file",
    metavar="PATH",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The mesh's key, made by `sparkle-node new-key`. Without one the mesh is open to this host and its LAN.",
)
@click.option("--join", metavar="ADDR|INVITE", multiple=True, help="A peer to begin with, or an invite. Repeatable.")
@click.option(
    "--allow",
    metavar="PEER_ID",
    multiple=True,
    help="Let only this machine in, and the training processes that it certifies. Repeatable.  [default: everybody]",
)
@click.option(
    "--founder",
    metavar="PEER_ID",
    help="The machine that may revoke others; it stands in invites.  [default: the invite's, or who it was last]",
)
@click.option(
    "--listen",
    metavar="MULTIADDR",
    multiple=True,
    help="Where to listen. Repeatable.  [default: /ip4/0.0.0.0/tcp/45654, or a free port if that is taken]",
)
@_data_dir_option
@click.option("--no-lan", is_flag=True, help="Do not look for peers by multicast on the local networks.")
@click.option(
    "--bootstrap",
    metavar="ADDR|/dnsaddr/NAME",
    multiple=True,
    help="A public peer to begin with. Repeatable.  [default: $SPARKLE_BOOTSTRAP, else libp2p's, for a mesh with a key "
    "or --public]",
)
@click.option("--no-public", is_flag=True, help="Do not use public peers to find others.")
@click.option(
    "--relay-bandwidth",
    metavar="SIZE",
    help="What this machine carries a second for peers of the mesh that nobody can dial, once others can dial it; "
    "0 for nothing.  [default: 8MB]",
)
@click.option(
    "--reachability",
    type=click.Choice(["auto", "public", "private"]),
    default="auto",
    show_default=True,
    help="Whether others beyond the local network can dial this machine; auto asks them.",
)
@click.option("--no-port-mapping", is_flag=True, help="Do not ask the router (NAT-PMP, UPnP) to pass connections on.")
@click.option(
    "--public",
    is_flag=True,
    help="Let peers from anywhere into a mesh without a key, and show them this machine's addresses.",
)
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="json: one object a line.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="warning",
    show_default=True,
    help="How much of the log goes to stderr.",
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="Print the version."
)
@click.pass_context
def sparkle_node(context: click.Context, /, **options: Any) -> int | None:
    """Run this machine's node in a Sparkle mesh until Ctrl-C.

    It finds the other peers of the mesh on this host, on the local network and at the addresses it is given,
    prints them as they come and go, and helps training processes on this machine to find theirs.

    \b
    Examples:
      sparkle-node                                          on each machine of a local network
      sparkle-node new-key run.key                          make a key, then ...
      sparkle-node --mesh our-run --key-file run.key        ... run a node that only its holders can meet,
      sparkle-node invite                                   and print the line that lets others in:
      sparkle-node --join "sparkle-invite-1:..."            on a machine anywhere
      sparkle-node --join /ip4/203.0.113.5/tcp/45654/p2p/12D3KooW...
      sparkle-node status                                   how the node on this machine is doing
    """
    session = context.find_object(Session)
    assert session is not None
    if context.invoked_subcommand is not None:
        session.stop.release()
        for name in options:
            if name != "data_dir" and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                option = "--" + name.replace("_", "-")
                raise click.UsageError(f"{option} is for running a node, not for `{context.invoked_subcommand}`")
        return None
    return _run_node(session, **options)


def _run_node(
    session: Session,
    *,
    mesh: str | None,
    key_file: Path | None,
    join: tuple[str, ...],
    allow: tuple[str, ...],
    founder: str | None,
    listen: tuple[str, ...],
    data_dir: str | None,
    no_lan: bool,
    bootstrap: tuple[str, ...],
    no_public: bool,
    relay_bandwidth: str | None,
    reachability: str,
    no_port_mapping: bool,
    public: bool,
    log_format: LogFormat,
    log_level: str,
) -> int:
    from sparkle_mesh.cli.launch import open_real_node
    from sparkle_mesh.cli.output import Reporter, start_logging
    from sparkle_mesh.cli.run import NodeRun, is_port_taken
    from sparkle_mesh.cli.settings import ReachOptions, resolve_settings

    if public and no_public:
        raise click.UsageError("--public and --no-public contradict each other")
    settings = resolve_settings(
        mesh=mesh,
        key_file=key_file,
        join=join,
        allow=allow,
        founder=founder,
        listen=listen,
        public=public,
        lan=not no_lan,
        reach=ReachOptions(
            internet=not no_public,
            bootstrap=bootstrap,
            relay_bandwidth=relay_bandwidth,
            port_mapping=not no_port_mapping,
            reachability=reachability,
        ),
        data_dir=resolve_data_dir(data_dir),
    )
    runs: list[NodeRun] = []
    reporter = Reporter(
        log_format,
        stdout=_descriptor(sys.stdout),
        stderr=_descriptor(sys.stderr),
        on_broken=lambda: runs[0].output_broken() if runs else None,
    )
    stop_logging = start_logging(reporter, log_level)
    runs.append(NodeRun(settings, reporter, session.stop, session.launch or open_real_node))
    try:
        return runs[0].run()
    except SparkleError as error:
        # The options were checked before: what is wrong now is mostly the machine's state, not the call.
        reporter.complain(failed(str(error)))
        wrong_use = isinstance(error, UsageError) and not isinstance(error, IdentityError) and not is_port_taken(error)
        return EXIT_WRONG_USE if wrong_use else EXIT_FAILED
    finally:
        stop_logging()
        reporter.close()


def _descriptor(stream: Any) -> int:
    """Return the file descriptor of stdout or stderr; of nothing if this process was started without."""
    if stream is None:
        return os.open(os.devnull, os.O_WRONLY)
    return int(stream.fileno())


def _resolve_for(context: click.Context, data_dir: str | None) -> Path:
    """Return the data directory given to the subcommand, or before it."""
    before = context.parent.params.get("data_dir") if context.parent is not None else None
    return resolve_data_dir(before if data_dir is None else data_dir)


@sparkle_node.command("id", short_help="Print this machine's peer id.")
@_data_dir_option
@_json_option
@click.pass_context
def show_id(context: click.Context, data_dir: str | None, as_json: bool) -> None:
    """Print this machine's peer id, of the running node or, when none runs, of the next."""
    from sparkle_mesh.cli.control import ask

    directory = _resolve_for(context, data_dir)
    running = True
    try:
        status = ask(directory, "status").status
        assert status is not None
        peer_id = status.peer_id
    except NoNodeError:
        from sparkle_mesh.fabric.identity import load_or_create_identity

        running, peer_id = False, load_or_create_identity(directory / IDENTITY_NAME).peer_id
    click.echo(to_json({"peer_id": peer_id, "running": running}) if as_json else printable(peer_id))


@sparkle_node.command("status", short_help="Print how the running node is doing.")
@_data_dir_option
@_json_option
@_wait_option
@click.pass_context
def show_status(context: click.Context, data_dir: str | None, as_json: bool, wait_s: int) -> None:
    """Print what the running node is and knows: addresses, mesh, devices, view."""
    from sparkle_mesh.cli.control import ask

    status = ask(_resolve_for(context, data_dir), "status", wait_s=wait_s).status
    assert status is not None
    click.echo(to_json(status) if as_json else status_text(status))


@sparkle_node.command("peers", short_help="Print the running node's peers.")
@_data_dir_option
@_json_option
@_wait_option
@click.pass_context
def show_peers(context: click.Context, data_dir: str | None, as_json: bool, wait_s: int) -> None:
    """Print the peers that the running node has, one a line."""
    from sparkle_mesh.cli.control import ask

    peers = ask(_resolve_for(context, data_dir), "peers", wait_s=wait_s).peers
    assert peers is not None
    click.echo(to_json(peers) if as_json else peers_text(peers))


@sparkle_node.command("devices", short_help="Find devices in the running node's mesh.")
@click.option("--kind", metavar="KIND", help="Devices of this kind: cpu, cuda, rocm or opencl.  [default: all]")
@click.option("--min-memory", metavar="SIZE", default="0", help="With at least this much memory: 16GB, 16GiB, 800MB.")
@click.option(
    "--min-gflops",
    metavar="NUMBER",
    type=float,
    default=0.0,
    help="That were measured to do at least as many 10^9 floating-point operations a second.",
)
@click.option("--dtype", metavar="NAME", default="float32", show_default=True, help="What --min-gflops is about.")
@click.option("--limit", metavar="COUNT", type=int, default=100, show_default=True, help="How many to print at most.")
@_data_dir_option
@_json_option
@_wait_option
@click.pass_context
def find_devices(
    context: click.Context,
    kind: str | None,
    min_memory: str,
    min_gflops: float,
    dtype: str,
    limit: int,
    data_dir: str | None,
    as_json: bool,
    wait_s: int,
) -> None:
    """Find devices of all machines in the running node's mesh, the fastest first.

    AGE tells how long ago those who keep a machine's record heard that it is still there.
    """
    from sparkle_mesh.capabilities.search import DeviceQuery
    from sparkle_mesh.cli.control import ask

    query = DeviceQuery.of(kind, min_memory=min_memory, min_gflops=min_gflops, dtype=dtype, limit=limit)
    found = ask(_resolve_for(context, data_dir), "devices", devices=query, wait_s=wait_s).devices
    assert found is not None
    click.echo(to_json(found) if as_json else found_devices_text(found))


@sparkle_node.command("measure", short_help="Measure this machine's devices.")
@_data_dir_option
@_json_option
@click.pass_context
def measure_devices(context: click.Context, data_dir: str | None, as_json: bool) -> None:
    """Measure what this machine's devices do, and keep it: a node that starts after that tells the others.

    It takes some seconds for each device, which should have nothing else to do meanwhile.
    """
    from sparkle_mesh.cli.measuring import measure

    profiles = measure(_resolve_for(context, data_dir), told=sys.stderr if sys.stderr.isatty() else None)
    click.echo(to_json(profiles) if as_json else profiles_text(profiles))


@sparkle_node.command("invite", short_help="Print a line with which others can join.")
@_data_dir_option
@_json_option
@_wait_option
@click.pass_context
def show_invite(context: click.Context, data_dir: str | None, as_json: bool, wait_s: int) -> None:
    """Print one line with which others can join the running node's mesh.

    It holds the mesh's key, if there is one: whoever reads it can join.
    """
    from sparkle_mesh.cli.control import ask

    invite = ask(_resolve_for(context, data_dir), "invite", wait_s=wait_s).invite
    assert invite is not None
    click.echo(to_json({"invite": invite}) if as_json else printable(invite))


@sparkle_node.command("revoke", short_help="Throw a machine out of the mesh, as its founder.")
@click.argument("peer_id", metavar="PEER_ID")
@_data_dir_option
@_json_option
@_wait_option
@click.pass_context
def revoke(context: click.Context, peer_id: str, data_dir: str | None, as_json: bool, wait_s: int) -> None:
    """Throw PEER_ID, and all that it has certified, out of the running node's mesh for good.

    Only the node of the mesh's founder may. All members let go of it at once; who is away learns of it when it comes
    back. Whoever holds the mesh's key can still come under a new peer id: use --allow as well, or change the key.
    """
    from sparkle_mesh.cli.control import ask
    from sparkle_mesh.membership.door import checked_allow

    (peer_id,) = checked_allow("PEER_ID", [peer_id])
    revocations = ask(_resolve_for(context, data_dir), "revoke", revoke=peer_id, wait_s=wait_s).revoke
    assert revocations is not None
    click.echo(to_json(revocations) if as_json else revoked_text(revocations))


@sparkle_node.command("new-key", short_help="Make a key for a mesh.")
@click.argument("path", type=click.Path(path_type=Path, dir_okay=False))
def make_key(path: Path) -> None:
    """Write a new random mesh key to PATH, readable by its owner only.

    Copy the file to every machine of the mesh over a channel that you trust, or send invites.
    """
    from sparkle_mesh.membership.keys import MeshKey

    MeshKey.generate().save(path)
    click.echo(f"wrote a new key to {printable(str(path))}; use it with --key-file {printable(str(path))}")
