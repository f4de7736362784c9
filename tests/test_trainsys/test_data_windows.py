"""Windows, masks, batches and held-out sequences against slow references; the position is the whole state."""

from __future__ import annotations

import re
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_trainsys.data_reference import documents, prepared, window, write_lines
from trainsys.data import (
    IGNORE,
    BatchLoader,
    DataError,
    DataPosition,
    MicroBatch,
    Order,
    ResumeError,
    StepBatch,
    TokenDataset,
    ValidationSet,
)
from trainsys.data import shard as shard_module
from trainsys.data.batch import micro_batch
from trainsys.data.errors import PreparedError, TooFewTokensError

LENGTH = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 40 KB in documents of 1 to 400 bytes, in shards of at least 4000 tokens."""
    root = tmp_path_factory.mktemp("windows")
    generator = np.random.default_rng(0)
    lines = [
        f'{{"text": "{"abcdefgh" * 50}"}}'.replace("abcdefgh" * 50, "x" * n) for n in generator.integers(1, 400, 200)
    ]
    (root / "a.jsonl").write_text("\n".join(lines))
    write_lines(root / "texts", 5)
    return prepared(f"{root}/**/*.*", root / "out", shard_tokens=4000, validation_fraction=0.1)


@pytest.fixture(scope="module")
def dataset(folder: Path) -> TokenDataset:
    return TokenDataset(folder, "train", LENGTH)


def loader(dataset: TokenDataset, order: Order, **settings: Any) -> BatchLoader:
    defaults: dict[str, Any] = {
        "global_sequences": 12,
        "micro_sequences": 1,
        "data_rank": 0,
        "data_ranks": 1,
        "document_mask": True,
    }
    return BatchLoader(dataset, order, **(defaults | settings))


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("length", [1, 7, 256, 5000])
def test_windows_feed_every_token_once_and_look_one_further(folder: Path, split: Any, length: int) -> None:
    stream = np.array([token for document in documents(folder, split) for token in document])
    if len(stream) <= length:
        with pytest.raises(TooFewTokensError):
            TokenDataset(folder, split, length)
        return
    dataset = TokenDataset(folder, split, length)
    windows = [dataset.window(index)[0] for index in range(len(dataset))]
    fed = np.concatenate([tokens[:-1] for tokens in windows])
    assert np.array_equal(fed, stream[: len(fed)])
    assert len(stream) - len(fed) <= length
    assert [tokens[-1] for tokens in windows] == [stream[(i + 1) * length] for i in range(len(windows))]


@pytest.mark.parametrize("length", [3, 24, 1000, 6000])
def test_a_window_equals_the_reference_that_walks_over_the_split(folder: Path, length: int) -> None:
    dataset = TokenDataset(folder, "train", length)
    for index in {0, 1, len(dataset) // 3, len(dataset) // 2, len(dataset) - 1}:
        tokens, numbers = dataset.window(index)
        assert (tokens.dtype, numbers.dtype) == (np.int64, np.int32)
        assert (tokens.tolist(), numbers.tolist()) == window(folder, "train", index, length)


def test_windows_run_over_record_batches_and_shards(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_module, "BATCH_TOKENS", 500)
    source = write_lines(tmp_path / "corpus", 30)
    small = prepared(source, tmp_path / "out", shard_tokens=3000, validation_fraction=0)
    dataset = TokenDataset(small, "train", 700)
    assert len(dataset.info.train.shards) > 5
    spans = [len(dataset.views(index * 700, index * 700 + 701)) for index in range(len(dataset))]
    assert max(spans) > 1
    for index in range(len(dataset)):
        tokens, numbers = dataset.window(index)
        assert (tokens.tolist(), numbers.tolist()) == window(small, "train", index, 700)


def mapped_ranges(path: Path) -> list[range]:
    """Where the file lies in this process's memory."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    bounds = [re.match(r"([0-9a-f]+)-([0-9a-f]+)", line) for line in lines]
    return [range(int(found[1], 16), int(found[2], 16)) for found in bounds if found]


