"""What can go wrong between a path and a batch. Every message is one line: source, what is wrong, what to do.

DataError
├── SourceError            the text cannot be found or read
│   ├── NoSourceError          nothing lies at the path, or nothing of a known kind
│   ├── UnreadableSourceError  broken or truncated file, broken line, storage that refuses
│   ├── TextKeyError           the field or column that should hold the text is not there, or holds no text
│   └── SourceChangedError     the source changed while it was read
├── TokenizerError         no tokenizer there, one without an end-of-text token, or the extra `hf` is missing
├── TokenRangeError        a token id outside the vocabulary
├── PreparedError          a prepared folder is missing, corrupt, of another kind, or holds other data
├── BusyError              another process has prepared the same data for too long without progress
├── DiskFullError          no room for the tokens
├── TooFewTokensError      not one window, not one batch, or nothing to hold out
└── ResumeError            the data is not the data of the checkpoint
"""

from __future__ import annotations


class DataError(Exception):
    """Base of everything trainsys.data raises for what a user can cause."""


class SourceError(DataError):
    """The text cannot be found or read."""


class NoSourceError(SourceError):
    """Nothing lies at the path, or nothing of a known kind."""


class UnreadableSourceError(SourceError):
    """A file is broken or truncated, a line is not JSON, or the storage refuses."""


class TextKeyError(SourceError):
    """The field or column that should hold the text is not there, or does not hold text."""


class SourceChangedError(SourceError):
    """The source changed while it was read."""


class TokenizerError(DataError):
    """No tokenizer there, one that names no end-of-text token, or the extra `hf` is not installed."""


class TokenRangeError(DataError):
    """A token id lies outside the vocabulary."""


class PreparedError(DataError):
    """A prepared folder is missing, corrupt, of another kind, or holds other data."""


class BusyError(DataError):
    """Another process holds the same preparation and makes no progress."""


class DiskFullError(DataError):
    """The disk has no room for the tokens."""


class TooFewTokensError(DataError):
    """There are not enough tokens for one window, one batch, or a held-out split."""


class ResumeError(DataError):
    """The data is not the data the checkpoint was trained on."""
