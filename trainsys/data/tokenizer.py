"""Text to token ids and back: bytes, or a Hugging Face tokenizer from a local file or folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from trainsys.data.errors import TokenizerError

# End-of-text tokens of the known families, tried in this order where the folder does not say.
_END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>")


class Tokenizer(Protocol):
    """What preparation, training and generation need of a tokenizer."""

    @property
    def spec(self) -> str:
        """What `load_tokenizer` made it from."""
        ...

    @property
    def digest(self) -> str:
        """Equal for tokenizers that give equal ids."""
        ...

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def end_of_document(self) -> int:
        """The id that ends a document; no text gives it."""
        ...

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[NDArray[np.int64] | NDArray[np.uint8]]:
        """The ids of each text, without any special token."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; ends of documents are left out, what is no text becomes U+FFFD."""
        ...

    def save(self, folder: Path) -> str:
        """Writes what `load_tokenizer` needs into `folder`, if anything; the spec relative to it."""
        ...


class ByteTokenizer:
    """256 byte values, and 256 for the end of a document."""

    spec = "bytes"
    digest = "bytes"
    vocab_size = 257
    end_of_document = 256

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[NDArray[np.int64] | NDArray[np.uint8]]:
        """The bytes of each text (UTF-8 of a str), as a view where they are bytes already."""
        return [
            np.frombuffer(text if isinstance(text, bytes) else text.encode("utf-8", "replace"), np.uint8)
            for text in texts
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """The bytes as UTF-8; ends of documents are left out, other ids and broken bytes become U+FFFD."""
        replacement = "\ufffd".encode()
        parts = (bytes((i,)) if 0 <= i < 256 else b"" if i == 256 else replacement for i in map(int, ids))
        return b"".join(parts).decode("utf-8", "replace")

    def save(self, folder: Path) -> str:
        """Writes nothing."""
        return self.spec


class HuggingFaceTokenizer:
    """A `tokenizers.Tokenizer` with the name of its end-of-text token.

    Text that spells a special token ("<|endoftext|>") is encoded as plain text, and a tokenizer's own
    truncation, padding and leading tokens are off. Made by `load_tokenizer`.
    """

    def __init__(self, backend: Any, end_name: str, spec: str) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        self._end_name = end_name
        self.spec = spec
        self.end_of_document: int = backend.token_to_id(end_name)
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.digest: str = xxhash.xxh3_128_hexdigest(f"{end_name}\n{backend.to_str()}".encode())

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[NDArray[np.int64] | NDArray[np.uint8]]:
        """The ids of each text, on all cores; bytes are read as UTF-8, broken ones as U+FFFD."""
        decoded = [text.decode("utf-8", "replace") if isinstance(text, bytes) else text for text in texts]
        encodings = self._backend.encode_batch_fast(decoded, add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int64) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` without special tokens; ids outside the vocabulary are left out."""
        text: str = self._backend.decode([int(i) for i in ids], skip_special_tokens=True)
        return text

    def save(self, folder: Path) -> str:
        """Writes `tokenizer/tokenizer.json` and its `tokenizer_config.json`."""
        target = folder / "tokenizer"
        target.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(target / "tokenizer.json"))
        (target / "tokenizer_config.json").write_text(json.dumps({"eos_token": self._end_name}))
        return "tokenizer"


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer `spec` names: `bytes`, a tokenizer.json, or a Hugging Face tokenizer folder. Nothing is
    downloaded.

    Raises:
        TokenizerError: nothing there, unreadable, no end-of-text token, or the extra `hf` is not installed.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec).expanduser()
    if not path.exists():
        raise TokenizerError(f"{spec}: no tokenizer there; 'bytes', a tokenizer.json or a tokenizer folder is wanted")
    if path.is_file():
        return _from_json(path, path.parent / "tokenizer_config.json", spec)
    if (path / "tokenizer.json").is_file():
        return _from_json(path / "tokenizer.json", path / "tokenizer_config.json", spec)
    return _from_folder(path, spec)


def _from_json(path: Path, config: Path, spec: str) -> Tokenizer:
    try:
        from tokenizers import Tokenizer as Backend
    except ImportError as error:
        raise TokenizerError(f"{spec}: needs the package tokenizers; pip install 'trainsys[hf]'") from error
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:
        raise TokenizerError(f"{path}: not a tokenizer.json: {' '.join(str(error).split())}") from error
    named = _end_name_of(config)
    names = [named] if named else [name for name in _END_NAMES if backend.token_to_id(name) is not None]
    if not names or backend.token_to_id(names[0]) is None:
        wanted = (
            f"its end-of-text token '{named}' is not in its vocabulary" if named else "it names no end-of-text token"
        )
        raise TokenizerError(f'{path}: {wanted}; put {{"eos_token": ...}} into tokenizer_config.json beside it')
    return HuggingFaceTokenizer(backend, names[0], spec)


def _end_name_of(config: Path) -> str:
    if not config.is_file():
        return ""
    try:
        token = json.loads(config.read_text(encoding="utf-8")).get("eos_token") or ""
    except (ValueError, AttributeError) as error:
        raise TokenizerError(f"{config}: not a JSON object: {error}") from error
    return str(token["content"] if isinstance(token, dict) else token)


def _from_folder(path: Path, spec: str) -> Tokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise TokenizerError(f"{spec}: needs the package transformers; pip install 'trainsys[hf]'") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise TokenizerError(f"{spec}: not a tokenizer folder: {' '.join(str(error).split())}") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TokenizerError(f"{spec}: only tokenizers that can be saved as tokenizer.json are supported")
    if not tokenizer.eos_token:
        raise TokenizerError(f"{spec}: it names no end-of-text token; set eos_token in tokenizer_config.json")
    return HuggingFaceTokenizer(backend, tokenizer.eos_token, spec)
