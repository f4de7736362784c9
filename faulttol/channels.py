"""Who is at the other end of a bare backend: a channel between ranks that no process group names.

Its ranks are places in the channel. So each end tells, in the store through which the channel is made, which rank of
the job it is; the first also gives the channel a name. Asked is only what is there: nothing waits for an end that
does not record.
"""

from __future__ import annotations

import itertools
import json
import weakref
from typing import Any


class Channels:
    """The bare backends of this process."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._count = itertools.count(1)
        self._made: weakref.WeakKeyDictionary[Any, tuple[Any, int, int]] = weakref.WeakKeyDictionary()
        self._known: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def announce(self, store: Any, place: int) -> None:
        """Tell the other ends who is at this place."""
        name = f"channel {self._rank}.{next(self._count)}"
        store.set(_key(place), json.dumps([self._rank, name]))

    def remember(self, backend: Any, store: Any, place: int, size: int) -> None:
        """Keep, as long as the backend lives, where the other ends tell."""
        self._made[backend] = (store, place, size)

    def resolve(self, backend: Any) -> tuple[str, tuple[int, ...]]:
        """Return the channel's name and its ranks in the job; an empty tuple while an end has not told."""
        made = self._made.get(backend)
        if made is not None:
            store, _, size = made
            keys = [_key(place) for place in range(size)]
            if store.check(keys):
                told = [json.loads(store.get(key)) for key in keys]
                return str(told[0][1]), tuple(int(rank) for rank, _ in told)
        return f"channel of unknown ends of rank {self._rank}", ()

    def known(self, backend: Any) -> Any:
        """Return what `know` was given, or None."""
        return self._known.get(backend)

    def know(self, backend: Any, what: Any) -> None:
        """Keep something of a backend as long as it lives."""
        self._known[backend] = what


def _key(place: int) -> str:
    return f"faulttol/{place}"
