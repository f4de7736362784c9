"""Products with shared matrices whose collectives are pushed by copy engines, a few sequences at a time.

What `parallel.overlap` says, where ranks write into each other's memory (`parallel.symmetric`). A part of the tokens
goes out in pieces; a rank multiplies its own part first and then every piece as it comes. Terms of sums go out so too,
as soon as a product has given them, and what a rank adds up itself is computed last. So a product hides a transfer that
takes as long as itself; of one that takes longer only the rest shows.

Sums are those of a reduce-scatter: each term rounded once, two ranks' added in one rounding, more in the order of ranks
in fp32.
"""

# Shapes: B batch, T tokens, t this rank's part of the tokens, I features in, O features out (this rank's).

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from parallel.products import outer, product_into
from parallel.symmetric import Buffers, copy_into

_MOST_PIECES = 4
_PIECE_BYTES = 2**24
"""Of a piece, at least: 40 us between two H200s, eight times what one costs beside its bytes."""
_HIDING_FEATURES = 4096
"""Of a product that takes at least as long as to send its tokens, whatever their number: what it multiplies each with,
where they come, or sums over, where they go. Then nothing is gained by pieces."""


def column(x_BtI: Tensor, matrix_IO: Tensor, buffers: Buffers) -> Tensor:
    """Return the product [B, T, O] of all ranks' tokens."""
    gathering = _Gathering(x_BtI, buffers, hidden_by=matrix_IO.shape[1])
    product = gathering.product(matrix_IO)
    gathering.close()
    return product


def column_backward(grad_BTO: Tensor, x_BtI: Tensor, weight_OI: Tensor, buffers: Buffers) -> tuple[Tensor, Tensor]:
    """Return the gradients of this rank's tokens [B, t, I], summed over ranks, and of its matrix."""
    gathering = _Gathering(x_BtI, buffers, hidden_by=_HIDING_FEATURES, whole=True)
    finish = _begin_scatter(grad_BTO, weight_OI, buffers, hidden_by=_HIDING_FEATURES)  # the matrix's gradient does
    grad_weight = outer(grad_BTO, gathering.gathered())
    gathering.close()
    return finish(), grad_weight


def row(x_BTI: Tensor, matrix_IO: Tensor, buffers: Buffers) -> Tensor:
    """Return this rank's part [B, t, O] of the sum over ranks of their products."""
    return _begin_scatter(x_BTI, matrix_IO, buffers, hidden_by=matrix_IO.shape[0])()


def row_backward(grad_BtO: Tensor, x_BTI: Tensor, weight_OI: Tensor, buffers: Buffers) -> tuple[Tensor, Tensor]:
    """Return the gradients of this rank's features [B, T, I] and of its matrix; `grad` is of its part of the tokens."""
    gathering = _Gathering(grad_BtO, buffers, hidden_by=weight_OI.shape[1], whole=True)
    grad_x = gathering.product(weight_OI)
    grad_weight = outer(gathering.gathered(), x_BTI)
    gathering.close()
    return grad_x, grad_weight


def gather(x_BtI: Tensor, buffers: Buffers) -> Tensor:
    """Return the tokens of all ranks [B, T, I]."""
    gathering = _Gathering(x_BtI, buffers, hidden_by=1)
    whole = gathering.copied()
    gathering.close()
    return whole


def scatter(x_BTI: Tensor, buffers: Buffers) -> Tensor:
    """Return this rank's part [B, t, I] of the sum over ranks."""
    x_BTI = x_BTI.contiguous()
    batch, share, features = x_BTI.shape[0], x_BTI.shape[1] // buffers.size, x_BTI.shape[2]
    parts = torch.split(x_BTI, share, 1)
    total = _Sum(buffers, (batch, share, features), x_BTI, hidden_by=1)
    for piece in total.pieces:
        total.send(piece, {peer: parts[peer][piece] for peer in buffers.others})
    return total.finish(parts[buffers.rank])