def test_tokens_are_read_where_the_file_is_mapped(folder: Path) -> None:
    dataset = TokenDataset(folder, "train", LENGTH)
    first_shard = folder / "train" / dataset.info.train.shards[0].name
    assert not mapped_ranges(first_shard), "opening maps nothing"
    (view,) = dataset.views(10, 200)
    assert view.dtype == np.uint16
    assert not view.flags.owndata
    assert not view.flags.writeable
    address = view.__array_interface__["data"][0]
    assert any(address in mapped and address + view.nbytes in mapped for mapped in mapped_ranges(first_shard))


def test_a_window_is_the_callers_own(dataset: TokenDataset) -> None:
    tokens, numbers = dataset.window(3)
    tokens[:], numbers[:] = 0, 9
    assert dataset.window(3)[0].any()
    assert dataset.window(3)[1][0] == 0


@pytest.mark.parametrize("index", [-1, 10**9])
def test_there_is_no_window_outside_the_split(dataset: TokenDataset, index: int) -> None:
    with pytest.raises(IndexError, match=rf"window {index} of {len(dataset)}"):
        dataset.window(index)


def test_a_shard_that_shrank_after_opening_is_named(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "corpus", 30)
    out = prepared(source, tmp_path / "out", shard_tokens=3000, validation_fraction=0)
    dataset = TokenDataset(out, "train", LENGTH)
    shards = [out / "train" / shard.name for shard in dataset.info.train.shards]
    shards[0].write_bytes(shards[1].read_bytes())
    with pytest.raises(PreparedError, match=r"00000.arrow: corrupt shard: \d+ of \d+ tokens"):
        dataset.window(0)
    shards[0].write_bytes(b"garbage")
    with pytest.raises(PreparedError, match=r"00000.arrow: corrupt shard"):
        dataset.window(0)


def test_parquet_shards_are_not_windows(tmp_path: Path) -> None:
    out = prepared(write_lines(tmp_path / "corpus", 9), tmp_path / "out", format="parquet")
    with pytest.raises(PreparedError, match=r"its shards are parquet; ensure_prepared makes Arrow shards of them"):
        TokenDataset(out, "train", 8)


def test_too_few_tokens_for_a_window_names_the_numbers_and_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "12345"}\n{"text": "12"}')
    out = prepared(tmp_path / "a.jsonl", tmp_path / "out", validation_fraction=0)
    assert len(TokenDataset(out, "train", 8)) == 1
    with pytest.raises(TooFewTokensError, match=r"9 tokens in train, one window needs 10: .* data.sequence_length"):
        TokenDataset(out, "train", 9)
    with pytest.raises(TooFewTokensError, match=r"nothing is held out; set data.validation_fraction"):
        TokenDataset(out, "validation", 8)
    with pytest.raises(ValueError, match=r"data.sequence_length: 0"):
        TokenDataset(out, "train", 0)


def reference_micro_batch(windows: list[tuple[list[int], list[int]]], mask: bool) -> dict[str, Any]:
    """Targets, document numbers and positions, one token at a time."""
    targets, positions = [], []
    for tokens, numbers in windows:
        row_targets, row_positions = [], []
        for i in range(len(tokens) - 1):
            row_targets.append(IGNORE if mask and numbers[i + 1] != numbers[i] else tokens[i + 1])
            row_positions.append(row_positions[-1] + 1 if i and numbers[i] == numbers[i - 1] else 0)
        targets.append(row_targets)
        positions.append(row_positions)
    split = mask and any(numbers[0] != numbers[-2] for _, numbers in windows)
    return {
        "tokens": [tokens[:-1] for tokens, _ in windows],
        "targets": targets,
        "document_ids": [numbers[:-1] for _, numbers in windows] if split else None,
        "positions": positions if split else None,
        "num_targets": sum(target != IGNORE for row in targets for target in row),
        "extras": {},
    }


def as_lists(batch: MicroBatch) -> dict[str, Any]:
    fields = {name: getattr(batch, name) for name in MicroBatch.__slots__}
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in fields.items()}


@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=6), min_size=1, max_size=4), st.booleans())
def test_targets_positions_and_masks_equal_the_reference(lengths: list[list[int]], mask: bool) -> None:
    size = 2 + min(sum(row) for row in lengths)
    windows = []
    for row in lengths:
        numbers = np.repeat(np.arange(len(row) + 1), [*row, size]).astype(np.int32)[:size]
        windows.append((np.arange(size, dtype=np.int64), numbers))
    expected = reference_micro_batch([(t.tolist(), n.tolist()) for t, n in windows], mask)
    assert as_lists(micro_batch(windows, document_mask=mask)) == expected


