"""Preparing: exact contents, fair hold-out, the same bytes after any kill, one worker at a time, clear
failures."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.test_trainsys.data_reference import documents, prepared, texts, write_lines
from trainsys.config import DataConfig
from trainsys.data import PrepareProgress, ensure_prepared, prepare, read_prepared, verify
from trainsys.data.document import LONG_DOCUMENT_BYTES
from trainsys.data.errors import (
    BusyError,
    DiskFullError,
    PreparedError,
    SourceChangedError,
    TokenRangeError,
    TooFewTokensError,
)
from trainsys.data.lock import exclusive

SHARD_TOKENS = 20_000
KILLED = -signal.SIGKILL
FORKSERVER = multiprocessing.get_context("forkserver")


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder and its content."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def corpus(tmp_path: Path) -> Path:
    """Sixty short files, one of sections, one of lines: about 1 MB, some 20 shards."""
    folder = write_lines(tmp_path / "corpus", 60)
    (folder / "0030-long.txt").write_bytes(b"".join(b"line %d of a long file\n" % i for i in range(30_000)))
    rows = [json.dumps({"text": f"row {i}\n" * (i % 7)}) for i in range(2000)]
    (folder / "0031.jsonl").write_text("\n".join(rows))
    return folder


def prepare_small(source: Path, out_dir: Path, on_progress: Callable[[PrepareProgress], None] | None = None) -> Path:
    return prepared(source, out_dir, shard_tokens=SHARD_TOKENS, validation_fraction=0.1, on_progress=on_progress)


def in_processes(function: Callable[..., object], *calls: tuple[object, ...]) -> list[int]:
    """The exit codes of `function` called in a process of its own each, one after another: -N after signal N.

    Ends with the first call that exits with 0. The processes are forked from one that has imported all it
    needs.
    """
    receive, send = FORKSERVER.Pipe(duplex=False)
    server = FORKSERVER.Process(target=_fork_for_each, args=(function, calls, send))
    server.start()
    codes: list[int] | None = receive.recv() if receive.poll(120) else None
    server.kill()
    server.join()
    assert codes is not None, "a process did not end"
    return codes


def _fork_for_each(function: Callable[..., object], calls: tuple[tuple[object, ...], ...], pipe: Connection) -> None:
    codes: list[int] = []
    for arguments in calls:
        if 0 in codes:
            break
        child = os.fork()
        if child == 0:
            code = 1
            try:
                function(*arguments)
                code = 0
            except SystemExit as exit:
                code = int(exit.code or 0)
            except BaseException:  # noqa: BLE001 (told, and carried on as the exit code)
                traceback.print_exc()
            finally:
                os._exit(code)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    pipe.send(codes)


def prepare_and_die_at_event(
    source: Path, out_dir: Path, event_index: int, event: str = "", path_part: str = ".partial"
) -> None:
    """Kills itself at the n-th (such) file operation in the work folder; writes how many there were
    otherwise."""
    seen = 0

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if name in ("open", "os.rename", "os.remove", "os.mkdir") and path_part in str(arguments[0]):
            seen += event in ("", name)
            if seen == event_index:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    prepare_small(source, out_dir)
    (out_dir.parent / "events").write_text(str(seen))


def test_a_preparation_killed_at_any_file_operation_ends_with_the_same_bytes(tmp_path: Path) -> None:
    source = corpus(tmp_path)
    whole = tmp_path / "whole" / "out"
    assert in_processes(prepare_and_die_at_event, (source, whole, 0)) == [0]
    num_events = int((tmp_path / "whole" / "events").read_text())
    expected = tree(whole)
    assert num_events > 150
    assert len(read_prepared(whole).train.shards) > 15
    points = [1, 3, 8, 13, num_events // 2, *range(num_events - 5, num_events + 1)]
    out_dirs = [tmp_path / f"killed-{index}" / "out" for index in points]
    calls = [(source, out_dir, index) for out_dir, index in zip(out_dirs, points, strict=True)]
    assert in_processes(prepare_and_die_at_event, *calls) == [KILLED] * len(points)
    for out_dir, event_index in zip(out_dirs, points, strict=True):
        assert not out_dir.exists(), "nothing is published before all of it is there"
        prepare_small(source, out_dir)
        assert tree(out_dir) == expected, f"killed at file operation {event_index} of {num_events}"


def prepare_and_die_at_progress(source: Path, out_dir: Path, call_index: int) -> None:
    calls = 0

    def on_progress(progress: PrepareProgress) -> None:
        nonlocal calls
        calls += 1
        if calls == call_index:
            os.kill(os.getpid(), signal.SIGKILL)

    prepare_small(source, out_dir, on_progress)


def test_a_preparation_killed_over_and_over_goes_on_each_time(tmp_path: Path) -> None:
    source = corpus(tmp_path)
    expected = tree(prepare_small(source, tmp_path / "whole"))
    codes = in_processes(prepare_and_die_at_progress, *[(source, tmp_path / "out", 8)] * 10)
    assert codes == [KILLED] * (len(codes) - 1) + [0]
    assert len(codes) >= 3
    assert tree(tmp_path / "out") == expected


def test_a_journal_line_cut_off_by_a_kill_is_passed_over(tmp_path: Path) -> None:
    source = corpus(tmp_path)
    expected = tree(prepare_small(source, tmp_path / "whole"))
    # Right after the ninth line, before the counts of the eighth are removed: so a torn line leaves it.
    arguments = (source, tmp_path / "out", 9, "os.remove", "journal-unigram")
    assert in_processes(prepare_and_die_at_event, arguments) == [KILLED]
    work = tmp_path / ".out.partial"
    lines = (work / "journal.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == len(list((work / "train").iterdir())) == 9
    (work / "journal.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])
    prepare_small(source, tmp_path / "out")
    assert tree(tmp_path / "out") == expected


def test_what_a_kill_left_of_another_source_is_not_used(tmp_path: Path) -> None:
    source = corpus(tmp_path)
    assert in_processes(prepare_and_die_at_progress, (source, tmp_path / "out", 9)) == [KILLED]
    (source / "0000.txt").write_text("changed since")
    prepare_small(source, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(prepare_small(source, tmp_path / "whole"))
    assert b"changed since" in texts(tmp_path / "out", "train") + texts(tmp_path / "out", "validation")


def test_a_second_preparation_finds_the_first(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "corpus", 5)
    first = prepare(DataConfig(path=str(source)), tmp_path / "out")
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}
    assert prepare(DataConfig(path=str(source)), tmp_path / "out") == first
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")} == times


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "corpus", 5)
    prepared(source, tmp_path / "out")
    before = tree(tmp_path / "out")
    with pytest.raises(PreparedError, match=r"already holds other tokens"):
        prepared(source, tmp_path / "out", validation_fraction=0.3)
    assert tree(tmp_path / "out") == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(PreparedError, match=r"not empty, and not a prepared folder"):
        prepared(source, tmp_path / "full")
    assert tree(tmp_path / "full") == {"thesis.tex": b"mine"}


def prepare_and_count(source: Path, cache_dir: Path, pipe: Connection) -> None:
    calls = 0

    def on_progress(progress: PrepareProgress) -> None:
        nonlocal calls
        calls += 1

    folder = ensure_prepared(DataConfig(path=str(source)), cache_dir, on_progress=on_progress)
    pipe.send((folder, calls))


def test_processes_that_prepare_the_same_at_once_share_the_work_of_one(tmp_path: Path) -> None:
    source = corpus(tmp_path)
    pipes = [FORKSERVER.Pipe(duplex=False) for _ in range(3)]
    workers = [
        FORKSERVER.Process(target=prepare_and_count, args=(source, tmp_path / "cache", send)) for _, send in pipes
    ]
    for worker in workers:
        worker.start()
    found = [receive.recv() if receive.poll(60) else None for receive, _ in pipes]
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    folders, calls = zip(*filter(None, found), strict=True)
    assert len(set(folders)) == 1
    assert sorted(bool(count) for count in calls) == [False, False, True]
    assert verify(folders[0]).train.tokens > 500_000


def prepare_and_hang(source: Path, out_dir: Path, pipe: Connection) -> None:
    def on_progress(progress: PrepareProgress) -> None:
        pipe.send("holding")
        signal.pause()

    prepare_small(source, out_dir, on_progress)


def test_the_work_of_a_killed_process_goes_to_the_one_that_waits(tmp_path: Path) -> None:
    source = corpus(tmp_path)
    receive, send = FORKSERVER.Pipe(duplex=False)
    holder = FORKSERVER.Process(target=prepare_and_hang, args=(source, tmp_path / "out", send))
    holder.start()
    assert receive.poll(60)
    waiter = threading.Thread(target=prepare_small, args=(source, tmp_path / "out"))
    waiter.start()
    waiter.join(0.3)
    assert waiter.is_alive(), "it waits as long as the holder lives"
    assert not (tmp_path / "out").exists()
    holder.kill()
    holder.join(60)
    waiter.join(60)
    assert tree(tmp_path / "out") == tree(prepare_small(source, tmp_path / "whole"))


def test_a_holder_without_progress_is_named(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with (
        exclusive(lock, stalled_after_s=1, progress=lambda: 0),
        pytest.raises(BusyError, match=rf"process {os.getpid()} on .* prepares the same data"),
        exclusive(lock, stalled_after_s=0.2, progress=lambda: 0),
    ):
        pytest.fail("two hold one lock")


def test_the_bytes_of_every_document_are_there_once_and_in_order(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "corpus", 200)
    folder = prepared(source, tmp_path / "out", shard_tokens=SHARD_TOKENS, validation_fraction=0.2)
    contents = [file.read_bytes() for file in sorted(source.iterdir())]
    train, validation = texts(folder, "train"), texts(folder, "validation")
    held_out = set(validation)
    assert train == [content for content in contents if content and content not in held_out]
    assert validation == [content for content in contents if content in held_out]
    assert 20 < len(validation) < 60, "a fifth of 200, within five deviations"
    info = read_prepared(folder)
    for split, expected in (("train", train), ("validation", validation)):
        counted = info.split(split)  # type: ignore[arg-type]
        assert counted.documents == len(expected)
        assert counted.bytes == sum(map(len, expected))
        assert counted.tokens == sum(map(len, expected)) + len(expected)
        assert counted.tokens == sum(shard.tokens for shard in counted.shards)
    assert info.empty_documents == sum(not content for content in contents)
    assert (info.vocab_size, info.end_of_document, info.dtype) == (257, 256, "uint16")


def test_unigram_counts_and_entropy_are_those_of_train(tmp_path: Path) -> None:
    folder = prepared(write_lines(tmp_path / "corpus", 50), tmp_path / "out", shard_tokens=SHARD_TOKENS)
    counts = Counter(token for document in documents(folder, "train") for token in document)
    info = read_prepared(folder)
    assert info.unigram_counts().tolist() == [counts[token] for token in range(257)]
    total = sum(counts.values())
    entropy = -sum(count / total * math.log(count / total) for count in counts.values())
    assert info.unigram_entropy == pytest.approx(entropy, rel=1e-12)


def test_equal_texts_are_never_in_both_splits(tmp_path: Path) -> None:
    source = tmp_path / "corpus"
    source.mkdir()
    words = [f"text {i}" for i in range(60)]
    for index in range(5):
        (source / f"{index}.jsonl").write_text("\n".join(json.dumps({"text": word}) for word in words))
    pq.write_table(pa.table({"text": words}), source / "a.parquet")
    (source / "b.txt").write_text(words[7])
    folder = prepared(source, tmp_path / "out", validation_fraction=0.3)
    train, validation = Counter(texts(folder, "train")), Counter(texts(folder, "validation"))
    assert not train.keys() & validation.keys()
    assert set((train + validation).values()) == {6, 7}
    assert 5 < len(validation) < 35


def test_a_long_file_is_held_out_in_sections(tmp_path: Path) -> None:
    lines = [b"line %d of a book\n" % i for i in range(60_000)]
    (tmp_path / "book.txt").write_bytes(b"".join(lines))
    folder = prepared(tmp_path / "book.txt", tmp_path / "out")
    train, validation = texts(folder, "train"), texts(folder, "validation")
    assert len(validation) >= 1
    assert len(train) <= len(validation) + 1, "what lies between two held-out sections is one document"
    assert all(text.endswith(b"\n") and text.startswith(b"line") for text in train + validation)
    assert sorted(b"".join(train + validation).splitlines(keepends=True)) == sorted(lines)
    assert not {*b"".join(train).splitlines()} & {*b"".join(validation).splitlines()}


def test_something_is_held_out_even_where_no_hash_falls_under_the_fraction(tmp_path: Path) -> None:
    for index in range(4):
        (tmp_path / f"{index}.txt").write_text(f"one of four {index}")
    sizes = []
    for fraction in (0.0, 1e-9, 0.001):
        folder = prepared(tmp_path / "*.txt", tmp_path / f"out-{fraction}", validation_fraction=fraction)
        sizes.append((len(texts(folder, "train")), len(texts(folder, "validation"))))
    assert sizes == [(4, 0), (3, 1), (3, 1)]


def test_the_smallest_hash_is_held_out_after_a_kill_as_well(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "corpus", 60)
    arguments = {"shard_tokens": 5000, "validation_fraction": 1e-9}
    expected = tree(prepared(source, tmp_path / "whole", **arguments))
    assert read_prepared(tmp_path / "whole").validation.documents == 1
    num_calls = 2 * len(read_prepared(tmp_path / "whole").train.shards)
    calls = [(source, tmp_path / f"out-{index}", index) for index in (3, num_calls // 2 + 1, num_calls - 1)]
    assert in_processes(_prepare_tiny_fraction_and_die, *calls) == [KILLED] * 3
    for _, out_dir, _ in calls:
        assert tree(prepared(source, out_dir, **arguments)) == expected


def _prepare_tiny_fraction_and_die(source: Path, out_dir: Path, call_index: int) -> None:
    calls = 0

    def on_progress(progress: PrepareProgress) -> None:
        nonlocal calls
        calls += 1
        if calls == call_index:
            os.kill(os.getpid(), signal.SIGKILL)

    prepared(source, out_dir, shard_tokens=5000, validation_fraction=1e-9, on_progress=on_progress)


@pytest.mark.parametrize("fraction", [0.02, 0.5])
def test_one_short_document_cannot_be_held_out_of(tmp_path: Path, fraction: float) -> None:
    (tmp_path / "a.txt").write_text("alone")
    with pytest.raises(TooFewTokensError, match=r"one text, .* data.validation_fraction=0"):
        prepared(tmp_path / "a.txt", tmp_path / "out", validation_fraction=fraction)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_only_empty_documents_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(TooFewTokensError, match=r"no text in 1 files \(1 empty documents\)"):
        prepared(tmp_path / "a.txt", tmp_path / "out")


def test_a_validation_path_is_held_out_whole_and_kept_out_of_train(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "corpus", 8)
    folder = prepared(source, tmp_path / "out", validation_path=f"{source}/000[26].txt")
    contents = {file.name: file.read_bytes() for file in sorted(source.iterdir())}
    assert texts(folder, "validation") == [contents.pop("0002.txt"), contents.pop("0006.txt")]
    assert texts(folder, "train") == [content for content in contents.values() if content]


def test_a_validation_path_that_takes_all_of_train_is_refused(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "corpus", 3)
    with pytest.raises(Exception, match=r"every file of it is also in"):
        prepared(source, tmp_path / "out", validation_path=str(source))


def prepare_on_small_disk(source: Path, out_dir: Path, format: str, max_file_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    try:
        prepared(source, out_dir, shard_tokens=500_000, validation_fraction=0.1, format=format)
    except DiskFullError as error:
        assert "no room for the tokens" in str(error)  # noqa: PT017 (in a process of its own)
        sys.exit(3)


@pytest.mark.parametrize("format", ["arrow", "parquet"])
def test_a_disk_that_fills_is_named_and_the_work_goes_on_after(tmp_path: Path, format: str) -> None:
    source = corpus(tmp_path)
    assert in_processes(prepare_on_small_disk, (source, tmp_path / "out", format, 50_000)) == [3]
    arguments: dict[str, Any] = {"shard_tokens": 500_000, "validation_fraction": 0.1, "format": format}
    after = prepared(source, tmp_path / "out", **arguments)
    assert tree(after) == tree(prepared(source, tmp_path / "whole", **arguments))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "corpus", 5)
    with pytest.raises(PreparedError, match=r"0001.txt/out: cannot be written .*; name another folder"):
        prepared(source, source / "0001.txt" / "out")


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "corpus", 20)

    def touch(progress: PrepareProgress) -> None:
        (source / "late.txt").write_text("late")

    with pytest.raises(SourceChangedError, match=r"changed while it was read; run again"):
        prepared(source, tmp_path / "out", on_progress=touch)
    assert texts(prepared(source, tmp_path / "out", validation_fraction=0), "train")[-1] == b"late"


def test_progress_grows_to_the_whole_source(tmp_path: Path) -> None:
    source = corpus(tmp_path)
    seen: list[PrepareProgress] = []
    info = read_prepared(prepare_small(source, tmp_path / "out", seen.append))
    total = sum(file.stat().st_size for file in source.iterdir())
    assert {progress.total_bytes for progress in seen} == {total}
    for name in ("bytes", "documents", "tokens", "elapsed_s"):
        values = [getattr(progress, name) for progress in seen]
        assert values == sorted(values)
    assert seen[-1].bytes == total
    assert seen[-1].tokens == info.train.tokens + info.validation.tokens
    assert seen[-1].documents == info.train.documents + info.validation.documents
    assert seen[-1].bytes_per_s > 0


@pytest.mark.parametrize(("wrong", "id"), [([1, 257], 257), ([-1], -1), ([2**40], 2**40)])
def test_a_token_outside_the_vocabulary_is_named(tmp_path: Path, wrong: list[int], id: int) -> None:
    pq.write_table(pa.table({"tokens": pa.array([[1], wrong], pa.list_(pa.int64()))}), tmp_path / "a.parquet")
    with pytest.raises(TokenRangeError, match=rf"a\.parquet: token id {id} lies outside the vocabulary of 257 ids"):
        prepared(tmp_path / "a.parquet", tmp_path / "out")


def test_parquet_shards_hold_what_arrow_shards_hold_and_can_be_trained_on(tmp_path: Path) -> None:
    source = corpus(tmp_path)
    arrow = prepare_small(source, tmp_path / "arrow")
    config = DataConfig(path=str(source), validation_fraction=0.1)
    as_parquet = prepare(config, tmp_path / "parquet", format="parquet", shard_tokens=SHARD_TOKENS)
    assert verify(as_parquet.path).fingerprint == read_prepared(arrow).fingerprint
    again = ensure_prepared(DataConfig(path=str(as_parquet.path)), tmp_path / "cache")
    assert again.is_relative_to(tmp_path / "cache")
    for split in ("train", "validation"):
        assert documents(again, split) == documents(arrow, split)
    back, info = read_prepared(again), read_prepared(arrow)
    assert (back.train.tokens, back.train.documents) == (info.train.tokens, info.train.documents)
    assert back.unigram_entropy == info.unigram_entropy


def test_a_corrupt_shard_is_found_by_verify(tmp_path: Path) -> None:
    folder = prepared(write_lines(tmp_path / "corpus", 20), tmp_path / "out", shard_tokens=5000)
    shard = folder / "train" / "00001.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert read_prepared(folder).train.shards, "the size is right"
    with pytest.raises(PreparedError, match=r"corrupt: train/00001.arrow holds other tokens"):
        verify(folder)


@pytest.mark.parametrize("format", ["arrow", "parquet"])
@pytest.mark.parametrize("damage", ["missing", "shorter"])
def test_a_missing_or_shorter_shard_is_found_at_open(tmp_path: Path, damage: str, format: str) -> None:
    source = write_lines(tmp_path / "corpus", 20)
    folder = prepared(source, tmp_path / "out", shard_tokens=5000, format=format)
    shard = folder / "train" / f"00001.{format}"
    if damage == "missing":
        shard.unlink()
        message = f"train/00001.{format} is missing; delete this folder"
    else:
        shard.write_bytes(shard.read_bytes()[:-1])
        size = shard.stat().st_size
        message = f"train/00001.{format} has {size} of {size + 1} bytes; delete this folder"
    for opened in (read_prepared, verify, lambda path: ensure_prepared(DataConfig(path=str(path)), tmp_path)):
        with pytest.raises(PreparedError, match=message):
            opened(folder)


@pytest.mark.parametrize("format", ["arrow", "parquet"])
def test_a_shard_of_garbage_is_found_by_verify(tmp_path: Path, format: str) -> None:
    folder = prepared(write_lines(tmp_path / "corpus", 20), tmp_path / "out", format=format)
    shard = folder / "train" / f"00000.{format}"
    shard.write_bytes(os.urandom(shard.stat().st_size))
    with pytest.raises(PreparedError, match=rf"train/00000.{format} cannot be read"):
        verify(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"kind": "trainsys.tokens", "version": 1', "corrupt manifest"),
        ('{"kind": "trainsys.tokens", "version": 1}', "corrupt manifest"),
        ('{"kind": "trainsys.tokens", "version": 2}', "version 2; this trainsys reads version 1"),
        ('{"kind": "else"}', "not the manifest of prepared tokens"),
        ("[]", "corrupt manifest"),
    ],
)
def test_a_corrupt_manifest_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(PreparedError, match=message):
        read_prepared(tmp_path)


def test_a_folder_without_a_manifest_is_not_prepared(tmp_path: Path) -> None:
    with pytest.raises(PreparedError, match=r"not a prepared folder \(no meta.json\)"):
        read_prepared(tmp_path)


def test_the_fingerprint_is_of_the_tokens_wherever_they_lie(tmp_path: Path) -> None:
    first = prepared(write_lines(tmp_path / "a", 9), tmp_path / "out-a")
    second = prepared(write_lines(tmp_path / "b", 9), tmp_path / "out-b")
    other = prepared(write_lines(tmp_path / "c", 9, seed=1), tmp_path / "out-c")
    shutil.move(second, tmp_path / "moved")
    fingerprints = [read_prepared(path).fingerprint for path in (first, tmp_path / "moved", other)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def peak_growth_of_preparing(source: Path, out_dir: Path, pipe: Connection) -> None:
    prepared(source / "0000.txt", out_dir / "warm", validation_fraction=0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    prepared(source, out_dir / "out")
    pipe.send(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


def test_memory_does_not_grow_with_the_source(tmp_path: Path) -> None:
    source = tmp_path / "corpus"
    source.mkdir()
    (source / "0000.txt").write_bytes(b"short\n")
    (source / "0001.txt").write_bytes(b"one long file of equal lines\n" * 2_000_000)
    line = json.dumps({"text": "many short rows\n" * 40}).encode() + b"\n"
    (source / "0002.jsonl").write_bytes(line * 45_000)
    receive, send = FORKSERVER.Pipe(duplex=False)
    assert in_processes(peak_growth_of_preparing, (source, tmp_path, send)) == [0]
    read_bytes = sum(file.stat().st_size for file in source.iterdir())
    assert read_bytes > 85_000_000
    assert receive.recv() < 60_000_000


def test_numbers_in_the_manifest_do_not_depend_on_the_day(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "corpus", 9)
    first = prepared(source, tmp_path / "first")
    os.utime(first / "meta.json", ns=(1, 1))
    assert tree(first) == tree(prepared(source, tmp_path / "second"))
    assert np.load(first / "unigram.npy").sum() == read_prepared(first).train.tokens


@pytest.mark.parametrize("excess", [-1, 0, 1, 2])
def test_prepared_parquet_keeps_its_documents_apart_at_every_length(tmp_path: Path, excess: int) -> None:
    """A row of tokens is read in pieces; the end of its document may not be lost where a piece would be that alone."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.txt").write_bytes(b"a" * (LONG_DOCUMENT_BYTES + excess))
    (source / "b.txt").write_bytes(b"b" * 5000)
    config = DataConfig(path=str(source), validation_fraction=0.0)
    first = prepare(config, tmp_path / "parquet", format="parquet")
    again = prepare(DataConfig(path=str(tmp_path / "parquet/train/*.parquet"), validation_fraction=0.0), tmp_path / "b")
    assert again.train.documents == first.train.documents
    assert again.train.tokens == first.train.tokens