def pieces(batch: int, num_tokens: int, num_bytes: int, hidden_by: int) -> list[tuple[slice, slice]]:
    """Return how parts [batch, num_tokens, ...] of so many bytes go out: sequences and tokens of each piece."""
    count = max(1, min(_MOST_PIECES, num_bytes // _PIECE_BYTES, -(-_HIDING_FEATURES // hidden_by)))
    length = batch if batch >= count else num_tokens
    cuts = [length * number // count for number in range(count + 1)]
    spans = [slice(first, last) for first, last in itertools.pairwise(cuts)]
    everything = slice(None)
    return [(span, everything) for span in spans] if batch >= count else [(everything, span) for span in spans]


class _Gathering:
    """The tokens of all ranks, on their way to each; with `whole` they come to lie side by side."""

    def __init__(self, x_BtI: Tensor, buffers: Buffers, *, hidden_by: int, whole: bool = False) -> None:
        self._x = x_BtI.contiguous()
        self._size, self._rank, self._whole = buffers.size, buffers.rank, whole
        self._pieces = pieces(self._x.shape[0], self._x.shape[1], self._x.nbytes, hidden_by)
        self._transfer = buffers.open(self._x.nbytes * buffers.size, len(self._pieces))
        for piece in self._pieces:
            copies = {}
            for peer in range(buffers.size):
                if peer != buffers.rank:
                    place = self._parts(peer)[buffers.rank][piece]
                    copies[peer] = _contiguous(self._x[piece], place)
            self._transfer.send(copies, is_old=True)
        if whole:
            self._transfer.copy(self._x, self._parts()[buffers.rank])

    def _parts(self, owner: int | None = None) -> tuple[Tensor, ...]:
        """The parts of all ranks [B, t, I] in an owner's slot."""
        batch, share, features = self._x.shape
        if self._whole:
            slot = self._transfer.memory((batch, share * self._size, features), self._x.dtype, owner)
            return torch.split(slot, share, 1)
        return self._transfer.memory((self._size, batch, share, features), self._x.dtype, owner).unbind()

    def product(self, matrix_IO: Tensor) -> Tensor:
        """Return all tokens [B, T, I] times the matrix: first this rank's, then what comes."""
        batch, share, _ = self._x.shape
        product = self._x.new_empty(batch, share * self._size, matrix_IO.shape[1])
        out = torch.split(product, share, 1)
        product_into(self._x, matrix_IO, out[self._rank])
        parts = self._parts()
        for number, piece in enumerate(self._pieces, 1):
            for rank in self._others():
                self._transfer.arrived(rank, number)
                product_into(parts[rank][piece], matrix_IO, out[rank][piece])
        return product

    def copied(self) -> Tensor:
        """Return all tokens [B, T, I] in memory of their own."""
        batch, share, features = self._x.shape
        whole = self._x.new_empty(batch, share * self._size, features)
        out, parts = torch.split(whole, share, 1), self._parts()
        copy_into(out[self._rank], self._x)
        for number, piece in enumerate(self._pieces, 1):
            for rank in self._others():
                self._transfer.arrived(rank, number)
                copy_into(out[rank][piece], parts[rank][piece])
        return whole

    def gathered(self) -> Tensor:
        """Return all tokens [B, T, I]; they stay until `close`."""
        for rank in range(self._size):
            self._transfer.arrived(rank, len(self._pieces))
        batch, share, features = self._x.shape
        return self._transfer.memory((batch, share * self._size, features), self._x.dtype)

    def _others(self) -> Iterator[int]:
        """The other ranks, in the order in which their pieces come."""
        return ((self._rank - step) % self._size for step in range(1, self._size))

    def close(self) -> None:
        """All that reads the tokens is under way."""
        self._transfer.close()


def _begin_scatter(x_BTI: Tensor, matrix_IO: Tensor, buffers: Buffers, *, hidden_by: int) -> Callable[[], Tensor]:
    """Begin this rank's part [B, t, O] of the sum over ranks of x times the matrix; returns what finishes it."""
    shape = (x_BTI.shape[0], x_BTI.shape[1] // buffers.size, matrix_IO.shape[1])
    parts = torch.split(x_BTI, shape[1], 1)
    total = _Sum(buffers, shape, x_BTI, hidden_by=hidden_by)
    terms = {rank: x_BTI.new_empty(shape) for rank in range(buffers.size)}
    for piece in total.pieces:
        for peer in buffers.others:
            product_into(parts[peer][piece], matrix_IO, terms[peer][piece])
        total.send(piece, {peer: terms[peer][piece] for peer in buffers.others})
    own = terms[buffers.rank]
    product_into(parts[buffers.rank], matrix_IO, own)
    return lambda: total.finish(own)


class _Sum:
    """A sum over ranks, of which each gets its part [B, t, ...]: the terms of the others, on their way."""

    def __init__(self, buffers: Buffers, shape: tuple[int, int, int], like: Tensor, *, hidden_by: int) -> None:
        self._buffers, self._shape, self._dtype = buffers, shape, like.dtype
        num_bytes = torch.Size(shape).numel() * like.itemsize
        self.pieces = pieces(shape[0], shape[1], num_bytes, hidden_by)
        self._transfer = buffers.open(buffers.size * num_bytes, len(self.pieces))

    def send(self, piece: tuple[slice, slice], terms: Mapping[int, Tensor]) -> None:
        """Send each other rank its term of one piece; pieces are sent in order."""
        places = {rank: self._terms(rank)[self._buffers.rank][piece] for rank in terms}
        self._transfer.send({rank: _contiguous(term, places[rank]) for rank, term in terms.items()})

    def finish(self, own: Tensor) -> Tensor:
        """Return the sum of this rank's own term and those that come."""
        out, terms = own.new_empty(self._shape), self._terms()
        for number, piece in enumerate(self.pieces, 1):
            for rank in self._buffers.others:
                self._transfer.arrived(rank, number)
            if self._buffers.size == 2:
                torch.add(own[piece], terms[1 - self._buffers.rank][piece], out=out[piece])
            else:
                terms[self._buffers.rank][piece].copy_(own[piece])
                torch.sum(terms[(slice(None), *piece)], 0, out=out[piece])
        self._transfer.close()
        return out

    def _terms(self, owner: int | None = None) -> Tensor:
        """By rank: the terms in an owner's slot."""
        return self._transfer.memory((self._buffers.size, *self._shape), self._dtype, owner)


def _contiguous(source: Tensor, place: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return two tensors [B, t, ...] as pairs of which each is contiguous: copies that take no kernel."""
    if source.is_contiguous() and place.is_contiguous():
        return [(source, place)]
    return list(zip(source.unbind(), place.unbind(), strict=True))
