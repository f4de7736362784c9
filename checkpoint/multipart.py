"""Large objects of an S3 store, through s3fs: several parts on their way at once, in bounded memory."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from checkpoint.storage import check_written, named

PART_BYTES = 16 << 20
"""Bytes of a part, except of the last; more where an object would have more than MAX_PARTS of them."""
MAX_PARTS = 10_000
"""S3's own limit."""
_PARALLEL = 4
"""Parts on their way at once; one more is being filled."""


class Uploads:
    """Multipart uploads to one S3 file system."""

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    @contextlib.contextmanager
    def open(self, path: str, nbytes: int) -> Iterator[_Parts | _Single]:
        """Yield a sink for an object of `nbytes`: there, whole, when the block ends; not at all if it raises."""
        bucket, key, _ = self._fs.split_path(path)
        if nbytes <= PART_BYTES:
            single = _Single(path, nbytes)
            yield single
            with named(path, "write", (Exception,)):
                self._fs.pipe_file(path, single.content())
            return
        place = {"Bucket": bucket, "Key": key}
        with named(path, "create", (Exception,)):
            place["UploadId"] = self._fs.call_s3("create_multipart_upload", **place)["UploadId"]
        try:
            with ThreadPoolExecutor(_PARALLEL, thread_name_prefix="checkpoint-upload") as pool:
                parts = _Parts(self._fs, path, place, nbytes, pool)
                try:
                    yield parts
                    listed = parts.finish()
                finally:
                    pool.shutdown(cancel_futures=True)  # a part that arrives after the abort would stay for ever
            with named(path, "write", (Exception,)):
                self._fs.call_s3("complete_multipart_upload", MultipartUpload={"Parts": listed}, **place)
                self._fs.invalidate_cache(path)
        except BaseException as error:
            try:
                self._fs.call_s3("abort_multipart_upload", **place)
            except Exception as second:  # noqa: BLE001  carried by the first error, which is the one to tell
                error.add_note(f"{path}: its unfinished upload stays in the store: {second}")
            raise

    def abort_under(self, path: str) -> None:
        """Give back the space of the uploads at `path` or below that a killed process left unfinished."""
        bucket, key, _ = self._fs.split_path(path)
        marker: dict[str, str] = {}
        while True:
            page = self._fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=key, **marker)
            for upload in page.get("Uploads", ()):
                if upload["Key"] == key or upload["Key"].startswith(f"{key}/"):
                    self._fs.call_s3(
                        "abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                    )
            if not page.get("IsTruncated"):
                return
            marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


class _Single:
    """An object that one request holds."""

    in_order = True

    def __init__(self, path: str, nbytes: int) -> None:
        self._path = path
        self._nbytes = nbytes
        self._buffer = bytearray()

    def write_at(self, offset: int, data: memoryview) -> None:
        check_written(self._path, len(self._buffer), offset)
        self._buffer += data

    def content(self) -> bytes:
        """Return the object; StorageError unless all of it was handed over."""
        check_written(self._path, len(self._buffer), self._nbytes)
        return bytes(self._buffer)


class _Parts:
    """An object in parts, each sent as soon as it is full."""

    in_order = True

    def __init__(self, fs: Any, path: str, place: dict[str, str], nbytes: int, pool: ThreadPoolExecutor) -> None:
        self._fs = fs
        self._path = path
        self._place = place
        self._nbytes = nbytes
        self._part_bytes = max(PART_BYTES, -(-nbytes // MAX_PARTS))
        self._pool = pool
        self._buffer = bytearray()
        self._written = 0
        self._sending: deque[Future[dict[str, Any]]] = deque()
        self._sent: list[dict[str, Any]] = []

    def write_at(self, offset: int, data: memoryview) -> None:
        check_written(self._path, self._written, offset)
        view = data.cast("B")
        self._written += view.nbytes
        while view.nbytes:
            room = self._part_bytes - len(self._buffer)
            self._buffer += view[:room]
            view = view[room:]
            if len(self._buffer) == self._part_bytes:
                self._send()

    def finish(self) -> list[dict[str, Any]]:
        """Send the rest; return number and tag of each part when all have arrived."""
        check_written(self._path, self._written, self._nbytes)
        if self._buffer:
            self._send()
        while self._sending:
            self._await_oldest()
        return self._sent

    def _send(self) -> None:
        if len(self._sending) == _PARALLEL:
            self._await_oldest()
        number = len(self._sent) + len(self._sending) + 1
        self._sending.append(self._pool.submit(self._upload, number, self._buffer))
        self._buffer = bytearray()

    def _upload(self, number: int, content: bytearray) -> dict[str, Any]:
        answer = self._fs.call_s3("upload_part", PartNumber=number, Body=content, **self._place)
        return {"PartNumber": number, "ETag": answer["ETag"]}

    def _await_oldest(self) -> None:
        with named(self._path, "write", (Exception,)):
            self._sent.append(self._sending.popleft().result())
