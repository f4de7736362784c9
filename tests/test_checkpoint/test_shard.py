"""The plan of a shard: every byte once, aligned, in parcels that can be hashed and written alone."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.digest import DIGEST_BYTES
from checkpoint.format import ALIGN_BYTES, CHUNK_BYTES, chunk_count
from checkpoint.shard import Part, ShardPlan, plan_shard, whole_parts
from checkpoint.state import Piece, RankLocal, pieces_of

DTYPES = [torch.int64, torch.float32, torch.bfloat16, torch.uint8]
STATES = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.sampled_from([0, 1, 2, 3, 7, 1000, CHUNK_BYTES // 8 + 3]), st.integers(0, 3)),
    max_size=24,
)
FEW = settings(max_examples=40, deadline=None)


def planned(state: list[tuple[torch.dtype, int, int]]) -> tuple[list[Piece], ShardPlan]:
    """Return pieces of these dtypes, sizes and groups, and their plan."""
    pieces = pieces_of({f"t{i}": RankLocal(torch.empty(n, dtype=dtype)) for i, (dtype, n, _) in enumerate(state)})
    return pieces, plan_shard(pieces, whole_parts(pieces), [group for _, _, group in state], 3)


@FEW
@given(STATES)
def test_every_byte_of_every_piece_is_in_one_cut_and_no_digest_in_two(state: list[tuple[torch.dtype, int, int]]):
    pieces, plan = planned(state)
    ends = [0] * len(pieces)
    for parcel in plan.parcels:
        for cut in parcel.cuts:
            assert cut.source_start == ends[cut.source]
            assert cut.source_start % DIGEST_BYTES == 0
            ends[cut.source] += cut.nbytes
    assert ends == [piece.nbytes for piece in pieces]


def test_tensors_of_whole_cache_lines_start_on_one_whatever_else_there_is():
    pieces, plan = planned([(torch.float64, 3, 0), *((dtype, 1024, 0) for dtype in DTYPES), (torch.uint8, 7, 0)])
    starts = {rows[0].name: rows[0].byte_start for rows in plan.slices}
    assert all(starts[p.name] % 64 == 0 for p in pieces if p.nbytes % 64 == 0)


@FEW
@given(STATES)
def test_slots_are_full_but_for_a_digest_and_the_last_of_a_group(state: list[tuple[torch.dtype, int, int]]):
    _, plan = planned(state)
    for parcel, following in pairwise(plan.parcels):
        if parcel.group == following.group:
            assert parcel.nbytes > CHUNK_BYTES - DIGEST_BYTES


@FEW
@given(STATES)
def test_parcels_follow_each_other_in_the_file_and_hold_one_group_each(state: list[tuple[torch.dtype, int, int]]):
    _, plan = planned(state)
    end = len(plan.header)
    for parcel in plan.parcels:
        assert parcel.file_start == end
        assert 0 < parcel.nbytes <= CHUNK_BYTES
        position = 0
        for cut in parcel.cuts:
            assert cut.start == position
            assert state[cut.source][2] == parcel.group
            position += cut.nbytes
        assert position == parcel.nbytes
        end += parcel.nbytes
    assert end == plan.nbytes


@FEW
@given(STATES)
def test_every_tensor_is_aligned_to_its_own_element_size(state: list[tuple[torch.dtype, int, int]]):
    _, plan = planned(state)
    for (row,) in plan.slices:
        assert row.byte_start % row.itemsize == 0


@FEW
@given(STATES)
def test_groups_come_in_the_order_of_their_updates_but_for_a_few_odd_tensors(state: list[tuple[torch.dtype, int, int]]):
    _, plan = planned(state)
    groups = [state[int(row.name[1:])][2] for (row,) in plan.slices if row.nbytes]
    falls = sum(after < before for before, after in pairwise(groups))
    assert falls <= 7 * len(set(groups))


@FEW
@given(STATES)
def test_digests_are_dealt_to_the_rows_in_file_order(state: list[tuple[torch.dtype, int, int]]):
    _, plan = planned(state)
    count = sum(chunk_count(cut.nbytes) for parcel in plan.parcels for cut in parcel.cuts)
    rows = plan.rows(list(range(count)))
    assert [d for row in rows for d in row.digests] == list(range(count))
    assert all(len(row.digests) == chunk_count(row.nbytes) for row in rows)


def test_a_state_of_one_group_starts_on_a_page():
    _, plan = planned([(torch.float32, 5, 0), (torch.int64, 1, 0), (torch.uint8, 3, 0)])
    assert len(plan.header) % ALIGN_BYTES == 0


def test_parts_of_a_piece_are_rows_of_their_own():
    pieces = pieces_of({"t": RankLocal(torch.empty(3 * CHUNK_BYTES + 5, dtype=torch.uint8))})
    plan = plan_shard(pieces, [Part(0, 1, 1), Part(0, 3, 1)], [0], 0)
    assert [(row.region.start, row.region.stop) for (row,) in plan.slices] == [
        (CHUNK_BYTES, 2 * CHUNK_BYTES),
        (3 * CHUNK_BYTES, 3 * CHUNK_BYTES + 5),
    ]
    assert plan.nbytes - len(plan.header) == CHUNK_BYTES + 5


def test_larger_parcels_hold_the_same_bytes_in_fewer_pieces_small_tensors_last():
    sizes = [CHUNK_BYTES, 5, 2 * CHUNK_BYTES + 3, 7, CHUNK_BYTES]
    pieces = pieces_of({f"t{i}": RankLocal(torch.empty(n, dtype=torch.uint8)) for i, n in enumerate(sizes)})
    plans = [plan_shard(pieces, whole_parts(pieces), [0] * len(pieces), 0, n * CHUNK_BYTES) for n in (1, 4)]
    assert [len(plan.parcels) for plan in plans] == [5, 2]
    for plan in plans:
        assert sum(parcel.nbytes for parcel in plan.parcels) == sum(sizes)
        assert max(parcel.nbytes for parcel in plan.parcels) <= plan.parcel_bytes
        assert [cut.source for cut in plan.parcels[-1].cuts[-2:]] == [1, 3]
    assert plans[0].header == plans[1].header
