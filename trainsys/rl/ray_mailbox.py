"""A store in a Ray cluster: a mailbox that is an actor of its own, found by its name. Extra `ray`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from launch import ray_cluster
from trainsys.rl.errors import SharingError
from trainsys.rl.stores import Mailbox

_NAMESPACE = "trainsys-swarm"
_TIMEOUT_S = 30.0


@contextlib.contextmanager
def serve(name: str, *, keep_s: float, budget_bytes: int) -> Iterator[str]:
    """Keep a mailbox in the Ray this process is connected to; yields the URL that opens it from anywhere in reach.

    The actor ends with the block, or with this process. Its messages are in its own memory, not in Ray's object store,
    where they would die with the node that sent them.
    """
    ray = ray_cluster.import_ray()
    actor_class = ray.remote(num_cpus=0, max_restarts=0, max_concurrency=8)(Mailbox)
    try:
        actor = actor_class.options(name=name, namespace=_NAMESPACE).remote(keep_s=keep_s, budget_bytes=budget_bytes)
        ray.get(actor.names.remote(), timeout=_TIMEOUT_S)
    except (ValueError, ray.exceptions.RayError) as error:
        raise SharingError(f"mailbox {name!r} cannot be started: {error}") from error
    try:
        yield f"ray-actor://{ray.get_runtime_context().gcs_address}/{name}"
    finally:
        ray.kill(actor, no_restart=True)


class RayStore:
    """The mailbox at `ray-actor://HOST:PORT/NAME`; joins that cluster unless this process is in one already."""

    def __init__(self, url: str) -> None:
        """Raises: SharingError where there is no such mailbox; launch.LaunchError where there is no such cluster."""
        address, _, name = url.removeprefix("ray-actor://").partition("/")
        if not address or not name:
            raise SharingError(f"{url}: is no mailbox; allowed: ray-actor://HOST:PORT/NAME")
        self._closing = contextlib.ExitStack()
        self._closing.enter_context(ray_cluster.joined(address))
        self._ray = ray_cluster.import_ray()
        try:
            self._actor: Any = self._ray.get_actor(name, namespace=_NAMESPACE)
        except ValueError as error:
            self._closing.close()
            raise SharingError(f"{url}: the cluster has no mailbox {name!r}; is its swarm still running?") from error

    def publish(self, name: str, message: bytes) -> None:
        self._ask("publish", name, message)

    def names(self) -> list[str]:
        found: list[str] = self._ask("names")
        return found

    def fetch(self, name: str, limit: int) -> bytes | None:
        message: bytes | None = self._ask("fetch", name, limit)
        return message

    def close(self) -> None:
        self._closing.close()

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            return self._ray.get(getattr(self._actor, method).remote(*arguments), timeout=_TIMEOUT_S)
        except self._ray.exceptions.RayError as error:
            raise SharingError(f"the mailbox does not answer: {error}") from error
