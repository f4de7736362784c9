"""A prepared folder: its manifest `meta.json`, and whether the shards are what it says.

DIR/meta.json                  written last: a folder without it is not prepared
DIR/train/00000.arrow ...      shards, in order
DIR/validation/00000.arrow ...
DIR/unigram.npy                int64 [vocab_size]: how often each id occurs in train
DIR/tokenizer/                 the tokenizer, unless it is `bytes`
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import xxhash
from numpy.typing import NDArray

from trainsys.data.errors import PreparedError
from trainsys.data.shard import META, PREPARED_KIND, ShardFormat, ShardInfo, TokenDtype, shard_digest
from trainsys.data.tokenizer import Tokenizer, load_tokenizer

Split = Literal["train", "validation"]
SPLITS: tuple[Split, Split] = ("train", "validation")

UNIGRAM = "unigram.npy"
_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitInfo:
    """One split of a prepared folder."""

    documents: int
    tokens: int
    """Ends of documents included."""
    bytes: int
    """Of the text; of the ids where the source held ids."""
    shards: tuple[ShardInfo, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedInfo:
    """What a prepared folder holds; made by `prepare` and `read_prepared`."""

    path: Path
    source: str
    """The path the text came from."""
    source_key: str
    """Digest of the listing and settings it was made from: equal keys need no new preparation."""
    fingerprint: str
    """Digest of the tokens themselves and what they mean; the same wherever the folder lies."""
    tokenizer_spec: str
    """`bytes`, or the folder of the tokenizer within this folder."""
    vocab_size: int
    end_of_document: int
    dtype: TokenDtype
    format: ShardFormat
    train: SplitInfo
    validation: SplitInfo
    empty_documents: int
    """Documents without text, left out."""
    replaced_documents: int
    """Documents (pieces, of long ones) with broken UTF-8, replaced by U+FFFD; 0 for byte tokens."""
    unigram_entropy: float
    """Nats per token of train under its own token frequencies: what a model must beat to have learnt."""

    def split(self, name: Split) -> SplitInfo:
        """The split of that name."""
        return self.train if name == "train" else self.validation

    def tokenizer(self) -> Tokenizer:
        """The tokenizer the tokens were made with, from this folder."""
        return load_tokenizer(
            self.tokenizer_spec if self.tokenizer_spec == "bytes" else str(self.path / self.tokenizer_spec)
        )

    def unigram_counts(self) -> NDArray[np.int64]:
        """How often each id occurs in train: int64 [vocab_size]."""
        counts: NDArray[np.int64] = np.load(self.path / UNIGRAM)
        return counts


def is_prepared(path: Path) -> bool:
    """Whether `path` is a folder that `prepare` finished."""
    try:
        with (path / META).open(encoding="utf-8", errors="replace") as file:
            return PREPARED_KIND in file.read(200)
    except (FileNotFoundError, NotADirectoryError):
        return False


def read_prepared(path: Path) -> PreparedInfo:
    """What the folder holds; shards are checked by size (`verify` reads them).

    Raises:
        PreparedError: not a prepared folder, of another version, or a shard is missing or of another size.
    """
    info = _parse(path)
    wrong = []
    for split in SPLITS:
        for shard in info.split(split).shards:
            file = path / split / shard.name
            size = file.stat().st_size if file.is_file() else None
            if size is None:
                wrong.append(f"{split}/{shard.name} is missing")
            elif size != shard.file_bytes:
                wrong.append(f"{split}/{shard.name} has {size} of {shard.file_bytes} bytes")
    if wrong:
        raise PreparedError(f"{path}: corrupt: {'; '.join(wrong)}; delete this folder and prepare the data again")
    return info


def verify(path: Path) -> PreparedInfo:
    """What the folder holds, every token of it read and compared with its digest.

    Raises:
        PreparedError: naming every shard that is not what the manifest says.
    """
    info = read_prepared(path)
    wrong = []
    for split in SPLITS:
        for shard in info.split(split).shards:
            try:
                found = shard_digest(path / split / shard.name, info.format)
            except PreparedError as error:
                wrong.append(f"{split}/{shard.name} cannot be read ({error})")
                continue
            if found != shard.digest:
                wrong.append(f"{split}/{shard.name} holds other tokens (digest {found}, not {shard.digest})")
    if wrong:
        raise PreparedError(f"{path}: corrupt: {'; '.join(wrong)}; delete this folder and prepare the data again")
    return info


def content_fingerprint(tokenizer: Tokenizer, shards: Mapping[Split, list[ShardInfo]]) -> str:
    """Digest of the tokens of every split and of the tokenizer that gives them meaning."""
    parts = [
        tokenizer.digest,
        *(f"{split}:{shard.tokens}:{shard.digest}" for split in SPLITS for shard in shards[split]),
    ]
    return xxhash.xxh3_128_hexdigest("\n".join(parts).encode())


def entropy(counts: NDArray[np.int64]) -> float:
    """Shannon entropy of the frequencies `counts`, in nats; 0 for none."""
    seen = counts[counts > 0].astype(np.float64)
    if not len(seen):
        return 0.0
    share = seen / seen.sum()
    return float(-(share * np.log(share)).sum())


def dump_meta(info: PreparedInfo) -> str:
    """The text of `meta.json`: the same for the same content, wherever and whenever it is written."""
    fields = asdict(info)
    del fields["path"]
    return json.dumps({"kind": PREPARED_KIND, "version": _VERSION, **fields}, indent=1) + "\n"


def _parse(path: Path) -> PreparedInfo:
    file = path / META
    try:
        fields: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if fields.pop("kind") != PREPARED_KIND:
            raise PreparedError(f"{file}: not the manifest of prepared tokens")
        version = fields.pop("version")
        if version != _VERSION:
            raise PreparedError(
                f"{file}: version {version}; this trainsys reads version {_VERSION}: prepare the data again"
            )
        for split in SPLITS:
            shards = tuple(ShardInfo(**shard) for shard in fields[split].pop("shards"))
            fields[split] = SplitInfo(**fields[split], shards=shards)
        return PreparedInfo(path=path, **cast(Any, fields))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise PreparedError(
            f"{path}: not a prepared folder (no {META}); make one with `trainsys data prepare`"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PreparedError(
            f"{file}: corrupt manifest: {error}; delete this folder and prepare the data again"
        ) from error
