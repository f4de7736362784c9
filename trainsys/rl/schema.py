"""Rollouts as bytes: one Arrow row per group, named by the hash of its content. Nothing here is executed or unpickled.

A message is an Arrow IPC stream of one schema and one record batch, uncompressed, written by one node. No answer
travels: whoever receives a row makes question and answer anew from (task, version, seed, parameters). `decode` takes
bytes from anyone, within `Bounds`; what it returns is well formed and says what its sender signed, and still claims
only: `trainsys.rl.validation` judges it.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from trainsys.rl.bounds import Bounds, is_node_name
from trainsys.rl.rollout import Completion, Group, Question

VERSION = 1
"""Of the columns and of what `Row.digest` hashes; a message of another version is refused."""
DIGEST_BYTES = 32
_SIGNATURE_BYTES = 64


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


_COMPLETION = pa.struct(
    [
        _required("text", pa.utf8()),
        _required("num_tokens", pa.int32()),
        _required("finished", pa.bool_()),
        _required("reward", pa.float32()),
        _required("token_ids", pa.list_(_required("item", pa.int32()))),
        _required("log_probs", pa.list_(_required("item", pa.float32()))),
    ]
)
SCHEMA = pa.schema(
    [
        _required("rollout_id", pa.binary(DIGEST_BYTES)),
        _required("node", pa.utf8()),
        _required("sequence", pa.int64()),
        _required("model", pa.utf8()),
        _required("policy_version", pa.int64()),
        _required("created_ms", pa.int64()),
        _required("task", pa.utf8()),
        _required("task_version", pa.utf8()),
        _required("seed", pa.int64()),
        _required("parameters", pa.utf8()),
        _required("prompt", pa.utf8()),
        _required("completions", pa.list_(_required("item", _COMPLETION))),
        _required("tokenizer", pa.binary()),
        _required("signature", pa.binary()),
    ],
    metadata={"trainsys.rollouts": str(VERSION)},
)


class FormatError(ValueError):
    """Bytes that are no message of this schema; `reason` is one word for counting."""

    def __init__(self, reason: str, text: str) -> None:
        self.reason = reason
        super().__init__(f"{reason}: {text}")


@dataclass(frozen=True, slots=True)
class Row:
    """What one node says of one group."""

    node: str
    """Letters, digits and hyphens; of a node that signs, its public key in hexadecimal."""
    sequence: int
    """The node's own count of what it shared, 0 to 2^63 - 1."""
    model: str
    """For people: what generated this."""
    policy_version: int
    """Updates that the sender's policy had seen: a count of its own, not comparable with ours."""
    created_ms: int
    """Unix time by the sender's clock; for reports, never for a decision."""
    question: Question
    completions: tuple[Completion, ...]
    claimed_rewards: tuple[float, ...]
    """float32 values."""
    tokenizer: bytes = b""
    """Digest of the sender's tokenizer; empty where token ids and log-probabilities do not travel."""
    signature: bytes = b""
    """Ed25519 by `node` over `digest`; empty: unsigned."""

    @property
    def digest(self) -> bytes:
        """BLAKE2b-256 over every field but the signature: the row's identity."""
        return _digest([*self._sender(), *self._content()])

    @property
    def content_digest(self) -> bytes:
        """BLAKE2b-256 over question and texts alone: equal for a group that another node passes off as its own."""
        question = self.question
        texts = [completion.text.encode() for completion in self.completions]
        return _digest([question.task.encode(), struct.pack("<q", question.seed), question.prompt.encode(), *texts])

    def _sender(self) -> list[bytes]:
        numbers = struct.pack("<iqqq", VERSION, self.sequence, self.policy_version, self.created_ms)
        return [numbers, self.node.encode(), self.model.encode(), self.tokenizer]

    def _content(self) -> list[bytes]:
        question = self.question
        parts = [text.encode() for text in (question.task, question.version, question.parameters, question.prompt)]
        parts.append(struct.pack("<qi", question.seed, len(self.completions)))
        for completion, reward in zip(self.completions, self.claimed_rewards, strict=True):
            ids, log_probs = completion.token_ids, completion.log_probs
            parts.append(completion.text.encode())
            parts.append(struct.pack("<i?f", completion.num_tokens, completion.finished, reward))
            parts.append(struct.pack(f"<{len(ids)}i", *ids))
            parts.append(struct.pack(f"<{len(log_probs)}f", *log_probs))
        return parts


def _digest(parts: Iterable[bytes]) -> bytes:
    """Hash parts with their number and lengths, so that no two lists of parts are the same bytes."""
    listed = list(parts)
    hasher = hashlib.blake2b(
        struct.pack(f"<{1 + len(listed)}q", len(listed), *map(len, listed)), digest_size=DIGEST_BYTES
    )
    hasher.update(b"".join(listed))
    return hasher.digest()


