"""An S3 store that really answers: a local server, and s3fs as its client over HTTP."""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

import checkpoint
from checkpoint import CheckpointConfig, Checkpointer, StorageError, multipart
from checkpoint.storage import Storage, open_storage
from tests.ranks import run_ranks
from tests.test_checkpoint.test_promotion import promote, promoter
from tests.test_checkpoint.test_storage import StorageContract

# s3fs hands requests over as bytes, which, unlike files, it can send again.
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")

PART_BYTES = 5 << 20
"""The smallest part that S3 takes."""
ERRORS = ("refuse", "deny")
"""Ways to answer a request with an error: without doing it, and although it is done."""
KILLS = ("kill", "reap")
"""Ways to end who asks: before his request is done, and after."""


class Faults:
    """Stands before a store, counts the requests that change it, and does something else at the n-th one."""

    def __init__(self, store: Callable[..., Iterable[bytes]]) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._at, self._how = -1, ""
        self.changes: list[str] = []
        self.fired = 0
        self.before: Callable[[str], None] = lambda change: None

    def arm(self, at: int, how: str = "") -> None:
        """Count from 0 again, and strike at request number `at`."""
        self.changes, self._at, self._how = [], at, how

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method, path, query = environ["REQUEST_METHOD"], environ["PATH_INFO"], environ["QUERY_STRING"]
        if path == "/arm":  # a request of another process of the test
            self.arm(**json.loads(urllib.request.unquote(query)))
            start_response("200 OK", [])
            return []
        if method in ("GET", "HEAD"):
            return self._store(environ, start_response)
        with self._lock:
            is_struck = len(self.changes) == self._at
            self.changes.append(f"{method} {path}?{query}")
        self.before(self.changes[-1])
        return self._strike(environ, start_response) if is_struck else self._store(environ, start_response)

    def _strike(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        self.fired += 1
        if self._how in ("deny", "reap"):
            list(self._store(environ, lambda *_: None))
        else:
            environ["wsgi.input"].read(
                None if "HTTP_TRANSFER_ENCODING" in environ else int(environ["CONTENT_LENGTH"] or 0)
            )
        if self._how in KILLS:
            os.kill(int(environ["HTTP_USER_AGENT"].partition("process/")[2].split()[0]), signal.SIGKILL)
        start_response("403 Forbidden", [("Content-Type", "application/xml")])
        return [b"<Error><Code>AccessDenied</Code><Message>struck</Message></Error>"]


class Handler(WSGIRequestHandler):
    def log(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def faults() -> Faults:
    return Faults(DomainDispatcherApplication(create_backend_app))


@pytest.fixture(scope="module")
def endpoint(faults: Faults) -> Iterator[str]:
    """A store with a bucket, for as long as this module is tested."""
    server = make_server("127.0.0.1", 0, faults, threaded=True, request_handler=Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.port}"
    client(address).mkdir("bucket")
    yield address
    server.shutdown()
    thread.join()
    server.server_close()


def options(endpoint: str) -> dict[str, Any]:
    """Return what s3fs needs; requests carry the process that asks."""
    agent = {"user_agent_extra": f"process/{os.getpid()}"}
    return {"key": "key", "secret": "secret", "endpoint_url": endpoint, "config_kwargs": agent}


def client(endpoint: str) -> Any:
    return fsspec.filesystem("s3", **options(endpoint))


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multipart, "PART_BYTES", PART_BYTES)


@pytest.fixture
def root(endpoint: str, tmp_path: Path) -> str:
    return f"s3://bucket/{tmp_path.name}"


def unfinished(endpoint: str, folder: str = "") -> list[str]:
    """Return the keys of uploads that were begun and neither completed nor aborted."""
    found = client(endpoint).call_s3("list_multipart_uploads", Bucket="bucket", Prefix=folder)
    return [upload["Key"] for upload in found.get("Uploads", ())]


def place_of(url: str) -> str:
    """Return the key at a URL."""
    return url.removeprefix("s3://bucket/")


class TestS3Storage(StorageContract):
    @pytest.fixture
    def storage(self, root: str, endpoint: str) -> Storage:
        return open_storage(root, options(endpoint))

    def test_its_url_opens_it_again(self, storage: Storage) -> None:
        storage.write("folder/file", b"x")
        assert open_storage(storage.url, storage.reopening["options"]).read("folder/file") == b"x"


@pytest.mark.usefixtures("small_parts")
class TestLargeObjects:
    """What goes in parts."""

    NBYTES = 4 * PART_BYTES + 12_345

    @pytest.fixture
    def storage(self, root: str, endpoint: str) -> Storage:
        return open_storage(root, options(endpoint))

    def write(self, storage: Storage) -> bytes:
        content = bytes(range(251)) * (self.NBYTES // 251 + 1)
        borders = [0, 10, 3_000_000, PART_BYTES, 17_000_000, self.NBYTES]
        with storage.create_at("folder/file", self.NBYTES) as sink:
            assert sink.in_order
            for start, end in itertools.pairwise(borders):
                sink.write_at(start, memoryview(content)[start:end])
        return content[: self.NBYTES]

    def test_its_parts_are_on_their_way_at_once(self, storage: Storage, endpoint: str, faults: Faults) -> None:
        together = threading.Barrier(4)

        def meet(change: str) -> None:
            if any(f"partNumber={i}" in change for i in (1, 2, 3, 4)):
                together.wait(20)

        faults.before = meet
        try:
            content = self.write(storage)
        finally:
            faults.before = lambda change: None
        assert storage.read("folder/file") == content
        assert client(endpoint).info(f"{storage.url}/folder/file")["ETag"].strip('"').endswith("-5")
        assert unfinished(endpoint) == []

    @pytest.mark.parametrize("at", range(7))
    def test_a_request_that_is_refused_fails_the_file_and_leaves_no_upload(
        self, storage: Storage, endpoint: str, faults: Faults, at: int
    ) -> None:
        faults.arm(at, "refuse")
        before = faults.fired
        with pytest.raises(StorageError, match=r"folder/file: cannot (create|write): struck"):
            self.write(storage)
        assert faults.fired == before + 1
        assert storage.size("folder/file") is None
        assert unfinished(endpoint) == []

    def test_a_block_that_raises_leaves_no_upload(self, storage: Storage, endpoint: str) -> None:
        def fail_half_way() -> None:
            with storage.create_at("folder/file", self.NBYTES) as sink:
                sink.write_at(0, memoryview(bytes(2 * PART_BYTES)))
                raise KeyError

        with pytest.raises(KeyError):
            fail_half_way()
        assert storage.entries("folder") == []
        assert unfinished(endpoint) == []

    def test_removing_a_folder_aborts_what_a_killed_process_left_in_it(self, storage: Storage, endpoint: str) -> None:
        place = place_of(storage.url)
        keys = [f"{place}/folder/file", f"{place}/folder/inner/file", f"{place}/folder2/file"]
        for key in keys:
            client(endpoint).call_s3("create_multipart_upload", Bucket="bucket", Key=key)
        storage.remove("folder")
        assert unfinished(endpoint, place) == keys[2:]
        storage.remove("folder2")
        assert unfinished(endpoint, place) == []


def test_a_put_whose_answer_was_lost_is_recognised(root: str, endpoint: str, faults: Faults):
    storage = open_storage(root, options(endpoint))
    faults.arm(0, "deny")
    storage.write_new("COMMIT.json", b"ours")
    assert storage.read("COMMIT.json") == b"ours"


# Checkpoints


def weights(step: int) -> dict[str, torch.Tensor]:
    """A state that tells its step everywhere, in a shard of two parts."""
    return {"large": torch.full((1_500_000,), float(step)), "small": torch.full((7, 3), step)}


def save_on(root: str, endpoint: str, step: int) -> None:
    with Checkpointer(root, config=CheckpointConfig(keep_last=1), storage_options=options(endpoint)) as ck:
        ck.save(step, weights(step), {"step": step}, shared={"step": step}).result(60)


def assert_whole(root: str, endpoint: str, steps: set[int]) -> int:
    """Assert that the newest checkpoint is bit for bit one save, of one of `steps`; return its step."""
    ck = Checkpointer(root, storage_options=options(endpoint))
    info = ck.latest("deep")
    assert info is not None
    assert info.step in steps
    target = weights(0)
    loaded = ck.load(info, target)
    assert all(torch.equal(target[name], value) for name, value in weights(info.step).items())
    assert loaded.objects == loaded.shared == {"step": info.step}
    ck.close()
    return info.step


@pytest.mark.usefixtures("small_parts")
def test_checkpoints_are_saved_listed_loaded_and_superseded(root: str, endpoint: str):
    for step in (1, 2):
        save_on(root, endpoint, step)
        assert_whole(root, endpoint, {step})
    ck = Checkpointer(root, storage_options=options(endpoint))
    (info,) = ck.list()
    assert info.path.startswith(root)
    found = checkpoint.read(info.path, "small", storage_options=options(endpoint))
    assert torch.equal(found["small"], weights(2)["small"])
    ck.close()


@pytest.mark.usefixtures("small_parts")
def test_a_writer_process_uploads_too(root: str, endpoint: str):
    config = CheckpointConfig(writer="process")
    with Checkpointer(root, config=config, storage_options=options(endpoint)) as ck:
        for step in (1, 2):
            ck.save(step, weights(step), {"step": step}, shared={"step": step}).result(60)
    assert_whole(root, endpoint, {2})


@pytest.mark.usefixtures("small_parts")
def test_an_error_of_any_request_leaves_the_old_or_the_new_checkpoint(root: str, endpoint: str, faults: Faults):
    total = num_changes(root, endpoint, faults)
    before, told = faults.fired, 0
    for at in range(total):
        case = f"{root}/{at}"
        copy(f"{root}/one", case, endpoint)
        faults.arm(at, ERRORS[at % 2])
        try:
            save_on(case, endpoint, 2)
        except StorageError:
            told += 1
        faults.arm(-1)
        assert_whole(case, endpoint, {1, 2})
    assert faults.fired == before + total
    assert told >= 6  # all but those of the collection, and a commit that was there all the same


def test_a_process_killed_at_any_request_leaves_the_old_or_the_new_checkpoint(
    root: str, endpoint: str, faults: Faults, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(multipart, "PART_BYTES", PART_BYTES)
    total = num_changes(root, endpoint, faults)
    for at in range(total):
        copy(f"{root}/one", f"{root}/{at}", endpoint)
    before = faults.fired
    run_ranks(_be_killed_everywhere, 1, root, endpoint, total, timeout_s=120)
    assert faults.fired == before + total
    steps = [assert_whole(f"{root}/{at}", endpoint, {1, 2}) for at in range(total)]
    assert steps == sorted(steps)
    assert set(steps) == {1, 2}
    for at in range(2, 5):  # killed in the middle of an upload
        assert unfinished(endpoint, f"{place_of(root)}/{at}/") != []
        save_on(f"{root}/{at}", endpoint, 3)
        assert unfinished(endpoint, f"{place_of(root)}/{at}/") == []  # collected with the attempt it belonged to
        assert len(client(endpoint).ls(f"{root}/{at}", refresh=True)) == 1


def num_changes(root: str, endpoint: str, faults: Faults) -> int:
    """How many requests of a second save, and of the removal of the first, change the store; leaves step 1 in `one`."""
    save_on(f"{root}/one", endpoint, 1)
    copy(f"{root}/one", f"{root}/again", endpoint)
    faults.arm(-1)
    save_on(f"{root}/again", endpoint, 2)
    kinds = " ".join(faults.changes)
    assert all(kind in kinds for kind in ("uploads", "partNumber=2", "uploadId", "COMMIT.json", "delete"))
    return len(faults.changes)


def copy(source: str, target: str, endpoint: str) -> None:
    fs = client(endpoint)
    for path in fs.find(source, refresh=True):
        fs.cp_file(path, target.removeprefix("s3://") + path.removeprefix(source.removeprefix("s3://")))


def _be_killed_everywhere(rank: int, world_size: int, root: str, endpoint: str, total: int) -> None:
    """Save from one process after the other, each killed at another request."""
    multipart.PART_BYTES = PART_BYTES
    fsspec.get_filesystem_class("s3")  # imported once
    for at in range(total):
        command = urllib.request.quote(json.dumps({"at": at, "how": KILLS[at % 2]}))
        urllib.request.urlopen(f"{endpoint}/arm?{command}").close()
        child = os.fork()
        if not child:
            save_on(f"{root}/{at}", endpoint, 2)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"request {at} never came"


# Copies from a local disk


def saved_locally(folder: Path) -> Path:
    with Checkpointer(folder / "local") as ck:
        ck.save(1, weights(1), {"step": 1}, shared={"step": 1}).result(60)
    return folder / "local"


def num_changes_of_a_copy(local: Path, root: str, endpoint: str, faults: Faults) -> int:
    faults.arm(-1)
    promote(local, open_storage(f"{root}/first", options(endpoint)))
    return len(faults.changes)


@pytest.mark.usefixtures("small_parts")
def test_a_copy_that_meets_an_error_at_any_request_is_tried_again_until_it_is_whole(
    root: str, endpoint: str, faults: Faults, tmp_path: Path
):
    local = saved_locally(tmp_path)
    total = num_changes_of_a_copy(local, root, endpoint, faults)
    assert total >= 7
    for at in range(total):
        before = faults.fired
        faults.arm(at, ERRORS[at % 2])
        promote(local, open_storage(f"{root}/{at}", options(endpoint)))
        assert faults.fired == before + 1
        assert_whole(f"{root}/{at}", endpoint, {1})
    assert unfinished(endpoint, place_of(root)) == []


def test_a_copy_killed_at_any_request_is_completed_by_the_next_launch(
    root: str, endpoint: str, faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(multipart, "PART_BYTES", PART_BYTES)
    local = saved_locally(tmp_path)
    total = num_changes_of_a_copy(local, root, endpoint, faults)
    before = faults.fired
    run_ranks(_copy_and_be_killed_everywhere, 1, str(local), root, endpoint, total, timeout_s=120)
    assert faults.fired == before + total
    for at in range(total):
        assert_whole(f"{root}/{at}", endpoint, {1})


def _copy_and_be_killed_everywhere(
    rank: int, world_size: int, local: str, root: str, endpoint: str, total: int
) -> None:
    """Copy from one process after the other, each killed at another request, and again from one that takes it up."""
    multipart.PART_BYTES = PART_BYTES
    fsspec.get_filesystem_class("s3")  # imported once
    for at in range(total):
        for strike in (at, -1):
            command = urllib.request.quote(json.dumps({"at": strike, "how": KILLS[at % 2]}))
            urllib.request.urlopen(f"{endpoint}/arm?{command}").close()
            child = os.fork()
            if not child:
                remote = open_storage(f"{root}/{at}", options(endpoint))
                if strike >= 0:
                    promote(Path(local), remote)
                os._exit(0 if promoter(Path(local), remote).close(60) else 1)
            _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status) if strike >= 0 else status == 0, f"request {at}: {status}"
