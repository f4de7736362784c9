"""What a path means, for every kind of file and file system, and what is said where it means nothing."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.test_trainsys.data_reference import prepared, texts
from trainsys.config import DataConfig
from trainsys.data import ensure_prepared, prepare, read_prepared
from trainsys.data.errors import NoSourceError, PreparedError, TextKeyError, UnreadableSourceError
from trainsys.data.source import find_files

WORDS = [b"one\n", "zwei äöü\n".encode(), b"three\n"]


@pytest.fixture
def memory() -> Iterator[str]:
    """A folder in fsspec's memory file system."""
    filesystem = fsspec.filesystem("memory")
    filesystem.mkdirs("/corpus", exist_ok=True)
    yield "memory://corpus"
    filesystem.rm("/corpus", recursive=True)


def train_texts(path: str | Path, out_dir: Path, **settings: object) -> list[bytes]:
    return texts(prepared(path, out_dir / "out", validation_fraction=0.0, **settings), "train")


def write_words(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for index, word in enumerate(WORDS):
        (folder / f"{index}.txt").write_bytes(word)
    return folder


def jsonl(rows: list[object]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def rows_of_words() -> list[object]:
    return [{"text": word.decode(), "other": 1} for word in WORDS]


def parquet(path: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def test_a_folder_is_read_in_sorted_order_at_every_depth(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/b.md", "c.py"):
        file = tmp_path / "corpus" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    assert train_texts(tmp_path / "corpus", tmp_path) == [b"a/b.md", b"a/z.txt", b"b.txt", b"c.py"]


def test_hidden_entries_and_files_of_unknown_kinds_in_a_folder_are_passed_over(tmp_path: Path) -> None:
    folder = write_words(tmp_path / "corpus")
    (folder / ".git").mkdir()
    (folder / ".git" / "a.txt").write_text("hidden")
    (folder / ".b.txt").write_text("hidden")
    (folder / "image.png").write_bytes(b"\x89PNG")
    assert train_texts(folder, tmp_path) == WORDS


def test_links_to_files_are_followed(tmp_path: Path) -> None:
    folder = write_words(tmp_path / "corpus")
    (tmp_path / "links").mkdir()
    for file in folder.iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    (tmp_path / "links" / "folder").symlink_to(folder)
    assert train_texts(tmp_path / "links", tmp_path) == WORDS
    assert train_texts(f"{tmp_path}/links/*.txt", tmp_path / "glob") == WORDS
    config = DataConfig(path=str(tmp_path / "links"), validation_fraction=0.0)
    first = ensure_prepared(config, tmp_path / "cache")
    (folder / "1.txt").write_text("changed behind the link")
    assert texts(ensure_prepared(config, tmp_path / "cache"), "train") != texts(first, "train")
    (tmp_path / "links" / "broken.txt").symlink_to("nowhere")
    with pytest.raises(NoSourceError, match=r"broken.txt leads nowhere"):
        ensure_prepared(config, tmp_path / "cache")


@pytest.mark.parametrize("format", ["arrow", "parquet"])
@pytest.mark.parametrize("path", [".", "**/*.txt", "*.txt"])
def test_what_was_prepared_inside_the_source_is_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, format: str
) -> None:
    write_words(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = DataConfig(path=path, validation_fraction=0.0)
    first = prepare(config, tmp_path / "sub" / "out", format=format)  # type: ignore[arg-type]
    assert prepare(config, tmp_path / "sub" / "out", format=format) == first  # type: ignore[arg-type]
    assert texts(ensure_prepared(config, tmp_path / "cache"), "train") == WORDS


@pytest.mark.parametrize("is_remote", [False, True])
def test_a_prepared_folder_cannot_be_read_as_text(tmp_path: Path, memory: str, is_remote: bool) -> None:
    folder = prepared(write_words(tmp_path / "corpus"), tmp_path / "out", validation_fraction=0.0)
    config = DataConfig(path=str(tmp_path / "corpus"), validation_path=str(folder))
    if is_remote:
        fsspec.filesystem("memory").put(f"{folder}/", "/corpus/", recursive=True)
        config = DataConfig(path=memory)
    with pytest.raises(NoSourceError, match=r"a prepared folder is used from a local disk, as data.path alone"):
        prepare(config, tmp_path / "again")


def test_a_hidden_folder_that_is_named_is_read(tmp_path: Path) -> None:
    assert train_texts(write_words(tmp_path / ".corpus"), tmp_path) == WORDS


def test_a_glob_takes_what_it_matches(tmp_path: Path) -> None:
    folder = write_words(tmp_path / "corpus")
    assert train_texts(f"{folder}/[02].txt", tmp_path) == [WORDS[0], WORDS[2]]
    assert train_texts(f"{tmp_path}/**/1.txt", tmp_path / "b") == [WORDS[1]]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "[0].txt").write_text("literal")
    (tmp_path / "0.txt").write_text("matched")
    assert train_texts(tmp_path / "[0].txt", tmp_path) == [b"literal"]


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_a_text_file_is_one_document_of_its_bytes(tmp_path: Path, prefix: str) -> None:
    content = bytes(range(256)) + b"\r\n\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(content)
    assert train_texts(f"{prefix}{tmp_path}/a.txt", tmp_path) == [content]


def test_jsonl_gives_a_document_a_line(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + jsonl(rows_of_words()).replace(b"\n", b"\r\n").replace(b"\r\n", b"\r\n\n", 1)
    (tmp_path / "a.jsonl").write_bytes(content.rstrip())
    assert train_texts(tmp_path / "a.jsonl", tmp_path) == WORDS


def test_the_text_key_names_the_field_and_the_column(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"text": 1, "body": "from the line"}]))
    parquet(tmp_path / "b.parquet", text=[1], body=["from the column"])
    found = train_texts(tmp_path, tmp_path, text_key="body")
    assert found == [b"from the line", b"from the column"]


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
def test_parquet_gives_a_document_a_row_for_every_string_type(tmp_path: Path, kind: pa.DataType) -> None:
    values = pa.array([word.decode() for word in WORDS] * 100).cast(kind)
    parquet(tmp_path / "a.parquet", text=values, other=list(range(300)))
    assert train_texts(tmp_path / "a.parquet", tmp_path) == WORDS * 100


@pytest.mark.parametrize("kind", [pa.int64(), pa.uint16(), pa.int32()], ids=str)
@pytest.mark.parametrize("listed", [pa.list_, pa.large_list, lambda kind: pa.list_(kind, 3)])
def test_parquet_token_lists_are_taken_as_they_are(
    tmp_path: Path, kind: pa.DataType, listed: Callable[[pa.DataType], pa.DataType]
) -> None:
    rows = [[1, 2, 3], [4, 5, 6], [7, 8, 256]]
    parquet(tmp_path / "a.parquet", tokens=pa.array(rows, listed(kind)))
    found = train_texts(tmp_path / "a.parquet", tmp_path)
    assert found == [b"\1\2\3", b"\4\5\6", b"\7\x08"], "an end-of-document token that is there is not doubled"


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda content: pa.Codec("zstd").compress(content, asbytes=True),
}


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_text_and_jsonl_may_be_compressed(tmp_path: Path, suffix: str) -> None:
    compress = COMPRESSORS[suffix]
    (tmp_path / f"a.txt.{suffix}").write_bytes(compress(b"plain"))
    many = rows_of_words() * 500
    # Two members one after another, as parallel compressors write them.
    (tmp_path / f"b.jsonl.{suffix}").write_bytes(compress(jsonl(many[:700])) + compress(jsonl(many[700:])))
    assert train_texts(tmp_path, tmp_path) == [b"plain", *WORDS * 500]


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_a_truncated_compressed_file_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl.{suffix}"
    content = COMPRESSORS[suffix](jsonl([{"text": os.urandom(3000).hex()} for _ in range(200)]))
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UnreadableSourceError, match=r"a\.jsonl\.\w+:"):
        train_texts(path, tmp_path)


