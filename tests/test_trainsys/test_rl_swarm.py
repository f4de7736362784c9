"""Nodes as they run: what one makes of the others, a swarm with a dead node, a node that joins late, the report."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import psutil
import pytest

import launch.ray_cluster
from tests.test_trainsys import runs
from tests.test_trainsys.rollouts import group
from tests.warm import Command
from trainsys import metrics, recipe
from trainsys.check import check
from trainsys.cli import EXIT_STOPPED
from trainsys.errors import ConfigError, RunError
from trainsys.folder import RunFolder
from trainsys.rl import peers, report, watching
from trainsys.rl.account import account
from trainsys.rl.config import SharingConfig
from trainsys.rl.errors import PolicyError
from trainsys.rl.peers import SharedPeers
from trainsys.rl.policy import Row
from trainsys.rl.rollout import Completion, Group
from trainsys.rl.sharing import Exchange, Identity, Pace
from trainsys.rl.stores import Mailbox
from trainsys.rl.swarm import NodeView, node_config, outcome_of, run_swarm
from trainsys.rl.validation import Rules, Validator

_TINY = (
    *("--steps=1000000", "--rl.warm_start.steps=2", "--rl.evaluation_questions=4", "--evaluation.every=0"),
    *("--model.num_layers=1", "--model.dim=16", "--model.num_heads=2", "--model.ffn_dim=16", "--checkpoint.every=10"),
    *("--rl.questions=4", "--rl.sharing.external=2", "--rl.group_size=4", "--batch.global_sequences=16"),
    *("--batch.micro_sequences=16", "--engine.backend=torch", "--engine.zero_stage=0", "--schedule.warmup_steps=1"),
    *('--rl.tasks=["largest:length=2", "sort:length=2"]', "--rl.sharing.filter_uniform=false"),
    *("--rl.sharing.poll_interval_s=0.02", "--rl.swarm.skills_per_node=1"),
    # A slow machine must not look like a fault.
    *("--launch.start_timeout_s=600", "--launch.frozen_timeout_s=600", "--launch.stop_grace_s=600"),
)
_PATIENCE_S = 600.0
"""For what takes seconds on an idle machine."""


class _Policy:
    """Takes every prompt but those of one task, and what is no longer than eight characters."""

    def __init__(self, refused: str = "") -> None:
        self._refused = refused

    def rows(self, group: Group) -> Sequence[Row | None]:
        if group.question.task == self._refused:
            raise PolicyError("too long")
        return [Row((1,), (2,)) if len(found.text) <= 8 else None for found in group.completions]


def _peers(box: Mailbox, node: str, *words: str, refused: str = "") -> SharedPeers:
    config = recipe.load(["rl_swarm"], ["--rl.sharing.store=unused", f"--rl.sharing.node={node}", *words]).config
    exchange = Exchange(box, Validator(node, Rules()), Identity(node=node, model=""), Pace())
    return SharedPeers(config, _Policy(refused), exchange)


@pytest.fixture
def box() -> Mailbox:
    return Mailbox(keep_s=60, budget_bytes=2**20)


def test_a_round_trains_on_own_groups_and_on_others_and_says_so(box: Mailbox) -> None:
    anna, bert = _peers(box, "anna"), _peers(box, "bert")
    assert anna.num_own(0) == 8, "nothing has come: all of the round is its own"
    bert.trade(1, [group(seed, node="bert") for seed in range(4)])
    bert._exchange.publish_waiting()
    anna._exchange.poll()
    assert anna.num_own(1) == 6, "of bert two at most"
    own = [group(100 + seed) for seed in range(6)]
    local, external = anna.trade(1, own)
    assert sorted(local, key=lambda g: g.question.seed) == own
    assert [found.node for found in external] == ["bert", "bert"]
    record = anna.record()
    assert record["sharing/from.bert"] == 2
    assert record["sharing/accepted"] == 4
    assert record["sharing/age_rounds"] == 1
    assert record["sharing/waiting"] == 2
    for exchange in (anna, bert):
        exchange.close()


def test_a_round_is_smaller_where_it_is_not_filled(box: Mailbox) -> None:
    assert _peers(box, "anna", "--rl.sharing.fill=false").num_own(0) == 4


def test_own_groups_that_teach_nothing_take_no_place_of_those_that_do(box: Mailbox) -> None:
    anna, bert = _peers(box, "anna", "--rl.resamples=1"), _peers(box, "bert")  # it asks 6, and 6 again
    bert.trade(1, [group(seed, node="bert") for seed in range(4)])
    bert._exchange.publish_waiting()
    anna._exchange.poll()
    uniform = [group(seed, right=right) for seed, right in enumerate((0, 4, 0, 4, 0, 4), start=6)]
    telling = [group(100 + seed) for seed in range(6)]
    local, external = anna.trade(1, [*uniform, *telling])
    assert sorted(local, key=lambda g: g.question.seed) == telling
    assert len(external) == 2
    anna._exchange.publish_waiting()
    bert._exchange.poll()
    assert bert._exchange.stats().accepted == 12, "all are shared"


def test_a_prompt_that_does_not_fit_the_policy_is_left_out(box: Mailbox) -> None:
    anna, bert = _peers(box, "anna", refused="sort"), _peers(box, "bert")
    bert.trade(1, [group(2, node="bert", task="sort"), group(2, node="bert")])
    bert._exchange.publish_waiting()
    anna._exchange.poll()
    _, external = anna.trade(1, [])
    assert [found.question.task for found in external] == ["reverse"]
    assert anna.record()["sharing/unfit"] == 1


def test_a_round_reckons_with_as_many_groups_that_do_not_fit_as_the_last_one_met(box: Mailbox) -> None:
    anna, bert = _peers(box, "anna", "--rl.sharing.per_peer=4", refused="sort"), _peers(box, "bert")
    asked = []
    for round_index, task in enumerate(("sort", "sort", "reverse", "reverse"), start=1):
        bert.trade(round_index, [group(8 * round_index + n, node="bert", task=task) for n in range(2, 6)])
        bert._exchange.publish_waiting()
        anna._exchange.poll()
        asked.append(anna.num_own(round_index))
        local, external = anna.trade(round_index, [group(1000 + 10 * round_index + n) for n in range(asked[-1])])
        assert len(local) + len(external) == (4 if round_index == 1 else 8)
    assert asked == [4, 8, 8, 4]


def test_a_group_fits_where_a_better_completion_can_be_read() -> None:
    def fits(texts: Sequence[str], rewards: tuple[float, ...]) -> bool:
        completions = tuple(Completion(text, 1, True) for text in texts)
        return peers._fits(_Policy(), replace(group(1), completions=completions, rewards=rewards))

    short, long = "12", "1234567890"
    assert fits([short, long], (1.0, 0.0)), "what is worse need not be read: others' worse completions teach nothing"
    assert not fits([long, short], (1.0, 0.0))
    assert fits([long, short, short], (1.0, 1.0, 0.0))
    assert fits([short, long], (0.0, 0.0)), "without signal, where that is not filtered, any will do"


def test_a_node_that_learns_from_nobody_says_why(box: Mailbox, tmp_path: Path) -> None:
    def says(found: SharedPeers) -> str:
        found._exchange.poll()
        found.trade(9, [])
        return account(found.record())

    anna, bert = _peers(box, "anna"), _peers(box, "bert")
    assert "nobody else has anything in the store" in says(anna)
    lie = replace(group(1, node="bert"), rewards=(0.0, 0.0, 1.0, 1.0))
    bert.trade(1, [lie])
    bert._exchange.publish_waiting()
    assert says(anna).endswith("1 others share, and nothing of it was believed: reward 1")
    bert.trade(2, [group(2, node="bert", right=0)])
    bert._exchange.publish_waiting()
    assert "of 1 that were believed 1 had equal rewards, 0 waited too long" in says(anna)
    quiet = anna.record()
    bert.trade(3, [group(3, node="bert")])
    bert._exchange.publish_waiting()
    assert says(anna) == "trained on 1 groups of others"

    _write_run(tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in record.items() if "/from." not in key} for record in records]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record | dict(quiet)) + "\n" for record in kept))
    assert "no group of others: of 1 that were believed" in report.summarise(tmp_path).splitlines()[-1]


def test_a_node_whose_name_another_has_says_so_and_a_resumed_one_since_when(
    box: Mailbox,
) -> None:
    anna, other = _peers(box, "anna"), _peers(box, "anna")

    def says() -> str:
        anna._exchange.poll()
        anna.trade(9, [])
        return account(anna.record())

    anna.trade(1, [group(1)])
    anna._exchange.publish_waiting()
    other.trade(1, [group(2), group(3)])
    other._exchange.publish_waiting()
    same = "another node has the same name, and neither hears the other (rl.sharing.node)"
    assert says() == f"trained on no group of others: {same}"
    bert = _peers(box, "bert")
    bert.trade(1, [replace(group(4, node="bert"), rewards=(0.0, 0.0, 1.0, 1.0))])
    bert._exchange.publish_waiting()
    assert says().endswith(f"1 others share, and nothing of it was believed: reward 1; {same}")
    record, since = anna.record(), "of others since it resumed after step 40"
    assert account(record, resumed_after=40).startswith(f"trained on no group {since}: ")
    assert account({**record, "sharing/taken": 3}, resumed_after=40) == f"trained on 3 groups {since}"


def test_the_same_seed_and_round_choose_the_same_groups(box: Mailbox) -> None:
    bert = _peers(box, "bert")
    bert.trade(1, [group(seed, node="bert") for seed in range(20)])
    bert._exchange.publish_waiting()
    chosen = []
    for _ in range(2):
        anna = _peers(box, "anna")
        anna._exchange.poll()
        chosen.append(anna.trade(7, [])[1])
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--rl.sharing.external=0", "rl.sharing.external"),
        ("--rl.sharing.external=8", "leaves none"),
        ("--rl.swarm.nodes=0", "rl.sharing.store: missing"),
        ("--rl.sharing.node=Eve", "is no name"),
        ("--launch.kind=local", "allowed: ray"),
        ("--rl.swarm.skills_per_node=9", "over the 4 tasks"),
        ("--rl.sharing.per_peer=0", "rl.sharing.per_peer: 0 is out of range"),
        ("--rl.sharing.deadline_s=0", "rl.sharing.deadline_s: 0"),
    ],
)
def test_a_setting_of_sharing_that_cannot_be_is_refused(override: str, message: str) -> None:
    resolved = recipe.load(["rl_swarm"], [override])
    with pytest.raises(ConfigError, match=message):
        check(resolved.config, sources=resolved.sources)


def test_a_variant_that_does_not_go_with_the_rest_is_refused_before_any_node_starts(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    variants = '--rl.swarm.variants=["model.dim=32", "rl.questions=6"]'
    resolved = recipe.load(["rl_swarm"], [variants, f"--run_dir={tmp_path}"])
    check(resolved.config)
    run.write_record(resolved)
    small = node_config(resolved.config, run, 0, "store")
    assert (small.model.dim, small.rl.sharing.node, small.rl.swarm.nodes) == (32, "node0", 0)
    with pytest.raises(ConfigError, match=r"node1: batch\.global_sequences: 64 is not .* \(6 x 8\)"):
        node_config(resolved.config, run, 1, "store")


def test_a_node_without_a_store_or_a_name_is_refused() -> None:
    config = recipe.load(["rl_swarm"]).config
    with pytest.raises(ConfigError, match=r"rl\.sharing\.store: missing") as caught:
        peers.joining(config)
    assert "rl.sharing.node: missing" in str(caught.value)
    assert config.rl.sharing == SharingConfig(external=4, per_peer=2, poll_interval_s=0.25)


class _Drill:
    """Kills a node once both have learnt from each other, lets a third one join, ends all when all three have again.

    It waits for what shall be shown, not for a time: nodes on a busy machine may begin many seconds after each other.
    The third joins when the killed one is back, whose start would else share two cores with two that are training.
    """

    def __init__(self, victim: str, start_eve: Callable[[str], Command]) -> None:
        self._victim, self._start_eve = victim, start_eve
        self._until_s = time.monotonic() + _PATIENCE_S
        self.url = ""
        self.killed_at: dict[str, float] = {}
        self.seen: list[list[NodeView]] = []
        self.eve: Command | None = None
        self.is_over = False

    def begin(self, url: str, views: list[NodeView]) -> None:
        self.url = url

    def update(self, views: list[NodeView]) -> None:
        self.seen.append(views)
        folders = {view.name: view.folder for view in views}
        if not self.killed_at:
            if all(_sources(folder) for folder in folders.values()):
                _kill_writer_of(folders[self._victim] / "metrics.jsonl")
                self.killed_at = {name: _rounds(folder)[-1]["step"] for name, folder in folders.items()}
        elif self.eve is None:
            since = self.killed_at[self._victim]
            if any(view.restarts and view.state == "running" and view.step > since for view in views):
                self.eve = self._start_eve(self.url)
        elif not self.is_over:
            eve = Path("eve").absolute()
            since = self.killed_at[self._victim]
            self.is_over = (
                _sources(folders[self._victim], since).total() > 0
                and _sources(folders["node0"])["eve"] > 0
                and {"node0", self._victim} <= _sources(eve).keys()
            )
        if self.is_over or time.monotonic() > self._until_s:
            os.kill(os.getpid(), signal.SIGTERM)


def _kill_writer_of(path: Path) -> None:
    """SIGKILL the process that has a file open."""
    killed = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and str(path) in [file.path for file in process.open_files()]:
                process.send_signal(signal.SIGKILL)
                process.wait(_PATIENCE_S)
                killed += 1
    assert killed == 1, "the fault was not injected"


def _rounds(folder: Path) -> list[dict[str, float]]:
    path = folder / "metrics.jsonl"
    return [record for record in metrics.read(path) if "rl/reward" in record] if path.exists() else []


def _sources(folder: Path, since: float = 0) -> Counter[str]:
    """Return how many groups a node took of each other one in its rounds after a step."""
    found: Counter[str] = Counter()
    prefix = "sharing/from."
    for record in _rounds(folder):
        if record["step"] > since:
            found.update({key.removeprefix(prefix): int(n) for key, n in record.items() if key.startswith(prefix)})
    return found


@pytest.fixture
def cluster() -> Iterator[str]:
    with launch.ray_cluster.joined(""):
        yield launch.ray_cluster.import_ray().get_runtime_context().gcs_address


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_node_delays_nobody_and_comes_back_another_joins_late_and_all_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: str
) -> None:
    monkeypatch.chdir(tmp_path)
    variants = '--rl.swarm.variants=["model.dim=16", "model.dim=32 model.num_layers=2"]'
    settings = (*_TINY, "--rl.swarm.nodes=2", variants, f"--run_dir={tmp_path / 'run'}")
    resolved = recipe.load(["rl_swarm"], settings)
    with contextlib.ExitStack() as joining:

        def start_eve(url: str) -> Command:
            own = (f"--rl.sharing.store={url}", "--rl.sharing.node=eve", "--run_dir=eve")  # and the recipe's engine
            words = [word for word in _TINY if not word.startswith("--engine.")]
            return joining.enter_context(runs.running("train", "rl_swarm", *words, *own, cwd=tmp_path))

        drill = _Drill("node1", start_eve)
        run, stopped = run_swarm(resolved, resume=False, watch=drill)
        assert drill.is_over, f"not all took from each other in time: {drill.seen[-1]}"
        assert drill.eve is not None
        drill.eve.send_signal(signal.SIGTERM)
        assert drill.eve.wait(_PATIENCE_S) == EXIT_STOPPED, (tmp_path / "background.log").read_text()
    assert outcome_of(stopped) == "stopped"
    assert [(view.state, view.restarts) for view in stopped] == [("stopped", 0), ("stopped", 1)]
    # The other went on while the killed one was away.
    again = next(seen for seen in drill.seen if seen[1].restarts and seen[1].state == "running")
    assert again[0].step > drill.killed_at["node0"]
    sizes = [json.loads((run.path / "nodes" / f"node{n}" / "config.json").read_text())["config"] for n in (0, 1)]
    assert [size["model"]["dim"] for size in sizes] == [16, 32]
    assert [size["rl"]["warm_start"]["tasks"] for size in sizes] == [["largest:length=2"], ["sort:length=2"]]
    assert "node1" in report.summarise(run.path)

    # All again, from the command line and with messages in an actor: each node has its place, and the end is told.
    words = ("rl_swarm", *settings, "--resume", f"--launch.ray_address={cluster}", "--rl.sharing.store=ray")
    with runs.running("launch", *words, cwd=tmp_path) as command:
        runs.wait_until(
            lambda: all(_sources(view.folder, since=view.step) for view in stopped),
            command,
            run.path,
            timeout_s=_PATIENCE_S,
        )
        command.send_signal(signal.SIGTERM)
        assert command.wait(_PATIENCE_S) == EXIT_STOPPED
    for view in stopped:
        steps = [record["step"] for record in _rounds(view.folder)]
        assert steps == list(range(3, len(steps) + 3)), "each round once, through the kill and the resume"
        assert steps[-1] > view.step
    printed = (tmp_path / "background.log").read_text()
    assert f"report: {run.path / 'report' / 'index.html'}" in printed
    assert "--rl.sharing.store=ray-actor://" in printed
    assert "node0  stopped  step" in printed
    assert len(list((run.path / "report").glob("*.png"))) == 5


def test_a_node_whose_swarm_nobody_else_joins_trains_alone_and_says_so(tmp_path: Path) -> None:
    own = (f"--rl.sharing.store={tmp_path / 'store'}", "--rl.sharing.node=eve", "--run_dir=eve")
    printed = runs.succeed("train", "rl_swarm", *_TINY[1:], *own, "--steps=24", cwd=tmp_path)
    (said, ended) = [line for line in printed.splitlines() if "trained on no group of others" in line]
    assert "round 20 since the start: trained on no group of others: nobody else has anything in the store" in said
    assert "round" not in ended
    again = runs.succeed("train", "rl_swarm", *_TINY[1:], *own, "--steps=26", "--resume", cwd=tmp_path)
    assert "trained on no group of others since it resumed after step 24: nobody else has" in again
    assert len(_rounds(tmp_path / "eve")) == 24


def _view(folder: Path, **change: Any) -> NodeView:
    return replace(NodeView("node0", folder, "running", 5, 0, ""), **change)


def test_an_end_of_a_swarm_names_who_failed_and_why(tmp_path: Path) -> None:
    assert outcome_of([_view(tmp_path, state="done")]) == "completed"
    assert outcome_of([_view(tmp_path, state="done"), _view(tmp_path, state="stopped")]) == "stopped"
    with pytest.raises(RunError, match="node0: died: killed by SIGKILL"):
        outcome_of([_view(tmp_path, state="died", detail="killed by SIGKILL")])


def _write_run(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, float]] = [{"step": 2, "rl/accuracy": 0.25, "rl/accuracy.add": 0.5, "rl/accuracy.sort": 0}]
    records += [
        {
            "step": step,
            "rl/reward": 0.5,
            "rl/reward.add": 0.7,
            "rl/cumulative_reward": 0.5 * (step - 2),
            "rl/signal_rate": 0.25,
            "rl/groups": 6,
            "rl/external_groups": 2,
            "sharing/age_rounds": 1.5,
            "sharing/accepted": 9,
            "sharing/taken": 7,
            "sharing/without_signal": 1,
            "sharing/too_old": 1,
            "sharing/unfit": 0,
            "sharing/waiting": 0,
            "sharing/peers": 2,
            "sharing/namesakes": 0,
            "sharing/store_failures": 0,
            "sharing/rejected": 3,
            "sharing/rejected.reward": 3,
            "sharing/from.bert": 1,
            "sharing/from.<eve>": 1,
        }
        for step in range(3, 13)
    ]
    records.append({"step": 12, "rl/accuracy": 0.75, "rl/accuracy.add": 1, "rl/accuracy.sort": 0.5})
    lines = "".join(json.dumps(record | {"time": 0}) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines)


def test_the_report_has_every_figure_of_every_node(tmp_path: Path) -> None:
    for name in ("node0", "node1"):
        _write_run(tmp_path / "nodes" / name)
    (tmp_path / "nodes" / "node2").mkdir()  # died before its first round
    nodes = report.read_nodes(tmp_path)
    assert [node.name for node in nodes] == ["node0", "node1"]
    node = nodes[0]
    assert node.accuracy == {"add": 1, "sort": 0.5}
    assert node.first_accuracy == {"add": 0.5, "sort": 0}
    assert (node.cumulative_reward, node.signal_rate, node.age_rounds) == (5, 0.25, 1.5)
    assert (node.sampled, node.external) == (60, 20)
    assert node.sources == {"bert": 10, "<eve>": 10}
    assert node.rejected == {"reward": 3}
    text = report.summarise(tmp_path).splitlines()
    assert len(text) == 3
    assert text[0].split()[-5:] == ["sampled", "others'", "age", "from", "rejected"]
    assert "60       20" in text[1]
    page = report.write_report(tmp_path).read_text()
    assert "&lt;eve&gt; 10" in page
    assert "<eve>" not in page
    pictures = sorted(path.name for path in (tmp_path / "report").glob("*.svg"))
    assert pictures == ["accuracy.svg", "cumulative-reward.svg", "reward.svg", "skills-node0.svg", "skills-node1.svg"]
    for name in pictures:
        assert ElementTree.parse(tmp_path / "report" / name).getroot().tag.endswith("svg")
        assert (tmp_path / "report" / name).with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "empty" / "nodes" / "node0").mkdir(parents=True)
    with pytest.raises(RunError, match="no node has made a round"):
        report.read_nodes(tmp_path / "empty")


def test_a_report_says_which_rounds_it_does_not_know(tmp_path: Path) -> None:
    _write_run(tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:2] + lines[4:]))  # of ten rounds eight
    (node,) = report.read_nodes(tmp_path)
    assert (node.sampled, node.unrecorded) == (48, 2)
    assert "miss 2 rounds" in report.summarise(tmp_path).splitlines()[-1]
    assert "miss 2 rounds" in report.write_report(tmp_path).read_text()


def test_the_screen_tells_lines_where_it_is_no_terminal(tmp_path: Path) -> None:
    _write_run(tmp_path)
    stream = io.StringIO()
    screen = watching.Screen(12, ["add", "sort:length=4"], stream)
    views = [_view(tmp_path, state="done", step=12, restarts=1)]
    screen.begin("file:///store", views)
    screen.update(views)
    screen.close()
    first, second = stream.getvalue().splitlines()
    assert "--rl.sharing.store=file:///store" in first
    figures = ("reward 0.500", "add 0.70", "held-out 75.0%", "others' 7, rejected 3")
    for part in ("node0  done (restart 1)", "step 12/12", *figures):
        assert part in second


def test_the_live_table_has_a_row_a_node_and_a_column_a_task(tmp_path: Path) -> None:
    from rich.console import Console

    _write_run(tmp_path)
    screen = watching.Screen(12, ["add", "sort"], io.StringIO())
    views = [_view(tmp_path)]
    screen.begin("store", views)
    screen._tails["node0"].read()
    console = Console(file=io.StringIO(), width=140)
    console.print(screen._table(views))
    assert isinstance(console.file, io.StringIO)
    heading, row = console.file.getvalue().splitlines()[:2]
    assert all(name in heading for name in ("node", "add", "sort", "held out", "rejected"))
    assert all(text in row for text in ("node0", "running", "5/12", "0.70", "75%", "25%"))


def test_a_tail_reads_what_grows_and_again_what_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = watching.Tail(path)
    tail.read()
    path.write_text('{"step": 1, "rl/reward": 0.5}\n{"step": 2, "rl/re')
    tail.read()
    assert tail.rewards == [0.5]
    with path.open("a") as file:
        file.write('ward": 0.75}\n')
    tail.read()
    assert tail.rewards == [0.5, 0.75]
    path.write_text('{"step": 1, "rl/reward": 0.25}\n')
    tail.read()
    assert tail.rewards == [0.25]
    assert tail.latest["rl/reward"] == 0.25


@pytest.mark.parametrize(
    ("values", "expected"), [([], ""), ([0.0, 1.0], "▁█"), ([0.0] * 8 + [1.0] * 8 + [0.5] * 16, "▁▁▁▁████▅▅▅▅▅▅▅▅")]
)
def test_a_spark_line_shows_means(values: list[float], expected: str) -> None:
    assert watching.spark(values) == expected
