"""Joining a Ray cluster or starting one, with its authentication token, and reserving room on it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launch import placement
from launch.errors import ClusterError, LaunchError, PlacementError, TokenError

_PROBE_TIMEOUT_S = 5.0
_OBJECT_STORE_BYTES = 128 * 2**20  # of a Ray of our own: ranks exchange nothing through it
_DEFAULT_TOKEN_PATH = Path("~/.ray/auth_token")
_TOKEN_REMEDY = (
    "print the token with `ray get-auth-token` on the cluster's head, and give it to this process in "
    "RAY_AUTH_TOKEN, in a file that RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token"
)


def import_ray() -> Any:
    """The `ray` module.

    Raises: LaunchError that says what to install, when it is not.
    """
    try:
        import ray
    except ImportError as error:
        raise LaunchError(f"Ray is not installed ({error}): pip install 'trainsys[ray]'") from error
    return ray


def find_token(environ: Mapping[str, str]) -> str:
    """Ray's authentication token, from where Ray itself looks for it, in its order; empty when there is none.

    Raises: TokenError when RAY_AUTH_TOKEN_PATH names a file that cannot be read.
    """
    if environ.get("RAY_AUTH_TOKEN"):
        return environ["RAY_AUTH_TOKEN"].strip()
    named = environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else _DEFAULT_TOKEN_PATH.expanduser()
    if not named and not path.exists():
        return ""
    try:
        return path.read_text().strip()
    except OSError as error:
        raise TokenError(f"RAY_AUTH_TOKEN_PATH: {path}: cannot be read: {error.strerror}") from error


def token_error(address: str, what: str) -> TokenError:
    """A missing or wrong token as one error with its remedy."""
    return TokenError(f"{address}: {what}; {_TOKEN_REMEDY}")


def probe(host: str, port: int, address: str) -> None:
    """Raises: ClusterError when nothing listens there; `address` is how the user wrote it."""
    try:
        socket.create_connection((host, port), timeout=_PROBE_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(
            f"{address}: no Ray answers ({error}); start one with `ray start --head`, or correct the address"
        ) from error


@contextlib.contextmanager
def joined(address: str) -> Iterator[bool]:
    """Be connected to a Ray inside the block; yields whether it is one of our own, which ends with the block.

    `address` empty: the cluster that RAY_ADDRESS names, as in a Ray job, else a Ray of our own on this
    machine. A connection that this process already has is used and left as it is.

    Raises: ClusterError, TokenError.
    """
    if address.startswith("ray://"):
        raise ClusterError(
            f"{address}: a Ray client stands outside the cluster, where ranks cannot reach it; "
            "submit a job to the cluster instead"
        )
    own = not address and not os.environ.get("RAY_ADDRESS")
    if "ray" not in sys.modules and (own or find_token(os.environ)):
        # For a Ray of our own the default, without Ray's warning; to a cluster that is named Ray sends the
        # token only if this asks for it. Read when Ray is imported: later it would change half of Ray.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    ray = import_ray()
    if ray.is_initialized():
        yield False
        return
    with _signal_handler_kept():
        try:
            if own:
                _start(ray)
            else:
                _join(ray, address or os.environ["RAY_ADDRESS"])
            yield own
        finally:
            ray.shutdown()


@contextlib.contextmanager
def reserved(demand: Mapping[str, float], world_size: int, *, own: bool, timeout_s: float) -> Iterator[Any]:
    """A placement group with `demand` for each rank, given back at the end of the block.

    Raises: PlacementError with the demand and what the cluster has, at once on a Ray of our own, which cannot
    grow, else when there was no room for `timeout_s`.
    """
    ray = import_ray()
    from ray.util.placement_group import placement_group, remove_placement_group

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = {name: amount for name, amount in demand.items() if amount > 0}
    if own and not placement.fits(wanted, world_size, nodes):
        raise PlacementError(_no_room(ray, wanted, world_size, "which is all there will be"))
    group = placement_group([wanted] * world_size, strategy=placement.strategy(wanted, world_size, nodes))
    try:
        if not group.wait(timeout_seconds=timeout_s):
            raise PlacementError(_no_room(ray, wanted, world_size, f"and had no room in {timeout_s:g} s"))
        yield group
    finally:
        remove_placement_group(group)


def _start(ray: Any) -> None:
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level="WARNING",
            object_store_memory=_OBJECT_STORE_BYTES,
        )
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterError(f"a Ray of our own could not be started: {error}") from error


def _join(ray: Any, address: str) -> None:
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit():  # else it is `auto`, or for Ray to judge
        probe(host.strip("[]"), int(port), address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="WARNING")
    except ray.exceptions.AuthenticationError as error:
        raise token_error(address, "this process has no authentication token") from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        mode = os.environ.get("RAY_AUTH_MODE", "")
        if find_token(os.environ) and mode == "token":
            what = "cannot be joined: the authentication token of this process is not the cluster's"
        elif find_token(os.environ):
            what = f"cannot be joined: RAY_AUTH_MODE is {mode!r}, so that no token is sent; set it to 'token'"
        else:
            what = "cannot be joined: this process has no authentication token"
        if isinstance(error, ConnectionError) and address != "auto":
            # Something listens there; Ray itself logs the refused token, and raises no more than this.
            raise token_error(address, f"{what}, or no Ray of this version answers there") from error
        raise ClusterError(f"{address}: {error}") from error


def _no_room(ray: Any, demand: Mapping[str, float], world_size: int, end: str) -> str:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    has = "; ".join(f"{node['NodeManagerHostname']}: {_amounts(node['Resources'], demand)}" for node in nodes)
    return (
        f"{world_size} ranks of {_amounts(demand, demand)} each cannot be placed: the cluster has {has}, "
        f"{_amounts(ray.available_resources(), demand)} of it free, {end}; "
        "use fewer ranks, or lower launch.cpus_per_rank or launch.gpus_per_rank"
    )


def _amounts(resources: Mapping[str, float], names: Mapping[str, float]) -> str:
    return " and ".join(f"{resources.get(name, 0.0):g} {name}" for name in names)


@contextlib.contextmanager
def _signal_handler_kept() -> Iterator[None]:
    """Give SIGTERM back the handler that `ray.init` replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