@pytest.mark.parametrize("mask", [True, False])
def test_a_step_is_the_micro_batches_of_its_samples(folder: Path, dataset: TokenDataset, mask: bool) -> None:
    order = Order(len(dataset), seed=1)
    with loader(dataset, order, micro_sequences=3, data_ranks=2, data_rank=1, document_mask=mask) as batches:
        steps = [batches.step(12 * index) for index in (5, 6, 7)]
    for step in steps:
        samples = order.samples(step.position + 6, 6).tolist()
        assert [as_lists(batch) for batch in step.micro_batches] == [
            reference_micro_batch([window(folder, "train", sample, LENGTH) for sample in part], mask)
            for part in (samples[:3], samples[3:])
        ]
        assert step.num_targets == sum(batch.num_targets for batch in step.micro_batches)
    assert [step.position for step in steps] == [60, 72, 84]
    every = [batch for step in steps for batch in step.micro_batches]
    assert all(batch.tokens.dtype == batch.targets.dtype == torch.int64 for batch in every)
    assert all(batch.tokens.is_contiguous() for batch in every)
    masks = {batch.document_ids.dtype for batch in every if batch.document_ids is not None}
    positions = {batch.positions.dtype for batch in every if batch.positions is not None}
    assert (masks, positions) == (({torch.int32}, {torch.int64}) if mask else (set(), set()))


def rows_of(step: StepBatch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Every sequence of a step: its tokens and targets."""
    return [
        (tuple(tokens), tuple(targets))
        for batch in step.micro_batches
        for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True)
    ]


def stream(dataset: TokenDataset, order: Order, start: int, steps: int, **settings: Any) -> list[Any]:
    """The sequences of `steps` steps from `start` on, of all data ranks, step by step."""
    ranks = settings.pop("data_ranks", 1)
    parts = []
    for rank in range(ranks):
        with loader(dataset, order, data_rank=rank, data_ranks=ranks, **settings) as batches:
            parts.append([rows_of(batches.step(start + 12 * i)) for i in range(steps)])
    return [[row for part in parts for row in part[i]] for i in range(steps)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("one_row", [True, False])
def test_resuming_in_the_middle_on_any_number_of_ranks_gives_the_tail_of_the_stream(
    dataset: TokenDataset, ranks: int, one_row: bool
) -> None:
    order = Order(len(dataset), seed=2)
    micro = 1 if one_row else 12 // ranks
    # The middle lies in another epoch than the start.
    num_steps = 2 * len(dataset) // 12
    whole = stream(dataset, order, 0, num_steps)
    start = num_steps // 2
    tail = stream(dataset, order, 12 * start, num_steps - start, data_ranks=ranks, micro_sequences=micro)
    assert tail == whole[start:]


def test_an_epoch_feeds_every_window_once(dataset: TokenDataset) -> None:
    order = Order(len(dataset), seed=3)
    steps = stream(dataset, order, 0, -(-2 * len(dataset) // 12), document_mask=False)
    fed = [row[0] for step in steps for row in step][: 2 * len(dataset)]
    every = Counter(tuple(dataset.window(index)[0][:-1].tolist()) for index in range(len(dataset)))
    assert Counter(fed[: len(dataset)]) == every
    assert Counter(fed[len(dataset) :]) == every
    assert fed[: len(dataset)] != fed[len(dataset) :]


class CountingDataset(TokenDataset):
    """Counts the windows it gives; holds them back or fails where told to."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.taken: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.broken_at: int | None = None

    def window(self, index: int) -> Any:
        assert self.gate.wait(30)
        if len(self.taken) == self.broken_at:
            raise PreparedError("shard 7 is gone")
        self.taken.append(index)
        return super().window(index)


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.001)


def test_resuming_reads_no_more_than_the_steps_ahead_whatever_the_position(folder: Path) -> None:
    dataset = CountingDataset(folder, "train", LENGTH)
    order = Order(len(dataset), seed=4)
    far = 12 * 10**9
    with loader(dataset, order, prefetch=2) as batches:
        batches.step(far)
    assert set(dataset.taken[:12]) == set(order.samples(far, 12).tolist())
    assert len(dataset.taken) <= 3 * 12