def test_every_kind_is_read_from_a_url(tmp_path: Path, memory: str) -> None:
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe("/corpus/a.txt", b"plain")
    filesystem.pipe("/corpus/b.jsonl.gz", gzip.compress(jsonl(rows_of_words())))
    filesystem.put(str(parquet(tmp_path / "c.parquet", text=["column"])), "/corpus/c.parquet")
    assert train_texts(memory, tmp_path) == [b"plain", *WORDS, b"column"]
    assert train_texts(f"{memory}/*.txt", tmp_path / "glob") == [b"plain"]
    assert train_texts(f"{memory}/a.txt", tmp_path / "file") == [b"plain"]


def test_stdlib_is_the_source_text_of_the_running_interpreter_without_installed_packages() -> None:
    files = find_files("stdlib")
    urls = [file.url for file in files]
    assert urls == sorted(urls)
    assert Path(os.__file__) in map(Path, urls)
    assert Path(json.__file__) in map(Path, urls)
    assert not [url for url in urls if "site-packages" in url or not url.endswith(".py")]
    assert sum(file.size or 0 for file in files) > 10_000_000


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "nowhere: nothing there"),
        ("*.txt", "the pattern matches no file"),
        ("empty", "no file of a known kind in this folder (it is empty)"),
        ("images", "no file of a known kind in this folder (found only .png, README)"),
        ("images/a.png", "unknown file kind '.png'; known are .parquet, .jsonl and plain text"),
        ("images/README", "images/README: a file without a suffix; known are"),
        ("images/*", "images/README: a file without a suffix"),
    ],
)
def test_a_path_that_means_no_text_says_why(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"\x89PNG")
    (tmp_path / "images" / "README").write_text("read me")
    with pytest.raises(NoSourceError) as raised:
        prepare(DataConfig(path=str(tmp_path / path)), tmp_path / "out")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_protocol_that_is_not_installed_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(NoSourceError, match=r"gs://bucket/a.txt: reading gs:// .* pip install gcsfs"):
        prepare(DataConfig(path="gs://bucket/a.txt"), tmp_path / "out")


