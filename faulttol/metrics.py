"""What a run's rings say, as counters for Prometheus: a page on a port, or a file for a collector of text files."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from faulttol.errors import RingError
from faulttol.events import CollectiveEvent
from faulttol.ring import RingReader

_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FAMILIES = (
    ("faulttol_collectives_total", "counter", "Collectives and messages that ended."),
    ("faulttol_collective_bytes_total", "counter", "Bytes that the rank gave to them, or got of a receipt."),
    ("faulttol_collective_seconds_total", "counter", "Time that they took, waiting for others included."),
    ("faulttol_collectives_failed_total", "counter", "Those that failed."),
    ("faulttol_lost_records_total", "counter", "Records that nobody read in time, or that could not be written."),
    ("faulttol_open_collectives", "gauge", "Those that go on."),
    ("faulttol_oldest_open_seconds", "gauge", "How long the oldest of these has been open."),
    ("faulttol_step", "gauge", "The step of the rank's last mark."),
    ("faulttol_sign_age_seconds", "gauge", "Time since the rank's recorder gave a sign of life."),
)


class Metrics:
    """Counts over the rings in a folder, as many as there are whenever it is asked. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._ranks: dict[Path, _Rank] = {}

    def text(self) -> str:
        """Return all metrics in Prometheus's text format."""
        with self._lock:
            for path in sorted(self._folder.rglob("*.ring")):
                if path not in self._ranks:
                    with contextlib.suppress(FileNotFoundError, RingError):  # it is being made, or none of ours
                        self._ranks[path] = _Rank(RingReader(path))
            samples: dict[str, list[str]] = {name: [] for name, _, _ in _FAMILIES}
            for rank in self._ranks.values():
                for name, labels, value in rank.samples():
                    samples[name].append(f"{name}{{{labels}}} {value:.17g}")
        lines = []
        for name, kind, told in _FAMILIES:
            lines += [f"# HELP {name} {told}", f"# TYPE {name} {kind}", *samples[name]]
        return "\n".join(lines) + "\n"

    def write(self, path: Path) -> None:
        """Write them to a file, which is whole at every moment."""
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        unfinished.write_text(self.text())
        unfinished.replace(path)

    def close(self) -> None:
        """Let go of the rings. Idempotent."""
        with self._lock:
            for rank in self._ranks.values():
                rank.reader.close()
            self._ranks.clear()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Rank:
    """Counts over one ring."""

    def __init__(self, reader: RingReader) -> None:
        self.reader = reader
        self._ended: Counter[tuple[str, str]] = Counter()
        self._failed: Counter[tuple[str, str]] = Counter()
        self._bytes: Counter[tuple[str, str]] = Counter()
        self._ns: Counter[tuple[str, str]] = Counter()
        self._open: dict[int, CollectiveEvent] = {}
        self._step = -1

    def samples(self) -> Iterator[tuple[str, str, float]]:
        """Take in what is new; give (name, labels, value)."""
        record = self.reader.poll()
        for event in record.events:
            self._take(event)
        for mark in record.marks:
            self._step = max(self._step, mark.step)
        oldest = self.reader.num_begun - self.reader.info.capacity
        self._open = {index: event for index, event in self._open.items() if index > oldest}
        who = f'rank="{record.rank}",generation="{record.generation}"'
        for name, counts in (
            ("faulttol_collectives_total", self._ended),
            ("faulttol_collective_bytes_total", self._bytes),
            ("faulttol_collectives_failed_total", self._failed),
        ):
            for (kind, group), value in sorted(counts.items()):
                yield name, f'{who},kind="{kind}",group="{_escaped(group)}"', value
        for (kind, group), value in sorted(self._ns.items()):
            yield "faulttol_collective_seconds_total", f'{who},kind="{kind}",group="{_escaped(group)}"', value / 1e9
        begun = min((event.begin_ns for event in self._open.values()), default=record.now_ns)
        yield "faulttol_lost_records_total", who, record.num_lost
        yield "faulttol_open_collectives", who, len(self._open)
        yield "faulttol_oldest_open_seconds", who, max(0, record.now_ns - begun) / 1e9
        yield "faulttol_step", who, self._step
        yield "faulttol_sign_age_seconds", who, max(0, record.now_ns - self.reader.sign_ns) / 1e9

    def _take(self, event: CollectiveEvent) -> None:
        key = event.kind, event.group
        if event.state == "begun":
            self._open[event.index] = event
            return
        self._open.pop(event.index, None)
        if event.state == "failed":
            self._failed[key] += 1
            return
        self._ended[key] += 1
        self._bytes[key] += event.bytes
        self._ns[key] += event.duration_ns or 0


@contextlib.contextmanager
def serve(metrics: Metrics, port: int, host: str = "127.0.0.1") -> Iterator[int]:
    """Serve `/metrics` while the block runs; give the port, which the system chooses where `port` is 0.

    Raises: OSError when the port is taken.
    """

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/metrics":
                self.send_error(404, "only /metrics is here")
                return
            body = metrics.text().encode()
            self.send_response(200)
            self.send_header("Content-Type", _TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Say nothing: it is asked every few seconds."""

    with ThreadingHTTPServer((host, port), Page) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="faulttol-metrics", daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def write_forever(metrics: Metrics, path: Path, every_s: float, stop: threading.Event) -> None:
    """Write them to a file again and again, until told to stop."""
    while True:
        begin = time.monotonic()
        metrics.write(path)
        if stop.wait(max(0.0, every_s - (time.monotonic() - begin))):
            return


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
