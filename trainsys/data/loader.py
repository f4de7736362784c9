"""Batches of a rank, prepared ahead in a thread; the position is the whole state."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from trainsys.data.batch import StepBatch, micro_batch
from trainsys.data.dataset import TokenDataset
from trainsys.data.errors import DataError, ResumeError, TooFewTokensError
from trainsys.data.order import Order

_TIMEOUT_S = 600.0


class BatchLoader:
    """The micro-batches of one data rank, step by step.

    The step at global sample position p takes the samples at p, ..., p + global_sequences - 1 of the order,
    of which rank r the r-th equal part: which samples a step sees depends on seed, position and
    global_sequences alone, not on the number of ranks or the size of micro-batches. Up to `prefetch` steps
    are made ahead in one thread.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        order: Order,
        *,
        global_sequences: int,
        micro_sequences: int,
        data_rank: int,
        data_ranks: int,
        document_mask: bool,
        prefetch: int = 2,
    ) -> None:
        """Raises:
        ValueError: sizes that do not divide or do not fit each other.
        TooFewTokensError: fewer windows than one step takes.
        """
        _check(dataset, order, global_sequences, micro_sequences, data_rank, data_ranks)
        if prefetch < 1:
            raise ValueError(f"prefetch: {prefetch}; at least 1 step")
        self.wait_s = 0.0
        """Seconds the last `step` waited for data."""
        self._dataset = dataset
        self._order = order
        self._global_sequences = global_sequences
        self._micro_sequences = micro_sequences
        self._per_rank = global_sequences // data_ranks
        self._offset = data_rank * self._per_rank
        self._document_mask = document_mask
        self._prefetch = prefetch
        self._changed = threading.Condition()
        self._ready: deque[StepBatch] = deque()
        self._next_position: int | None = None
        self._error: BaseException | None = None
        self._delivered = False
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="trainsys-data", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def step(self, position: int) -> StepBatch:
        """This rank's part of the step at global sample position `position`. Blocks until it is made.

        Asking for steps in order takes what was made ahead; any other position starts anew from there, at no
        cost that grows with it.

        Raises:
            DataError: the data could not be read, now or ahead.
        """
        began_s = time.monotonic()
        with self._changed:
            made = bool(self._ready) and self._ready[0].position == position
            coming = not self._ready and self._next_position == position
            if not made and not coming:
                self._ready.clear()
                self._next_position = position
                self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._ready or self._error or self._closed, _TIMEOUT_S):
                raise DataError(f"data: no batch for position {position} from the reading thread in {_TIMEOUT_S:.0f} s")
            if self._closed:
                raise DataError("data: the loader is closed")
            if not self._ready:
                assert self._error is not None
                self._delivered = True
                raise self._error
            batch = self._ready.popleft()
            self._changed.notify_all()
        self.wait_s = time.monotonic() - began_s
        return batch

    def close(self) -> None:
        """Ends the thread. Idempotent. Raises what the thread failed with, where no `step` has raised it."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(_TIMEOUT_S)
        if self._error is not None and not self._delivered:
            self._delivered = True
            raise self._error

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._has_work())
                if self._closed:
                    return
                position = self._next_position
            assert position is not None
            try:
                batch = self._make(position)
            except BaseException as error:  # noqa: BLE001 (carried to the next step or close)
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                if self._next_position == position:
                    self._ready.append(batch)
                    self._next_position = position + self._global_sequences
                    self._changed.notify_all()

    def _has_work(self) -> bool:
        return self._next_position is not None and len(self._ready) < self._prefetch

    def _make(self, position: int) -> StepBatch:
        samples = self._order.samples(position + self._offset, self._per_rank).tolist()
        windows = [self._dataset.window(sample) for sample in samples]
        size = self._micro_sequences
        batches = [
            micro_batch(windows[start : start + size], document_mask=self._document_mask)
            for start in range(0, len(windows), size)
        ]
        return StepBatch(position, batches, sum(batch.num_targets for batch in batches))


@dataclass(frozen=True, slots=True)
class DataPosition:
    """Where in the data a run stands: all there is to save, and to check before going on."""

    position: int
    """Global sample position of the next step."""
    fingerprint: str
    """`TokenDataset.fingerprint`, with the seed of the order."""

    @classmethod
    def of(cls, dataset: TokenDataset, order: Order, position: int) -> Self:
        """The position `position` in `dataset` as `order` deals it."""
        return cls(position, f"{dataset.fingerprint}:{order.seed}")

    def state_dict(self) -> dict[str, int | str]:
        """Plain values for a checkpoint."""
        return {"position": self.position, "fingerprint": self.fingerprint}

    @classmethod
    def resume(cls, state: Mapping[str, int | str], dataset: TokenDataset, order: Order) -> Self:
        """The position saved in `state`.

        Raises:
            ResumeError: the tokens, the window length or the seed are not those it was saved with.
        """
        saved, now = cls(int(state["position"]), str(state["fingerprint"])), cls.of(dataset, order, 0)
        names = ("the tokens (data.path, data.tokenizer)", "the split", "data.sequence_length", "seed")
        parts = zip(names, saved.fingerprint.split(":"), now.fingerprint.split(":"), strict=True)
        changed = [f"{name} was {old}, is {new}" for name, old, new in parts if old != new]
        if changed:
            raise ResumeError(f"data: not the data of the checkpoint: {'; '.join(changed)}")
        return saved


def _check(
    dataset: TokenDataset,
    order: Order,
    global_sequences: int,
    micro_sequences: int,
    data_rank: int,
    data_ranks: int,
) -> None:
    wrong = []
    if (
        global_sequences < 1
        or micro_sequences < 1
        or data_ranks < 1
        or global_sequences % (micro_sequences * data_ranks)
    ):
        wrong.append(
            f"batch.global_sequences: {global_sequences}; a positive multiple of micro_sequences "
            f"({micro_sequences}) x data ranks ({data_ranks}) is wanted"
        )
    if not 0 <= data_rank < max(data_ranks, 1):
        wrong.append(f"data_rank: {data_rank}; 0 to {data_ranks - 1}")
    if order.num_samples != len(dataset):
        wrong.append(f"order: of {order.num_samples} samples, but the dataset has {len(dataset)} windows")
    if wrong:
        raise ValueError("; ".join(wrong))
    if len(dataset) < global_sequences:
        raise TooFewTokensError(
            f"{dataset.info.source}: {len(dataset)} windows of {dataset.sequence_length} tokens, "
            f"one step takes {global_sequences}: "
            "more text, or smaller batch.global_sequences or data.sequence_length"
        )