def test_a_store_s_own_error_names_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(
        UnreadableSourceError, match=r"s3://bucket/a.txt: cannot be listed: Unable to locate credentials"
    ):
        prepare(DataConfig(path="s3://bucket/a.txt"), tmp_path / "out")


def test_an_unknown_protocol_is_named(tmp_path: Path) -> None:
    with pytest.raises(NoSourceError, match=r"gopher://a.txt: Protocol not known: gopher"):
        prepare(DataConfig(path="gopher://a.txt"), tmp_path / "out")


def error_of(content: bytes, tmp_path: Path, name: str = "a.jsonl") -> str:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((UnreadableSourceError, TextKeyError)) as raised:
        train_texts(tmp_path / name, tmp_path)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{broken\n", "a.jsonl:4: not JSON: Expecting property name"),
        (b"[" * 100_000 + b"\n", "a.jsonl:4: not JSON: maximum recursion depth"),
        (b"\xff\xfe\n", "a.jsonl:4: not JSON"),
        (b"[1]\n", "a.jsonl:4: a JSON object is wanted, this is a list"),
        (
            b'{"body": "x", "id": 1}\n',
            "a.jsonl:4: no field 'text'; those that exist: body, id (data.text_key)",
        ),
        (b"{}\n", "a.jsonl:4: no field 'text'; it has none"),
        (b'{"text": 5}\n', "a.jsonl:4: field 'text' holds a int, not a string"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: bytes, message: str) -> None:
    assert message in error_of(jsonl(rows_of_words()[:2]) + b"\n" + line, tmp_path)


def test_a_missing_column_names_those_that_exist(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", body=["x"], id=[1])
    message = error_of((tmp_path / "a.parquet").read_bytes(), tmp_path, "a.parquet")
    assert "no column 'text'" in message
    assert "those that exist: body, id (data.text_key)" in message


def test_a_column_that_holds_no_text_names_its_type(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", text=[1.5])
    message = error_of((tmp_path / "a.parquet").read_bytes(), tmp_path, "a.parquet")
    assert "column 'text' holds double, not strings" in message


@pytest.mark.parametrize("keep", [0, 3, 200])
def test_a_broken_parquet_file_is_named(tmp_path: Path, keep: int) -> None:
    parquet(tmp_path / "a.parquet", text=["x" * 1000] * 50)
    message = error_of((tmp_path / "a.parquet").read_bytes()[:keep], tmp_path, "a.parquet")
    assert "a.parquet: not a readable Parquet file" in message


def test_a_null_token_is_refused(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", tokens=[[1, None]])
    message = error_of((tmp_path / "a.parquet").read_bytes(), tmp_path, "a.parquet")
    assert "holds a null token" in message


def test_empty_documents_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.jsonl").write_bytes(jsonl([{"text": ""}, {"text": "full"}, {"text": None}]))
    parquet(tmp_path / "c.parquet", text=["", None, "full"])
    parquet(tmp_path / "d.parquet", tokens=[[], None, [256], [7]])
    folder = prepared(tmp_path, tmp_path / "out", validation_fraction=0.0)
    assert texts(folder, "train") == [b"full", b"full", b"\7"]
    assert read_prepared(folder).empty_documents == 1 + 2 + 2 + 3


@pytest.mark.parametrize("change", ["content", "time", "new file", "gone file"])
def test_a_source_that_changed_is_prepared_anew(tmp_path: Path, change: str) -> None:
    folder = write_words(tmp_path / "corpus")
    config = DataConfig(path=str(folder), validation_fraction=0.0)
    first = ensure_prepared(config, tmp_path / "cache")
    assert ensure_prepared(config, tmp_path / "cache") == first
    file = folder / "1.txt"
    if change == "content":
        file.write_bytes(b"other")
    elif change == "time":
        os.utime(file, ns=(1, 1))
    elif change == "new file":
        (folder / "3.txt").write_bytes(b"new")
    else:
        file.unlink()
    second = ensure_prepared(config, tmp_path / "cache")
    assert second != first
    same = read_prepared(first).fingerprint == read_prepared(second).fingerprint
    assert same == (change == "time"), "the fingerprint is of the tokens, whatever the files' times"
    assert texts(second, "train") == [file.read_bytes() for file in sorted(folder.iterdir())]


def test_a_url_that_changed_is_prepared_anew(tmp_path: Path, memory: str) -> None:
    config = DataConfig(path=memory, validation_fraction=0.0)
    fsspec.filesystem("memory").pipe("/corpus/a.txt", b"first")
    first = ensure_prepared(config, tmp_path)
    fsspec.filesystem("memory").pipe("/corpus/a.txt", b"other")
    assert texts(ensure_prepared(config, tmp_path), "train") == [b"other"]
    assert texts(first, "train") == [b"first"]


@pytest.mark.parametrize(
    "setting",
    [{"text_key": "body"}, {"validation_fraction": 0.25}, {"validation_path": "validation"}],
    ids=str,
)
def test_another_setting_that_decides_the_tokens_is_prepared_apart(tmp_path: Path, setting: dict[str, object]) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(jsonl([{"text": f"{i}", "body": f"body {i}"} for i in range(40)]))
    if "validation_path" in setting:
        setting = {"validation_path": str(write_words(tmp_path / "validation"))}
    first = ensure_prepared(DataConfig(path=str(folder)), tmp_path / "cache")
    again = ensure_prepared(DataConfig(path=str(folder), sequence_length=7), tmp_path / "cache")
    other = ensure_prepared(DataConfig(path=str(folder), **setting), tmp_path / "cache")  # type: ignore[arg-type]
    assert first == again != other


def test_a_prepared_folder_takes_the_place_of_its_source(tmp_path: Path) -> None:
    folder = prepared(write_words(tmp_path / "corpus"), tmp_path / "out", validation_fraction=0.0)
    assert ensure_prepared(DataConfig(path=str(folder)), tmp_path / "cache") == folder
    assert ensure_prepared(DataConfig(path=f"file://{folder}"), tmp_path / "cache") == folder
    assert not (tmp_path / "cache").exists()
    with pytest.raises(PreparedError, match=r"already prepared"):
        prepare(DataConfig(path=str(folder)), tmp_path / "twice")
    with pytest.raises(PreparedError, match=r"leave data.validation_path empty"):
        ensure_prepared(DataConfig(path=str(folder), validation_path=str(folder)), tmp_path / "cache")
