"""Rollouts on the wire: what goes in comes out, and nothing else does."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest

from tests.test_trainsys.rollouts import group, row
from trainsys.rl import schema, tasks
from trainsys.rl.bounds import Bounds
from trainsys.rl.rollout import Completion
from trainsys.rl.schema import SCHEMA, FormatError, Row

_BOUNDS = Bounds()


def _reason(message: bytes, bounds: Bounds = _BOUNDS) -> str:
    with pytest.raises(FormatError) as caught:
        schema.decode(message, bounds)
    return caught.value.reason


def test_rows_come_back_as_they_were_sent() -> None:
    own = group(3)
    tokens = tuple(
        replace(completion, token_ids=tuple(range(completion.num_tokens)), log_probs=(-0.5,) * completion.num_tokens)
        for completion in own.completions
    )
    full = schema.row_of(
        replace(own, completions=tokens), sequence=7, model="tiny", created_ms=5, tokenizer=bytes(range(32))
    )
    sent = [full, row(4, sequence=2**63 - 1)]
    assert schema.decode(schema.encode(sent), _BOUNDS) == sent


@pytest.mark.parametrize("finished", [True, False])
def test_a_truth_value_survives(finished: bool) -> None:
    # The reference implementation compares an int with bytes, and reads every boolean as False.
    sent = row(1)
    sent = replace(sent, completions=tuple(replace(item, finished=finished) for item in sent.completions))
    (found,) = schema.decode(schema.encode([sent]), _BOUNDS)
    assert [item.finished for item in found.completions] == [finished] * len(sent.completions)


def test_a_number_costs_its_width() -> None:
    # The reference implementation sends at least 28 bytes for each integer.
    few, many = (schema.encode([row(seed, sequence=seed) for seed in range(count)]) for count in (64, 128))
    texts = sum(len(item.text) for seed in range(64, 128) for item in row(seed).completions)
    assert (len(many) - len(few) - texts) / 64 < 400  # ids, names and prompt: 270; four completions of 6 numbers


def test_no_answer_travels() -> None:
    sent = row(1, right=0)
    assert tasks.answer_of(sent.question).encode() not in schema.encode([sent])


def test_tokens_travel_only_with_their_tokenizer() -> None:
    own = group(1)
    drawn = tuple(replace(c, token_ids=(1,) * c.num_tokens, log_probs=(-1.0,) * c.num_tokens) for c in own.completions)
    sent = schema.row_of(replace(own, completions=drawn), sequence=1, model="", created_ms=0)
    assert all(item.token_ids == item.log_probs == () for item in sent.completions)


def test_every_field_counts_in_the_id() -> None:
    sent = row(1)
    question, completions = sent.question, sent.completions
    changed = [
        replace(sent, node="bert"),
        replace(sent, sequence=2),
        replace(sent, model="x"),
        replace(sent, policy_version=9),
        replace(sent, created_ms=9),
        replace(sent, tokenizer=b"x" * 32),
        replace(sent, claimed_rewards=tuple(1 - reward for reward in sent.claimed_rewards)),
        replace(sent, question=replace(question, task="x")),
        replace(sent, question=replace(question, version="x")),
        replace(sent, question=replace(question, parameters="x")),
        replace(sent, question=replace(question, prompt="x")),
        replace(sent, question=replace(question, seed=9)),
        *(
            replace(sent, completions=(replace(completions[0], **change), *completions[1:]))
            for change in ({"text": "x"}, {"num_tokens": 9}, {"finished": False})
        ),
    ]
    assert len({item.digest for item in [sent, *changed]}) == 1 + len(changed)


def test_moving_a_letter_from_one_field_to_the_next_changes_the_id() -> None:
    sent = row(1)
    one, other = (
        replace(sent, question=replace(sent.question, task=a, version=b)) for a, b in (("ab", "c"), ("a", "bc"))
    )
    assert one.digest != other.digest


def test_a_name_says_who_which_and_what() -> None:
    encoded = schema.encode([row(1)])
    name = schema.name_of(encoded, node="anna", sequence=12)
    parsed = schema.parse_name(name)
    assert parsed is not None
    assert (parsed.node, parsed.sequence) == ("anna", 12)
    assert schema.name_of(encoded + b"x", node="anna", sequence=12) != name


@pytest.mark.parametrize(
    "name", ["", "x", "a.b.c", "../x.1.2", "Anna.0.0", "a." + "9" * 19 + "." + "0" * 64, "a" * 300]
)
def test_another_name_is_none(name: str) -> None:
    assert schema.parse_name(name) is None


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_nothing_is_decompressed(codec: str) -> None:
    sink = pa.BufferOutputStream()
    column = pa.array(["a" * 8000] * 200)
    values = {field.name: pa.array([None] * 200, field.type) for field in SCHEMA} | {"prompt": column}
    with pa.ipc.new_stream(sink, SCHEMA, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([values[field.name] for field in SCHEMA], schema=SCHEMA))
    assert _reason(sink.getvalue().to_pybytes()) == "compression"


def test_a_count_on_the_wire_is_not_believed() -> None:
    # The reference implementation reads 64-bit counts and allocates what they say.
    sent = [row(1)]
    encoded = schema.encode(sent)
    before = pa.total_allocated_bytes()
    refused = 0
    for offset in range(0, len(encoded) - 8, 4):
        damaged = encoded[:offset] + struct.pack("<q", 2**62) + encoded[offset + 8 :]
        try:
            assert schema.decode(damaged, _BOUNDS) == sent  # what was overwritten means nothing
        except FormatError:
            refused += 1
    assert refused > 100
    assert pa.total_allocated_bytes() - before < 2**20


def test_more_than_one_batch_is_refused() -> None:
    sink = pa.BufferOutputStream()
    batch = schema._read_batch(schema.encode([row(1)]))
    with pa.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_batch(batch)
        writer.write_batch(batch)
    assert _reason(sink.getvalue().to_pybytes()) == "arrow"


def test_another_version_or_column_is_refused() -> None:
    for other in (SCHEMA.with_metadata({"trainsys.rollouts": "2"}), SCHEMA.remove(3)):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, other) as writer:
            writer.write_batch(pa.RecordBatch.from_pylist([], schema=other))
        assert _reason(sink.getvalue().to_pybytes()) == "schema"


def _completions(change: dict[str, Any]) -> Row:
    sent = row(1)
    return replace(sent, completions=(replace(sent.completions[0], **change), *sent.completions[1:]))


_SENT = row(1)


@pytest.mark.parametrize(
    "bad",
    [
        replace(_SENT, node="Anna"),
        replace(_SENT, node="a/b"),
        replace(_SENT, sequence=-1),
        replace(_SENT, question=replace(_SENT.question, seed=-1)),
        replace(_SENT, question=replace(_SENT.question, prompt="x" * 20_000)),
        replace(_SENT, question=replace(_SENT.question, parameters=" " * 5000)),
        replace(_SENT, question=replace(_SENT.question, task="x" * 200)),
        replace(_SENT, tokenizer=b"x"),
        replace(_SENT, signature=b"x"),
        replace(_SENT, claimed_rewards=(float("nan"), *_SENT.claimed_rewards[1:])),
        replace(_SENT, claimed_rewards=(2.0, *_SENT.claimed_rewards[1:])),
        replace(_SENT, completions=_SENT.completions[:1], claimed_rewards=_SENT.claimed_rewards[:1]),
        replace(_SENT, completions=_SENT.completions * 17, claimed_rewards=_SENT.claimed_rewards * 17),
        _completions({"text": "x" * 9000}),
        _completions({"num_tokens": -1}),
        _completions({"num_tokens": 1, "token_ids": (-1,)}),
        _completions({"num_tokens": 1, "token_ids": (1,), "log_probs": (0.5,)}),
        _completions({"num_tokens": 1, "token_ids": (1,), "log_probs": (float("nan"),)}),
        _completions({"num_tokens": 1, "token_ids": (1,), "log_probs": (float("-inf"),)}),
    ],
)
def test_a_value_out_of_bounds_is_refused(bad: Row) -> None:
    assert _reason(schema.encode([bad])) == "bounds"


def test_no_rows_too_many_rows_or_too_many_bytes_are_refused() -> None:
    assert _reason(schema.encode([])) == "rows"
    assert _reason(schema.encode([row(seed) for seed in range(3)]), Bounds(rows=2)) == "rows"
    assert _reason(schema.encode([row(1)]), Bounds(message_bytes=100)) == "size"


def test_a_missing_value_is_refused() -> None:
    whole = schema._read_batch(schema.encode([row(1)]))
    for index in range(len(SCHEMA)):
        columns = list(whole.columns)
        columns[index] = pa.array([None], SCHEMA.field(index).type)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, SCHEMA) as writer:
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))
        assert _reason(sink.getvalue().to_pybytes()) == "null"
    items = pa.array([[None, None]], SCHEMA.field("completions").type)
    columns = [
        items if field.name == "completions" else column for field, column in zip(SCHEMA, whole.columns, strict=True)
    ]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))
    assert _reason(sink.getvalue().to_pybytes()) == "null"


def test_completions_of_one_group_may_differ_in_everything() -> None:
    sent = _completions({"text": "", "num_tokens": 0, "finished": False})
    (found,) = schema.decode(schema.encode([sent]), _BOUNDS)
    assert found.completions[0] == Completion("", 0, False)
