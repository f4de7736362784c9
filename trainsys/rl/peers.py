"""The other nodes of a swarm, as the training loop of one sees them (`trainsys.rl.run.Peers`)."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from trainsys import metrics
from trainsys.data import Tokenizer, load_tokenizer
from trainsys.errors import ConfigError
from trainsys.rl import questions, signing, stores
from trainsys.rl.errors import PolicyError
from trainsys.rl.rollout import Completion, Group
from trainsys.rl.schema import DIGEST_BYTES
from trainsys.rl.selection import Candidate, Quota
from trainsys.rl.sharing import Exchange, Identity, Pace
from trainsys.rl.validation import Rules, Tokens, Validator

if TYPE_CHECKING:
    from trainsys.config import RunConfig
    from trainsys.folder import RunFolder
    from trainsys.rl.learner import Learner
    from trainsys.rl.policy import Row
    from trainsys.rl.run import JoinPeers


def joining(config: RunConfig) -> JoinPeers:
    """Return what connects a node to the store of `config.rl.sharing`.

    Raises:
        ConfigError: the recipe does not say which store, or what this node is called.
    """
    sharing = config.rl.sharing
    missing = {
        "store": "give the URL of the swarm to join; `trainsys launch` starts one",
        "node": "give this node a name of its own",
    }
    problems = [f"rl.sharing.{key}: missing; {what}" for key, what in missing.items() if not getattr(sharing, key)]
    if problems:
        raise ConfigError(problems)

    def join(learner: Learner, folder: RunFolder) -> SharedPeers:
        signer = signing.open_signer(folder.path / "node.key") if sharing.sign else None
        node = signer.node if signer else sharing.node
        tokens = _tokens(load_tokenizer(config.data.tokenizer))
        specs = map(questions.parse_spec, config.rl.tasks)
        rules = Rules(
            strikes=sharing.strikes,
            require_signatures=sharing.sign,
            peers=frozenset(sharing.peers),
            asked=frozenset((spec.name, spec.parameters) for spec in specs),
        )
        identity = Identity(
            node=node,
            model=config.name[:64],
            tokenizer=tokens.digest if sharing.tokens else b"",
            signer=signer,
        )
        pace = Pace(poll_interval_s=sharing.poll_interval_s, deadline_s=sharing.deadline_s)
        store = stores.open_store(sharing.store, keep_s=sharing.keep_s)
        return SharedPeers(config, learner.policy, Exchange(store, Validator(node, rules, tokens), identity, pace))

    return join


class Reader(Protocol):
    """A policy, for what it can read."""

    def rows(self, group: Group) -> Sequence[Row | None]:
        """Return a group in the policy's tokens, as `Policy.rows` does. Raises: PolicyError where it does not fit."""


class SharedPeers:
    """Nodes that are met in a store; the exchange begins with `restore` and ends with `close`."""

    def __init__(self, config: RunConfig, policy: Reader, exchange: Exchange) -> None:
        sharing = config.rl.sharing
        self._policy, self._exchange = policy, exchange
        self._seed = questions.seed_of(config.seed, *sharing.node.encode())
        self._quota = Quota(
            num_local=config.rl.questions - sharing.external,
            num_external=sharing.external,
            max_age_rounds=sharing.max_age_rounds,
            per_peer=sharing.per_peer,
            filter_local=config.rl.drop_uniform,
            filter_external=sharing.filter_uniform,
        )
        self._fill = sharing.fill
        self._num_unfit = 0
        """Places of the last round that stayed empty because what came did not fit."""
        self._record: metrics.Record = {}

    def num_own(self, round_index: int) -> int:
        """Return how many questions this node asks in a round: more where others' groups would not fill it.

        What does not fit is found out only when a round takes it; then the next reckons with as much of it.
        """
        if not self._fill:
            return self._quota.num_local
        missing = self._exchange.num_missing(self._quota, now_round=round_index)
        return self._quota.num_local + max(missing, self._num_unfit)

    def trade(self, round_index: int, own: Sequence[Group]) -> tuple[Sequence[Group], Sequence[Group]]:
        """Share all own groups; return those of them and of others that the round trains on. Waits for nothing."""
        self._exchange.share(own)
        generator = random.Random(f"{self._seed}/{round_index}")
        chosen = self._exchange.take(
            own, self._quota, now_round=round_index, generator=generator, fits=lambda group: _fits(self._policy, group)
        )
        self._num_unfit = min(chosen.unfit, self._quota.num_external - len(chosen.external))
        self._record = metrics.sharing_record(
            self._exchange.stats(),
            ages=[round_index - candidate.arrived_round for candidate in chosen.external],
            sources=_sources(chosen.external),
        )
        return chosen.local, [candidate.group for candidate in chosen.external]

    def state(self) -> Mapping[str, Any]:
        """Return this node's place in the store."""
        return self._exchange.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a place in the store, or begin with an empty one; the exchange runs from here on."""
        if state:
            self._exchange.load_state(state)
        self._exchange.start()

    def record(self) -> Mapping[str, float]:
        """Return the figures of the last round."""
        return self._record

    def close(self) -> None:
        """Publish what waits, within the deadline, and leave."""
        self._exchange.close()


def _fits(policy: Reader, group: Group) -> bool:
    """Return whether a policy can read a group's prompt, and one at least of its better completions.

    Where all rewards are equal none is better than another, and any will do.
    """
    try:
        rows = policy.rows(group)
    except PolicyError:
        return False
    least = group.mean_reward if group.has_signal else float("-inf")
    return any(row is not None and reward > least for row, reward in zip(rows, group.rewards, strict=True))


def _sources(candidates: Sequence[Candidate]) -> Mapping[str, int]:
    return Counter(candidate.group.node for candidate in candidates)


def _tokens(tokenizer: Tokenizer) -> Tokens:
    def spells(completion: Completion) -> bool:
        ids = completion.token_ids
        if any(token >= tokenizer.vocab_size for token in ids):
            return False
        if completion.finished != (ids[-1] == tokenizer.end_of_document):
            return False
        return tokenizer.decode(ids[:-1] if completion.finished else ids) == completion.text

    return Tokens(hashlib.blake2b(tokenizer.digest.encode(), digest_size=DIGEST_BYTES).digest(), spells)