def row_of(group: Group, *, sequence: int, model: str, created_ms: int, tokenizer: bytes = b"") -> Row:
    """Return what a node sends of its own group; token ids and log-probabilities only along with a tokenizer."""
    completions = group.completions if tokenizer else as_text(group.completions)
    return Row(
        node=group.node,
        sequence=sequence,
        model=model,
        policy_version=group.policy_version,
        created_ms=created_ms,
        question=group.question,
        completions=completions,
        claimed_rewards=group.rewards,
        tokenizer=tokenizer,
    )


def as_text(completions: tuple[Completion, ...]) -> tuple[Completion, ...]:
    """Return completions without their tokens."""
    return tuple(replace(item, token_ids=(), log_probs=()) if item.token_ids else item for item in completions)


def encode(rows: Sequence[Row]) -> bytes:
    """Return the message that holds `rows`."""
    columns = [[_column(row) for row in rows] for _column in _COLUMNS]
    arrays = [pa.array(values, field.type) for values, field in zip(columns, SCHEMA, strict=True)]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=SCHEMA))
    encoded: bytes = sink.getvalue().to_pybytes()
    return encoded


def _completions(row: Row) -> list[dict[str, Any]]:
    return [
        {
            "text": completion.text,
            "num_tokens": completion.num_tokens,
            "finished": completion.finished,
            "reward": reward,
            "token_ids": completion.token_ids,
            "log_probs": completion.log_probs,
        }
        for completion, reward in zip(row.completions, row.claimed_rewards, strict=True)
    ]


_COLUMNS = (
    lambda row: row.digest,
    lambda row: row.node,
    lambda row: row.sequence,
    lambda row: row.model,
    lambda row: row.policy_version,
    lambda row: row.created_ms,
    lambda row: row.question.task,
    lambda row: row.question.version,
    lambda row: row.question.seed,
    lambda row: row.question.parameters,
    lambda row: row.question.prompt,
    _completions,
    lambda row: row.tokenizer,
    lambda row: row.signature,
)


def name_of(message: bytes, *, node: str, sequence: int) -> str:
    """Return the name a message is stored under: who, which, and the hash of its bytes."""
    return f"{node}.{sequence:019d}.{hashlib.blake2b(message, digest_size=DIGEST_BYTES).hexdigest()}"


@dataclass(frozen=True, slots=True)
class Name:
    """What `name_of` wrote into a name; unauthenticated."""

    node: str
    sequence: int
    digest: bytes


def parse_name(name: str) -> Name | None:
    """Return the parts of a message's name, or None where it is none."""
    node, _, rest = name.partition(".")
    sequence, _, digest = rest.partition(".")
    if not (is_node_name(node) and re.fullmatch(r"\d{19}", sequence, re.ASCII)):
        return None
    if not re.fullmatch(rf"[0-9a-f]{{{2 * DIGEST_BYTES}}}", digest, re.ASCII) or int(sequence) >= 2**63:
        return None
    return Name(node, int(sequence), bytes.fromhex(digest))


def decode(message: bytes, bounds: Bounds) -> list[Row]:
    """Return the rows of a message from anyone; their ids are right and every value is within bounds.

    Raises:
        FormatError: it is no such message. Nothing else, and in time and memory bounded by the message's size.
    """
    if len(message) > bounds.message_bytes:
        raise FormatError("size", f"{len(message)} bytes; allowed: {bounds.message_bytes}")
    try:
        batch = _read_batch(message)
        if not 0 < batch.num_rows <= bounds.rows:
            raise FormatError("rows", f"{batch.num_rows} rows; allowed: 1 to {bounds.rows}")
        batch.validate(full=True)  # without it some damaged buffers crash the interpreter when they are read
        if any(column.null_count for column in batch.columns):
            raise FormatError("null", "a value is missing")
        found = batch.to_pylist()
    except (pa.ArrowException, ValueError, OverflowError, KeyError, EOFError, OSError, struct.error) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError("arrow", str(error)[:200]) from error
    return [_row(values, bounds) for values in found]


def _read_batch(message: bytes) -> pa.RecordBatch:
    """Return the one record batch of a stream whose schema is ours, without decompressing anything."""
    reader = pa.ipc.MessageReader.open_stream(pa.BufferReader(message))
    try:
        head, body = reader.read_next_message(), reader.read_next_message()
    except StopIteration as error:
        raise FormatError("arrow", "the stream ends early") from error
    if (head.type, body.type) != ("schema", "record batch"):
        raise FormatError("arrow", f"a {head.type} and a {body.type}; allowed: a schema and a record batch")
    schema = pa.ipc.read_schema(head)
    if not schema.equals(SCHEMA, check_metadata=True):
        raise FormatError("schema", "other columns or another version")
    if _is_compressed(body.metadata.to_pybytes()):
        raise FormatError("compression", "a compressed batch; allowed: none")
    try:
        reader.read_next_message()
    except StopIteration:
        return pa.ipc.read_record_batch(body, SCHEMA)
    raise FormatError("arrow", "more than one record batch")


