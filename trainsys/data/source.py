"""Which files a path means: `stdlib`, a file, a folder, a glob, any fsspec URL of these."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import sysconfig
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any, Literal

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations

from trainsys.data.errors import DataError, NoSourceError, UnreadableSourceError
from trainsys.data.shard import META, PREPARED_KIND

Kind = Literal["text", "jsonl", "parquet"]

_PROSE = ("txt", "text", "md", "markdown", "rst", "org", "tex")
_SYSTEMS_CODE = ("c", "h", "cc", "cpp", "hpp", "cu", "cuh", "rs", "go", "java")
_SCRIPT_CODE = ("py", "pyi", "js", "ts", "rb", "sh", "lua", "jl", "r", "sql")
TEXT_SUFFIXES = frozenset(f".{name}" for name in _PROSE + _SYSTEMS_CODE + _SCRIPT_CODE)
"""Files read whole, as they are: one file, one document."""
JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})
PARQUET_SUFFIXES = frozenset({".parquet"})
COMPRESSION_SUFFIXES = frozenset({".gz", ".bz2", ".xz", ".zst"})
"""May follow a text or JSONL suffix; Parquet compresses inside."""

_BUFFER_BYTES = 1 << 20
_NOT_STDLIB = ("site-packages", "dist-packages", "__pycache__")
# What file systems call the thing that changes when a file's bytes change, best first.
_VERSION_KEYS = (
    "ETag",
    "etag",
    "md5Hash",
    "content_md5",
    "mtime",
    "LastModified",
    "last_modified",
    "updated",
    "created",
)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file to read, and what tells whether it changed."""

    url: str
    """Full fsspec URL or local path; also the name in messages."""
    path: str
    """The path as `filesystem` wants it."""
    kind: Kind
    compression: str
    """`""`, `"gz"`, `"bz2"`, `"xz"` or `"zst"`."""
    size: int | None
    """Bytes as stored, where the file system knows."""
    version: str
    """Modification time or entity tag; empty where the file system has neither."""
    filesystem: Any

    @contextmanager
    def open(self) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
        """The decompressed stream, and the stored one under it (for progress).

        Raises:
            UnreadableSourceError: the storage refuses, or what it holds cannot be decompressed.
        """
        try:
            with self.filesystem.open(self.path, "rb") as stored:
                # A remote file is slow line by line.
                whole = stored if _is_local(self.filesystem) else io.BufferedReader(stored, _BUFFER_BYTES)
                yield _decompressed(whole, self.compression), stored
        except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
            raise UnreadableSourceError(f"{self.url}: cannot be read: {_one_line(error)}") from error


def find_files(path: str) -> list[SourceFile]:
    """Every file `path` means, sorted by path.

    A folder is walked recursively; in it, hidden entries, files of unknown kinds, prepared folders and links
    to folders are passed over. A file named outright, or matched by a glob, must be of a known kind.

    Raises:
        NoSourceError: nothing there, an unknown kind, or a protocol that is unknown or not installed.
    """
    if path == "stdlib":
        return _stdlib_files()
    filesystem, root = _filesystem(path)
    filesystem.invalidate_cache()
    try:
        return _find(path, filesystem, root)
    except (FileNotFoundError, NotADirectoryError) as error:
        inside = error.filename is not None and str(error.filename) != root
        what = f"{error.filename} leads nowhere" if inside else "nothing there"
        raise NoSourceError(f"{path}: {what}") from error
    except OSError as error:
        raise UnreadableSourceError(f"{path}: cannot be listed: {_one_line(error)}") from error
    except Exception as error:
        # A client of a remote store has errors of its own, that are no OSError (credentials, connections).
        if isinstance(error, DataError) or isinstance(filesystem, LocalFileSystem):
            raise
        raise UnreadableSourceError(f"{path}: cannot be listed: {_one_line(error)}") from error


def _find(path: str, filesystem: Any, root: str) -> list[SourceFile]:
    try:
        info = filesystem.info(root)
    except FileNotFoundError:
        if not any(character in root for character in "*?["):
            raise
        return _matched(path, filesystem, root)
    if info["type"] != "directory":
        return [_named_file(filesystem, root, info)]
    return _walked(path, filesystem, root)


def _matched(path: str, filesystem: Any, pattern: str) -> list[SourceFile]:
    """The files a glob matches; hidden ones only where the pattern spells a dot."""
    matched = _files(filesystem, filesystem.glob(pattern, detail=True))
    if "/." not in pattern:
        matched = {name: entry for name, entry in matched.items() if not _is_hidden(name)}
    if not matched:
        raise NoSourceError(f"{path}: the pattern matches no file")
    return [_named_file(filesystem, name, entry) for name, entry in sorted(matched.items())]


