"""What the detector says of traces of real jobs, and that neither clocks nor the names of ranks matter to it."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faulttol.bench.labels.traces import Trace
from faulttol.bench.labels.trial import DETECTOR, HEALTH
from faulttol.detector import Memory, observe
from faulttol.finding import Finding, FindingKind
from faulttol.view import JobView
from tests.test_faulttol import traces
from tests.test_faulttol.scenes import proven, relabelled, with_clocks

EVERY_NS = 300_000_000
KINDS = {
    "extra": FindingKind.DESYNC,
    "hang": FindingKind.HANG,
    "skip": FindingKind.DESYNC,
    "slow": FindingKind.STRAGGLER,
}


@functools.cache
def trace(name: str) -> Trace:
    return traces.load(name)


@functools.cache
def views(name: str) -> list[JobView]:
    return list(trace(name).views(EVERY_NS))


def watched(looks: list[JobView]) -> list[list[Finding]]:
    """What is said of each view, faults only."""
    memory, said = Memory(), []
    for view in looks:
        memory, findings = observe(memory, view, DETECTOR, HEALTH)
        said.append([finding for finding in proven(findings) if finding.kind.is_fault])
    return said


def test_there_are_traces_of_all_kinds_of_jobs() -> None:
    assert {name.partition("-")[0] for name in traces.names()} == {"ddp", "fsdp", "pipeline"}


@pytest.mark.parametrize("name", [name for name in traces.names() if trace(name).culprit])
def test_a_fault_is_told_after_it_struck_with_its_rank(name: str) -> None:
    said = watched(views(name))
    found = [(view, finding) for view, findings in zip(views(name), said, strict=True) for finding in findings]
    view, first = found[0]
    assert first.kind is KINDS[name.partition("-")[2]]
    assert str(first.suspects[0]) == trace(name).culprit
    assert max(record.now_ns for record in view.records.values()) >= trace(name).struck_ns


@pytest.mark.parametrize("name", [name for name in traces.names() if not trace(name).culprit])
def test_a_benign_run_has_no_fault(name: str) -> None:
    assert not any(watched(views(name)))


@settings(max_examples=3)
@given(
    st.permutations(range(4)),
    st.lists(st.integers(0, 10**15), min_size=4, max_size=4),
    st.sampled_from([name for name in traces.names() if trace(name).culprit]),
)
def test_clocks_and_names_of_ranks_do_not_matter(names: list[int], offsets_ns: list[int], name: str) -> None:
    """Each rank's clock is its own, and ranks are called otherwise: the same findings, of the ranks' new names."""
    looks = views(name)[-8:]
    other = [with_clocks(relabelled(view, dict(enumerate(names))), dict(enumerate(offsets_ns))) for view in looks]
    for plain, changed in zip(watched(looks), watched(other), strict=True):
        assert [finding.kind for finding in changed] == [finding.kind for finding in plain]
        for one, two in zip(plain, changed, strict=True):
            assert {names[rank] for rank in one.culprits} == set(two.culprits)


def test_a_second_look_confirms_a_stop() -> None:
    """The last view alone is no finding; with the one before it is."""
    _, alone = observe(Memory(), views("ddp-hang")[-1], DETECTOR, HEALTH)
    assert not alone
    assert watched(views("ddp-hang"))[-1]
