"""Byte tokens, and Hugging Face tokenizers from a file or folder made on the spot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_trainsys.data_reference import documents, prepared, texts, write_lines
from trainsys.config import DataConfig
from trainsys.data import TokenDataset, ensure_prepared, load_tokenizer, prepare, read_prepared
from trainsys.data.errors import PreparedError, TokenizerError

TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on\n"


def backend(*special: str) -> Any:
    """A byte-level BPE of a few hundred ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT * 20], trainer)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.json with <|endoftext|>, truncation, padding and a template that adds a token."""
    from tokenizers import processors

    tokenizer = backend("<|endoftext|>", "<pad>")
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4, pad_token="<pad>", pad_id=1)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@given(st.binary(max_size=200))
def test_byte_tokens_are_the_bytes_and_decode_with_replacement(content: bytes) -> None:
    tokenizer = load_tokenizer("bytes")
    (ids,) = tokenizer.encode_batch([content])
    assert ids.tolist() == list(content)
    assert tokenizer.decode(ids) == content.decode("utf-8", "replace")


def test_byte_tokens_have_an_end_of_document_that_no_text_gives() -> None:
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.end_of_document, tokenizer.spec) == (257, 256, "bytes")
    ids = [*"ä".encode(), 256, *b"b", 300, -1]
    assert tokenizer.decode(ids) == "äb\ufffd\ufffd"
    assert [ids.tolist() for ids in tokenizer.encode_batch(["ä", b"\xff", ""])] == [[0xC3, 0xA4], [255], []]


@given(st.text(max_size=100))
def test_a_tokenizer_file_encodes_and_decodes(tokenizer_json: Path, text: str) -> None:
    tokenizer = load_tokenizer(str(tokenizer_json))
    from_text, from_bytes = tokenizer.encode_batch([text, text.encode()])
    assert from_text.tolist() == from_bytes.tolist()
    assert tokenizer.decode(from_text) == text
    assert tokenizer.end_of_document not in from_text
    assert (from_text < tokenizer.vocab_size).all()


def test_truncation_padding_and_added_tokens_of_the_file_are_off(tokenizer_json: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_json))
    long, short = tokenizer.encode_batch([TEXT, "a"])
    assert tokenizer.decode(long) == TEXT
    assert len(short) == 1
    assert tokenizer.end_of_document == 0


def test_text_that_spells_the_end_token_is_text(tokenizer_json: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_json))
    (ids,) = tokenizer.encode_batch(["a<|endoftext|>b"])
    assert tokenizer.end_of_document not in ids
    assert tokenizer.decode([*ids, tokenizer.end_of_document]) == "a<|endoftext|>b"


@pytest.mark.parametrize("eos", ["<stop>", {"content": "<stop>"}])
def test_a_folder_says_which_token_ends_a_text(tmp_path: Path, eos: object) -> None:
    backend("</s>", "<stop>").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    for spec in (tmp_path, tmp_path / "tokenizer.json"):
        assert load_tokenizer(str(spec)).end_of_document == 1


def test_a_folder_that_transformers_wrote_is_loaded(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    original = PreTrainedTokenizerFast(tokenizer_object=backend("<s>", "</s>"), eos_token="</s>", bos_token="<s>")
    original.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    (ids,) = tokenizer.encode_batch([TEXT])
    assert ids.tolist() == original(TEXT, add_special_tokens=False)["input_ids"]
    assert tokenizer.end_of_document == original.eos_token_id


def test_a_folder_without_tokenizer_json_is_converted_by_transformers(tmp_path: Path) -> None:
    tokenizer = backend("<|endoftext|>")
    tokenizer.model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}'
    )
    loaded = load_tokenizer(str(tmp_path))
    (ids,) = loaded.encode_batch([TEXT])
    assert ids.tolist() == tokenizer.encode(TEXT).ids
    assert loaded.end_of_document == 0


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer there; 'bytes', a tokenizer.json or a tokenizer folder is wanted"),
        ({"tokenizer.json": "{}"}, "not a tokenizer.json"),
        ({"tokenizer.json": "GOOD"}, "it names no end-of-text token; put"),
        ({"tokenizer.json": "GOOD", "tokenizer_config.json": "["}, "not a JSON object"),
        ({"tokenizer.json": "GOOD", "tokenizer_config.json": "[]"}, "not a JSON object"),
        (
            {"tokenizer.json": "GOOD", "tokenizer_config.json": '{"eos_token": "<x>"}'},
            "its end-of-text token '<x>' is not in its vocabulary",
        ),
        ({"README.md": "nothing here"}, "not a tokenizer folder"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_says_why(tmp_path: Path, files: dict[str, str], message: str) -> None:
    folder = tmp_path / "tokenizer"
    for name, content in files.items():
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(content if content != "GOOD" else backend("<pad>").to_str())
    with pytest.raises(TokenizerError) as raised:
        load_tokenizer(str(folder))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_without_the_extra_the_error_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    code = (
        "import sys; sys.modules['tokenizers'] = sys.modules['transformers'] = None\n"
        "from trainsys.data import TokenizerError, load_tokenizer\n"
        "for folder in sys.argv[1:]:\n"
        "    try: load_tokenizer(folder)\n"
        "    except TokenizerError as error: print(error)\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "a"), str(tmp_path / "b")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("pip install 'trainsys[hf]'" in line for line in lines)


def test_a_prepared_folder_carries_its_tokenizer(tmp_path: Path, tokenizer_json: Path) -> None:
    source = write_lines(tmp_path / "corpus", 30)
    (source / "broken.txt").write_bytes(b"not \xff utf-8")
    copy = tmp_path / "moved" / "tokenizer.json"
    copy.parent.mkdir()
    copy.write_bytes(tokenizer_json.read_bytes())
    config = DataConfig(path=str(source), tokenizer=str(copy), validation_fraction=0.2)
    info = prepare(config, tmp_path / "out")
    copy.unlink()
    tokenizer = read_prepared(info.path).tokenizer()
    end = tokenizer.end_of_document
    assert (tokenizer.vocab_size, end) == (info.vocab_size, info.end_of_document)
    assert info.replaced_documents == 1
    as_bytes = prepared(source, tmp_path / "bytes", validation_fraction=0.2)
    for split in ("train", "validation"):
        rows = documents(info.path, split)
        assert all(row[-1] == end and end not in row[:-1] for row in rows)
        decoded = [tokenizer.decode(row) for row in rows]
        # The same documents are held out, whatever the tokenizer.
        assert decoded == [text.decode("utf-8", "replace") for text in texts(as_bytes, split)]
    assert TokenDataset(info.path, "train", 16).window(0)[0].tolist() == documents(info.path, "train")[0][:17]


def test_another_tokenizer_than_that_of_a_prepared_folder_is_refused(tmp_path: Path, tokenizer_json: Path) -> None:
    source = write_lines(tmp_path / "corpus", 30)
    folder = prepared(source, tmp_path / "out", tokenizer=str(tokenizer_json))
    for same in ("bytes", str(tokenizer_json)):
        assert ensure_prepared(DataConfig(path=str(folder), tokenizer=same), tmp_path / "cache") == folder
    backend("<|endoftext|>").save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(PreparedError, match=r"prepared with another tokenizer than .* \(data.tokenizer\)"):
        ensure_prepared(DataConfig(path=str(folder), tokenizer=str(tmp_path / "tokenizer.json")), tmp_path / "cache")


def test_a_large_vocabulary_takes_wider_tokens(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(70_000)} | {"</s>": 70_000}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text(" ".join(f"w{i}" for i in range(69_000, 70_000)))
    folder = prepared(
        tmp_path / "a.txt",
        tmp_path / "out",
        tokenizer=str(tmp_path / "tokenizer.json"),
        validation_fraction=0,
    )
    assert read_prepared(folder).dtype == "uint32"
    tokens, _ = TokenDataset(folder, "train", 1000).window(0)
    assert np.array_equal(tokens, [*range(69_000, 70_000), 70_000])