def _walked(path: str, filesystem: Any, root: str) -> list[SourceFile]:
    """The files of known kinds under a folder, but for hidden ones and for prepared folders."""
    entries = filesystem.find(root, detail=True)
    seen = {name: entry for name, entry in entries.items() if not _is_hidden(name.removeprefix(root))}
    files = _files(filesystem, seen)
    prepared = tuple(
        name.removesuffix(META)
        for name, entry in files.items()
        if name.endswith(f"/{META}") and PREPARED_KIND.encode() in filesystem.cat_file(name, 0, 200)
    )
    files = {name: entry for name, entry in files.items() if not name.startswith(prepared)}
    known = [
        _file(filesystem, name, entry, kind)
        for name, entry in sorted(files.items())
        if (kind := _kind(name)) is not None
    ]
    if not known:
        suffixes = {PurePosixPath(name).suffix or PurePosixPath(name).name for name in files}
        found = f"found only {', '.join(sorted(suffixes)[:8])}" if suffixes else "it is empty"
        found = "a prepared folder is used from a local disk, as data.path alone" if prepared else found
        raise NoSourceError(f"{path}: no file of a known kind in this folder ({found}); {_known_kinds()}")
    return known


def _files(filesystem: Any, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The entries that are files, or links to files; links to folders are not followed."""
    followed = {name: filesystem.info(name) if entry.get("islink") else entry for name, entry in entries.items()}
    return {name: entry for name, entry in followed.items() if entry["type"] == "file"}


def _stdlib_files() -> list[SourceFile]:
    root = sysconfig.get_path("stdlib")
    filesystem = fsspec.filesystem("file")
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_STDLIB]
        names += [os.path.join(folder, name) for name in files if name.endswith(".py")]
    if not names:
        raise NoSourceError(f"stdlib: this interpreter has no source text under {root}; name a folder of text")
    return [_file(filesystem, name, filesystem.info(name), "text") for name in sorted(names)]


def _filesystem(path: str) -> tuple[Any, str]:
    protocol = path.split("://", 1)[0] if "://" in path else "file"
    try:
        filesystem, root = fsspec.core.url_to_fs(path)
    except ImportError as error:
        entry: Mapping[str, str] = known_implementations.get(protocol, {})
        module = entry.get("class", "").split(".")[0]
        remedy = f"pip install {module}" if module not in ("", "fsspec") else entry.get("err", str(error))
        raise NoSourceError(f"{path}: reading {protocol}:// needs a package that is not installed; {remedy}") from error
    except ValueError as error:
        raise NoSourceError(f"{path}: {_one_line(error)}") from error
    return filesystem, str(root)


def _named_file(filesystem: Any, name: str, info: Mapping[str, Any]) -> SourceFile:
    kind = _kind(name)
    if kind is None:
        suffix = PurePosixPath(name).suffix
        what = f"unknown file kind '{suffix}'" if suffix else "a file without a suffix"
        raise NoSourceError(f"{_url(filesystem, name)}: {what}; {_known_kinds()}")
    return _file(filesystem, name, info, kind)


def _file(filesystem: Any, name: str, info: Mapping[str, Any], kind: Kind) -> SourceFile:
    version = next((f"{key}={info[key]}" for key in _VERSION_KEYS if info.get(key)), "")
    suffix = PurePosixPath(name).suffix.lower()
    return SourceFile(
        url=_url(filesystem, name),
        path=name,
        kind=kind,
        compression=suffix[1:] if suffix in COMPRESSION_SUFFIXES else "",
        size=info.get("size"),
        version=version,
        filesystem=filesystem,
    )


def _url(filesystem: Any, name: str) -> str:
    """How a person would name the file: its path where it is local."""
    return name if _is_local(filesystem) else str(filesystem.unstrip_protocol(name))


def _is_local(filesystem: Any) -> bool:
    return "file" in filesystem.protocol


def _kind(name: str) -> Kind | None:
    path = PurePosixPath(name.lower())
    if path.suffix in PARQUET_SUFFIXES:
        return "parquet"
    suffix = PurePosixPath(path.stem).suffix if path.suffix in COMPRESSION_SUFFIXES else path.suffix
    if suffix in JSONL_SUFFIXES:
        return "jsonl"
    return "text" if suffix in TEXT_SUFFIXES else None


def _known_kinds() -> str:
    text = "plain text (.txt, .md, .py, ...)"
    return f"known are .parquet, .jsonl and {text}; the last two also as .gz, .bz2, .xz, .zst"


def _is_hidden(relative: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(relative).parts)


def _decompressed(stored: IO[bytes], compression: str) -> IO[bytes]:
    if compression == "gz":
        return gzip.GzipFile(fileobj=stored, mode="rb")  # type: ignore[return-value]
    if compression == "bz2":
        return bz2.BZ2File(stored)
    if compression == "xz":
        return lzma.LZMAFile(stored)
    if compression == "zst":
        # pyarrow carries the codec; Python has it only from 3.14 on.
        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(stored), "zstd"))
    return stored


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