@pytest.mark.parametrize("prefetch", [1, 3])
def test_steps_are_made_ahead_and_no_further(folder: Path, prefetch: int) -> None:
    dataset = CountingDataset(folder, "train", LENGTH)
    order = Order(len(dataset), seed=5)
    with loader(dataset, order, prefetch=prefetch) as batches:
        batches.step(0)
        wait_until(lambda: len(dataset.taken) == 12 * (1 + prefetch))
        dataset.gate.clear()
        for i in range(1, prefetch + 1):
            batches.step(12 * i)
            assert batches.wait_s < 10, "made before it was asked for: the gate is closed"
        dataset.gate.set()
    assert dataset.taken[: 12 * (1 + prefetch)] == order.samples(0, 12 * (1 + prefetch)).tolist()


def test_waiting_for_data_is_measured(folder: Path) -> None:
    dataset = CountingDataset(folder, "train", LENGTH)
    dataset.gate.clear()
    with loader(dataset, Order(len(dataset), seed=6)) as batches:
        timer = threading.Timer(0.2, dataset.gate.set)
        timer.start()
        batches.step(0)
        assert 0.1 < batches.wait_s < 30
        timer.join()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=12))
def test_steps_may_be_asked_for_in_any_order(steps: list[int]) -> None:
    with tempfile.TemporaryDirectory() as root:
        source = write_lines(Path(root) / "corpus", 6)
        dataset = TokenDataset(prepared(source, Path(root) / "out", validation_fraction=0), "train", 30)
        order = Order(len(dataset), seed=7)
        with loader(dataset, order, document_mask=False) as batches:
            for step in steps:
                tokens = [row[0] for row in rows_of(batches.step(12 * step))]
                expected = [dataset.window(i)[0][:-1].tolist() for i in order.samples(12 * step, 12).tolist()]
                assert list(map(list, tokens)) == expected


def test_an_error_of_the_reading_thread_comes_with_the_step_that_needs_it_and_stays(folder: Path) -> None:
    dataset = CountingDataset(folder, "train", LENGTH)
    dataset.broken_at = 12 + 5
    batches = loader(dataset, Order(len(dataset), seed=8))
    assert len(batches.step(0).micro_batches) == 12
    for position in (12, 24):
        with pytest.raises(PreparedError, match=r"shard 7 is gone"):
            batches.step(position)
    batches.close()


def test_an_error_ahead_that_no_step_has_raised_is_raised_by_close(folder: Path) -> None:
    dataset = CountingDataset(folder, "train", LENGTH)
    dataset.broken_at = 12 + 5
    batches = loader(dataset, Order(len(dataset), seed=8))
    batches.step(0)
    wait_until(lambda: len(dataset.taken) == 17)
    with pytest.raises(PreparedError, match=r"shard 7 is gone"):
        batches.close()
    batches.close()


def test_a_closed_loader_gives_no_step_and_leaves_no_thread(dataset: TokenDataset) -> None:
    before = threading.active_count()
    batches = loader(dataset, Order(len(dataset), seed=9))
    batches.step(0)
    batches.close()
    batches.close()
    assert threading.active_count() == before
    with pytest.raises(DataError, match=r"the loader is closed"):
        batches.step(12)


