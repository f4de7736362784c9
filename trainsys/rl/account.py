"""What came of others' rollouts on a node, in a line for people. Pure: the record of a round in, text out."""

from __future__ import annotations

from collections.abc import Mapping

_REJECTED = "sharing/rejected."


def account(record: Mapping[str, float], *, resumed_after: int = 0) -> str:
    """Return how many groups of others were trained on, by a node's `sharing/` figures, or why none was.

    The figures are of one launch; `resumed_after` is the step that it went on from.
    """
    told = {key.removeprefix("sharing/"): int(value) for key, value in record.items() if key.startswith("sharing/")}
    since = f" since it resumed after step {resumed_after}" if resumed_after else ""
    if told["taken"]:
        return f"trained on {told['taken']} groups of others{since}"
    return f"trained on no group of others{since}: {_why(told, _counts(record, _REJECTED))}"


def _why(told: Mapping[str, int], rejected: str) -> str:
    same = "another node has the same name, and neither hears the other (rl.sharing.node)" if told["namesakes"] else ""
    return "; ".join(filter(None, (_why_of_others(told, rejected, is_alone=not same), same)))


def _why_of_others(told: Mapping[str, int], rejected: str, *, is_alone: bool) -> str:
    """Return what came of nodes of other names; nothing where there are none and that does not leave it alone."""
    if told["accepted"]:
        return (
            f"of {told['accepted']} that were believed {told['without_signal']} had equal rewards, {told['too_old']} "
            f"waited too long (rl.sharing.max_age_rounds), {told['unfit']} did not fit this policy "
            f"(rl.generation.max_new_tokens, data.sequence_length), {told['waiting']} wait"
        )
    if not told["peers"]:
        failed = f"; {told['store_failures']} calls of the store failed, see the log" if told["store_failures"] else ""
        nobody = f"nobody else has anything in the store now (rl.sharing.store, rl.sharing.keep_s){failed}"
        return nobody if is_alone else ""
    if rejected:
        return f"{told['peers']} others share, and nothing of it was believed: {rejected}"
    return f"{told['peers']} others share, and nothing was read yet; {told['store_failures']} calls of the store failed"


def _counts(record: Mapping[str, float], prefix: str) -> str:
    found = {key.removeprefix(prefix): value for key, value in record.items() if key.startswith(prefix)}
    return ", ".join(f"{name} {count:g}" for name, count in sorted(found.items()))
