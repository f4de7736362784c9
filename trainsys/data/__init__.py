"""Text to token windows: prepare once, map into memory, deal in a seeded order, resume anywhere.

ensure_prepared(config, cache_dir) -> folder        text -> token shards, found again by key
TokenDataset(folder, "train", T)                    shards -> windows of T + 1 tokens
Order(len(dataset), seed)                           position -> sample
BatchLoader(dataset, order, ...).step(position)     -> micro-batches of this rank
ValidationSet(...)                                  -> the same held-out micro-batches every time
"""

from trainsys.data.batch import IGNORE, MicroBatch, StepBatch
from trainsys.data.dataset import TokenDataset
from trainsys.data.errors import DataError, ResumeError, TokenizerError
from trainsys.data.loader import BatchLoader, DataPosition
from trainsys.data.order import Order
from trainsys.data.pipeline import PrepareProgress
from trainsys.data.preparation import ensure_prepared, prepare
from trainsys.data.prepared import PreparedInfo, SplitInfo, read_prepared, verify
from trainsys.data.tokenizer import Tokenizer, load_tokenizer
from trainsys.data.validation import ValidationSet

__all__ = [
    "IGNORE",
    "BatchLoader",
    "DataError",
    "DataPosition",
    "MicroBatch",
    "Order",
    "PrepareProgress",
    "PreparedInfo",
    "ResumeError",
    "SplitInfo",
    "StepBatch",
    "TokenDataset",
    "Tokenizer",
    "TokenizerError",
    "ValidationSet",
    "ensure_prepared",
    "load_tokenizer",
    "prepare",
    "read_prepared",
    "verify",
]
