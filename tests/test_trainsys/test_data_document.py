"""Documents in pieces: nothing lost, bounded size, cuts at line ends, and the same rest from any cursor."""

from __future__ import annotations

import gzip
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainsys.data.document import LONG_DOCUMENT_BYTES, SECTION_BYTES, Piece, cut, read_pieces
from trainsys.data.source import find_files

LETTERS = st.sampled_from([b"a", b"line\n", "ä".encode(), "😀".encode(), b"\n\n", b"\x80\x80\x80\x80", b"word "])


@st.composite
def long_texts(draw: st.DrawFn) -> bytes:
    """Text of up to 1 MB of runs of one kind of character each."""
    runs = draw(st.lists(st.tuples(LETTERS, st.integers(1, 60_000)), min_size=1, max_size=8))
    return b"".join(letter * count for letter, count in runs)


@settings(max_examples=60, deadline=None)
@given(long_texts())
def test_a_long_document_is_cut_without_loss_into_sections_of_bounded_size(text: bytes) -> None:
    pieces = list(cut(io.BytesIO(text)))
    assert b"".join(content for content, _ in pieces) == text
    assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True]
    assert len(pieces) == 1 or len(text) > LONG_DOCUMENT_BYTES
    assert len(pieces) > 1 or len(text) <= LONG_DOCUMENT_BYTES
    for content, last in pieces[:-1]:
        assert SECTION_BYTES <= len(content) <= 2 * SECTION_BYTES
        assert content.endswith(b"\n") == (b"\n" in content[SECTION_BYTES - 1 :])
        assert not last


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 3), st.sampled_from(["ä", "€", "😀"]))
def test_a_line_without_end_is_cut_between_characters(shift: int, letter: str) -> None:
    text = "x" * shift + letter * 400_000
    sections = [content.decode() for content, _ in cut(io.BytesIO(text.encode()))]
    assert len(sections) > 1
    assert "".join(sections) == text


class Trickle(io.RawIOBase):
    """Gives a few bytes at a time, as sockets do."""

    def __init__(self, content: bytes) -> None:
        self._content = io.BytesIO(content)

    def read(self, size: int = -1) -> bytes:
        return self._content.read(min(size, 1000))


def test_cuts_do_not_depend_on_how_the_stream_arrives() -> None:
    text = b"some words in a line\n" * 30_000
    assert list(cut(Trickle(text))) == list(cut(io.BytesIO(text)))  # type: ignore[arg-type]


def write_source(kind: str, folder: Path) -> Path:
    """A file with short, empty and long documents."""
    long = b"".join(b"line %d of a long document\n" % i for i in range(20_000)).decode()
    texts = ["short", "", long, "ä", long[::-1], "last"]
    path = folder / f"a.{kind}"
    if kind.startswith("txt"):
        content = long.encode()
        path.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    elif kind.startswith("jsonl"):
        content = b"\n".join(json.dumps({"text": text}).encode() for text in texts)
        path.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    elif kind == "parquet":
        pq.write_table(pa.table({"text": texts * 40}), path, row_group_size=150)
    else:
        path = folder / "tokens.parquet"
        rows = [np.arange(n) % 256 for n in (3, 0, LONG_DOCUMENT_BYTES, 2 * LONG_DOCUMENT_BYTES + 1, 5)]
        pq.write_table(pa.table({"tokens": rows}), path, row_group_size=2)
    return path


def same(first: Piece, second: Piece) -> bool:
    return bytes(first.content) == bytes(second.content) and first.last == second.last and first.cursor == second.cursor


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl", "jsonl.gz", "parquet", "tokens"])
def test_reading_from_any_cursor_gives_the_rest(tmp_path: Path, kind: str) -> None:
    (file,) = find_files(str(write_source(kind, tmp_path)))
    pieces = list(read_pieces(file, "text"))
    assert len(pieces) > 4
    step = max(len(pieces) // 40, 1)
    for index in range(0, len(pieces), step):
        rest = list(read_pieces(file, "text", pieces[index].cursor))
        assert len(rest) == len(pieces) - index - 1
        assert all(map(same, rest, pieces[index + 1 :]))


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "tokens"])
def test_source_bytes_grow_to_the_size_of_the_file(tmp_path: Path, kind: str) -> None:
    (file,) = find_files(str(write_source(kind, tmp_path)))
    consumed = [piece.source_bytes for piece in read_pieces(file, "text")]
    assert consumed == sorted(consumed)
    assert consumed[-1] == file.size


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "first"}\n' + b"broken\n" * 100_000)
    (file,) = find_files(str(path))
    pieces: Iterator[Piece] = read_pieces(file, "text")
    assert next(pieces).content == b"first"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=12))
def test_jsonl_text_survives_as_utf8(texts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        (file,) = find_files(str(path))
        assert [piece.content for piece in read_pieces(file, "text")] == [text.encode() for text in texts]


def test_a_lone_surrogate_becomes_a_question_mark(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n')
    (file,) = find_files(str(tmp_path / "a.jsonl"))
    assert [piece.content for piece in read_pieces(file, "text")] == [b"a?b"]
