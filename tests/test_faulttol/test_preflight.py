"""Preflight finds a machine that cannot be trusted, and says why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from faulttol.preflight import Need, _peers, check_links, check_machine, summary
from tests.ranks import run_ranks


def test_a_sound_machine_passes_every_check_and_leaves_nothing(tmp_path: Path) -> None:
    need = Need(free_memory_bytes=1 << 20, free_disk_bytes=1 << 20)
    checks = check_machine(tmp_path, need=need)
    assert [check.name for check in checks] == ["products", "memory", "disk"]
    assert all(check.ok for check in checks), summary(checks)
    assert not list(tmp_path.iterdir())


def test_too_little_memory_or_disk_is_told_with_what_is_needed(tmp_path: Path) -> None:
    _, memory, disk = check_machine(tmp_path, need=Need(free_memory_bytes=1 << 60, free_disk_bytes=1 << 60))
    assert not memory.ok
    assert not disk.ok
    assert f"needed: {1 << 40} MiB" in memory.detail
    assert f"needed: {1 << 40} MiB" in disk.detail


def test_a_wrong_product_is_found_with_its_row_and_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One element of one product is off by one, as a flipped bit makes it."""
    right = torch.Tensor.__matmul__

    def wrong(left: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        product = right(left, other)
        if product.is_floating_point():
            product[5, 7] += 1
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)
    products = check_machine(tmp_path)[0]
    assert not products.ok
    assert "wrong in rows [5] and columns [7]" in products.detail


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
def test_every_pair_of_ranks_meets_once_in_disjoint_rounds(size: int) -> None:
    met = {rank: _peers(rank, size) for rank in range(size)}
    for rank, peers in met.items():
        assert sorted(peers) == [other for other in range(size) if other != rank]
    waiting = {rank: list(peers) for rank, peers in met.items()}
    while any(waiting.values()):  # each waits for its next: somebody always gets on
        pairs = [(a, b[0]) for a, b in waiting.items() if b and waiting[b[0]] and waiting[b[0]][0] == a]
        assert pairs, f"nobody gets on: {waiting}"
        for rank, _ in pairs:
            waiting[rank].pop(0)


def _checked(rank: int, world_size: int) -> tuple[bool, str]:
    check = check_links(need=Need(slowest_link=1e9))
    return check.ok, check.detail


def test_ranks_agree_on_their_links() -> None:
    results = run_ranks(_checked, 3)
    assert all(ok for ok, _ in results), results
    assert len({detail for _, detail in results}) == 1