def test_closing_wakes_a_step_that_waits(folder: Path) -> None:
    dataset = CountingDataset(folder, "train", LENGTH)
    dataset.gate.clear()
    batches = loader(dataset, Order(len(dataset), seed=9))
    raised: list[BaseException] = []

    def take() -> None:
        try:
            batches.step(0)
        except DataError as error:
            raised.append(error)

    taker = threading.Thread(target=take)
    taker.start()
    closer = threading.Thread(target=batches.close)
    closer.start()
    taker.join(30)
    assert [str(error) for error in raised] == ["data: the loader is closed"]
    dataset.gate.set()
    closer.join(30)
    assert not closer.is_alive()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"micro_sequences": 5}, r"batch.global_sequences: 12; a positive multiple of micro_sequences \(5\)"),
        ({"data_ranks": 5}, r"x data ranks \(5\) is wanted"),
        ({"global_sequences": 0}, "batch.global_sequences: 0"),
        ({"data_ranks": 2, "data_rank": 2}, "data_rank: 2; 0 to 1"),
        ({"prefetch": 0}, "prefetch: 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(dataset: TokenDataset, settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loader(dataset, Order(len(dataset), seed=0), **settings)


def test_an_order_of_another_dataset_is_refused(dataset: TokenDataset) -> None:
    with pytest.raises(ValueError, match=rf"order: of 5 samples, but the dataset has {len(dataset)} windows"):
        loader(dataset, Order(5, seed=0))


def test_too_few_windows_for_one_step_names_the_numbers_and_the_remedy(dataset: TokenDataset) -> None:
    size = len(dataset) + 1
    with pytest.raises(TooFewTokensError, match=rf"{len(dataset)} windows of 24 tokens, one step takes {size}"):
        loader(dataset, Order(len(dataset), seed=0), global_sequences=size)


def test_a_saved_position_is_resumed_only_on_the_same_data(tmp_path: Path, folder: Path, dataset: TokenDataset) -> None:
    order = Order(len(dataset), seed=1)
    state = DataPosition.of(dataset, order, 480).state_dict()
    assert state["position"] == 480
    assert DataPosition.resume(state, dataset, order) == DataPosition.of(dataset, order, 480)
    changes: list[tuple[TokenDataset, int, str]] = [
        (TokenDataset(folder, "train", LENGTH + 1), 1, "data.sequence_length was 24, is 25"),
        (TokenDataset(folder, "validation", LENGTH), 1, "the split was train, is validation"),
        (dataset, 2, "seed was 1, is 2"),
        (
            TokenDataset(prepared(write_lines(tmp_path / "c", 9), tmp_path / "o"), "train", LENGTH),
            1,
            "the tokens",
        ),
    ]
    for other, seed, message in changes:
        with pytest.raises(ResumeError, match=rf"not the data of the checkpoint: .*{message}"):
            DataPosition.resume(state, other, Order(len(other), seed))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("sequences", "micro"), [(1, 1), (10, 4), (64, 8)])
def test_held_out_sequences_are_dealt_without_remainder(folder: Path, ranks: int, sequences: int, micro: int) -> None:
    dataset = TokenDataset(folder, "validation", LENGTH)
    seen: Counter[tuple[int, ...]] = Counter()
    total, lengths, shapes = 0, set(), set()
    for rank in range(ranks):
        held_out = ValidationSet(
            dataset,
            sequences=sequences,
            micro_sequences=micro,
            data_rank=rank,
            data_ranks=ranks,
            document_mask=True,
        )
        batches = list(held_out)
        assert list(map(as_lists, batches)) == list(map(as_lists, held_out)), "the same every time"
        assert held_out.num_sequences == min(sequences, len(dataset))
        lengths |= {len(held_out), len(batches)}
        shapes |= {tuple(batch.tokens.shape) for batch in batches}
        total += sum(batch.num_targets for batch in batches)
        for batch in batches:
            assert batch.num_targets == (batch.targets != IGNORE).sum()
            real = (batch.targets != IGNORE).any(dim=1)
            seen.update(tuple(row) for row in batch.tokens[real].tolist())
    assert len(lengths) == len(shapes) == 1
    assert shapes == {(micro, LENGTH)}
    count = min(sequences, len(dataset))
    chosen = [dataset.window(index * len(dataset) // count) for index in range(count)]
    assert seen == Counter(tuple(tokens[:-1].tolist()) for tokens, _ in chosen)
    assert total == sum(int((np.diff(numbers) == 0).sum()) for _, numbers in chosen)


@pytest.mark.parametrize("wrong", [{"sequences": 0}, {"micro_sequences": 0}, {"data_rank": 2}])
def test_held_out_sequences_of_wrong_sizes_are_refused(folder: Path, wrong: dict[str, int]) -> None:
    sizes = {"sequences": 4, "micro_sequences": 2, "data_rank": 0, "data_ranks": 2} | wrong
    with pytest.raises(ValueError, match=r"evaluation.sequences"):
        ValidationSet(TokenDataset(folder, "validation", LENGTH), document_mask=True, **sizes)