def _is_compressed(metadata: bytes) -> bool:
    """Return whether a record batch's flatbuffer names a codec; pyarrow decompresses as it reads, without a limit.

    Message: version, header type, header, …; RecordBatch: length, nodes, buffers, compression, …
    """
    (root,) = struct.unpack_from("<I", metadata, 0)
    header = _slot(metadata, root, 2)
    if header is None:
        return False
    (offset,) = struct.unpack_from("<I", metadata, header)
    return _slot(metadata, header + offset, 3) is not None


def _slot(metadata: bytes, table: int, index: int) -> int | None:
    """Return where a flatbuffer table keeps its field `index`, None where it has none."""
    (back,) = struct.unpack_from("<i", metadata, table)
    vtable = table - back
    if vtable < 0:
        raise FormatError("arrow", "a table points out of its message")
    (size,) = struct.unpack_from("<H", metadata, vtable)
    if 4 + 2 * index >= size:
        return None
    (offset,) = struct.unpack_from("<H", metadata, vtable + 4 + 2 * index)
    return table + offset if offset else None


def _row(values: dict[str, Any], bounds: Bounds) -> Row:
    """Return one row of a batch of our schema, whose nested values may still be absent or out of bounds."""
    try:
        row = _parse(values, bounds)
        if row.digest != values["rollout_id"]:
            raise FormatError("rollout_id", "the row's id is not the hash of its content")
    except (TypeError, AttributeError, UnicodeError, struct.error) as error:  # null inside of a list or struct
        raise FormatError("null", str(error)[:200]) from error
    return row


def _parse(values: dict[str, Any], bounds: Bounds) -> Row:
    if not is_node_name(values["node"]):
        raise FormatError("bounds", "node: is no name of a node")
    if not 2 <= len(values["completions"]) <= bounds.completions:
        raise FormatError("bounds", f"completions: {len(values['completions'])}; allowed: 2 to {bounds.completions}")
    for key in ("sequence", "policy_version", "seed"):
        if values[key] < 0:
            raise FormatError("bounds", f"{key}: below 0")
    if len(values["tokenizer"]) not in (0, DIGEST_BYTES) or len(values["signature"]) not in (0, _SIGNATURE_BYTES):
        raise FormatError("bounds", "tokenizer or signature: of a wrong length")
    sizes = {"prompt": bounds.prompt_bytes, "parameters": bounds.parameter_bytes}
    sizes |= dict.fromkeys(("model", "task", "task_version"), bounds.name_bytes)
    for key, largest in sizes.items():
        if len(values[key].encode()) > largest:
            raise FormatError("bounds", f"{key}: over {largest} bytes")
    return Row(
        node=values["node"],
        sequence=values["sequence"],
        model=values["model"],
        policy_version=values["policy_version"],
        created_ms=values["created_ms"],
        question=Question(
            values["task"], values["task_version"], values["seed"], values["parameters"], values["prompt"]
        ),
        completions=tuple(_completion(item, bounds) for item in values["completions"]),
        claimed_rewards=tuple(item["reward"] for item in values["completions"]),
        tokenizer=values["tokenizer"],
        signature=values["signature"],
    )


def _completion(item: dict[str, Any], bounds: Bounds) -> Completion:
    ids, log_probs = tuple(item["token_ids"]), tuple(item["log_probs"])
    if len(item["text"].encode()) > bounds.completion_bytes:
        raise FormatError("bounds", f"completion: over {bounds.completion_bytes} bytes")
    # No tokenizer needs more than a token a byte, but for the end of the text.
    if not 0 <= item["num_tokens"] <= bounds.completion_bytes + 1:
        raise FormatError("bounds", "num_tokens: out of range")
    if len(ids) not in (0, item["num_tokens"]) or len(log_probs) not in (0, len(ids)):
        raise FormatError("bounds", "token_ids or log_probs: not one a token")
    if any(token < 0 for token in ids) or not all(-1e4 <= value <= 0 for value in log_probs):
        raise FormatError("bounds", "token_ids below 0, or log_probs that are none")
    if not 0 <= item["reward"] <= 1:
        raise FormatError("bounds", "reward: not in 0 to 1")
    return Completion(item["text"], item["num_tokens"], item["finished"], ids, log_probs)
