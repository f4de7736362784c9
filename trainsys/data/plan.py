"""What is to be prepared, decided before any text is read, and the key that names it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import xxhash

from trainsys.config import DataConfig
from trainsys.data.document import LONG_DOCUMENT_BYTES, SECTION_BYTES
from trainsys.data.errors import NoSourceError
from trainsys.data.prepared import SPLITS, PreparedInfo, Split
from trainsys.data.shard import BATCH_TOKENS, ShardFormat
from trainsys.data.source import SourceFile, find_files
from trainsys.data.tokenizer import Tokenizer, load_tokenizer

_LAYOUT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One preparation, fully described."""

    source: str
    """What messages call it."""
    files: tuple[tuple[SourceFile, Split | None], ...]
    """In order; a file without a split is held out document by document."""
    paths: tuple[str, ...]
    """What `files` was found from."""
    text_key: str
    tokenizer: Tokenizer
    held_out_fraction: float
    format: ShardFormat
    shard_tokens: int

    @property
    def key(self) -> str:
        """Digest of all that decides the shards: listing, tokenizer, settings."""
        description = {
            "layout": [
                _LAYOUT_VERSION,
                LONG_DOCUMENT_BYTES,
                SECTION_BYTES,
                BATCH_TOKENS,
                self.shard_tokens,
                self.format,
            ],
            "files": [[file.url, file.size, file.version, split] for file, split in self.files],
            "text_key": self.text_key,
            "tokenizer": self.tokenizer.digest,
            "held_out_fraction": self.held_out_fraction,
        }
        return xxhash.xxh3_128_hexdigest(json.dumps(description).encode())

    @property
    def total_bytes(self) -> int | None:
        """Stored bytes of all files, where every size is known."""
        sizes = [file.size for file, _ in self.files]
        return None if None in sizes else sum(size for size in sizes if size is not None)


def plan_from_config(config: DataConfig, format: ShardFormat, shard_tokens: int) -> Plan:
    """The plan for text: `config.path`, less the files that `config.validation_path` names.

    Raises:
        SourceError: a path means no file.
        TokenizerError: the tokenizer cannot be had.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    files = find_files(config.path)
    held_out = find_files(config.validation_path) if config.validation_path else []
    named = {file.url for file in held_out}
    train = [file for file in files if file.url not in named]
    if not train:
        raise NoSourceError(
            f"{config.path}: every file of it is also in {config.validation_path} (data.validation_path)"
        )
    split: Split | None = "train" if held_out or not config.validation_fraction else None
    return Plan(
        source=config.path,
        files=(*((file, split) for file in train), *((file, "validation") for file in held_out)),
        paths=(config.path, *([config.validation_path] if held_out else [])),
        text_key=config.text_key,
        tokenizer=tokenizer,
        held_out_fraction=config.validation_fraction if split is None else 0.0,
        format=format,
        shard_tokens=shard_tokens,
    )


def plan_from_prepared(info: PreparedInfo, format: ShardFormat, shard_tokens: int) -> Plan:
    """The plan that writes a prepared folder again, in another format."""
    folders: dict[Split, Path] = {split: info.path / split for split in SPLITS if info.split(split).shards}
    return Plan(
        source=info.source,
        files=tuple((file, split) for split, folder in folders.items() for file in find_files(str(folder))),
        paths=tuple(map(str, folders.values())),
        text_key="tokens",
        tokenizer=info.tokenizer(),
        held_out_fraction=0.0,
        format=format,
        shard_tokens=shard_tokens,
    )
