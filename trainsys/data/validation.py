"""Held-out sequences: the same every time, and the same number of forwards on every data rank."""

from __future__ import annotations

from collections.abc import Iterator

from trainsys.data.batch import MicroBatch, micro_batch
from trainsys.data.dataset import TokenDataset


class ValidationSet:
    """The micro-batches of one data rank over a fixed choice of windows, spread evenly over the split.

    Every rank yields `len(self)` micro-batches of `micro_sequences` rows. Where sequences do not fill them,
    rows without targets do: a rank's last micro-batches may have num_targets = 0. Sum losses and targets over
    the ranks.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        sequences: int,
        micro_sequences: int,
        data_rank: int,
        data_ranks: int,
        document_mask: bool,
    ) -> None:
        """Raises:
        ValueError: a count below 1, or a rank outside the ranks.
        """
        if min(sequences, micro_sequences, data_ranks) < 1 or not 0 <= data_rank < data_ranks:
            raise ValueError(
                f"evaluation.sequences: {sequences}, micro_sequences {micro_sequences}, "
                f"data rank {data_rank} of {data_ranks}: counts are at least 1, ranks below their number"
            )
        self.num_sequences = min(sequences, len(dataset))
        """Sequences of all ranks together; fewer than asked for where the split has no more."""
        self._dataset = dataset
        self._micro_sequences = micro_sequences
        self._document_mask = document_mask
        chosen = [index * len(dataset) // self.num_sequences for index in range(self.num_sequences)]
        self._own = chosen[data_rank::data_ranks]
        per_rank = -(-self.num_sequences // data_ranks)
        self._num_batches = -(-per_rank // micro_sequences)

    def __len__(self) -> int:
        """Micro-batches, the same number on every rank."""
        return self._num_batches

    def __iter__(self) -> Iterator[MicroBatch]:
        """Reads and yields them, in the same order every time."""
        size = self._micro_sequences
        for start in range(0, self._num_batches * size, size):
            own = self._own[start : start + size]
            windows = [self._dataset.window(index) for index in own]
            if not windows:
                windows = [self._dataset.window(0)]
            padded = windows + [windows[0]] * (size - len(windows))
            yield micro_batch(padded, document_mask=self._document_mask, num_real=len(own))
