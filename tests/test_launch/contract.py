"""What every launcher promises; `test_local` and `test_ray_actors` hold their launchers to it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from faulttol.inject import Fault, fired
from tests.test_launch.client import Driver, noted_pids, runs, wait_for

Request = Callable[..., dict[str, Any]]
GONE_S = 5.0


class LauncherContract:
    """Subclasses name their kind and provide the module's `driver`."""

    kind: str
    cpus_per_rank = 1.0

    @pytest.fixture
    def request_for(self, tmp_path: Path) -> Request:
        """Builds a job of two ranks for the driver; keywords of LaunchConfig override the defaults."""

        def build(entry: str, payload: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
            name = settings.pop("name", "job")
            config = {"start_timeout_s": 120.0, "cpus_per_rank": self.cpus_per_rank, **settings}
            return {
                "job": {
                    "entry": f"tests.test_launch.entries:{entry}",
                    "payload": {"folder": str(tmp_path), **(payload or {})},
                    "world_size": 2,
                    "log_dir": str(tmp_path / f"{name}-logs"),
                    "name": name,
                },
                "config": {"kind": self.kind, **config},
                "heartbeat_interval_s": 0.1,
            }

        return build

    @pytest.fixture(autouse=True)
    def no_rank_is_left(self, driver: Driver, tmp_path: Path) -> Iterator[None]:
        """After each test: of the ranks and of what they started, nothing runs."""
        yield
        assert not [pid for pid in noted_pids(tmp_path) if runs(pid)]

    def test_every_rank_returns_its_own_result(self, driver: Driver, request_for: Request, tmp_path: Path) -> None:
        end = driver.run(request_for("echo", {"word": "héllo", "list": [1, None, {"a": 0.5}]}))
        assert end["event"] == "ended", end
        assert (end["outcome"], end["killed"]) == ("completed", [])
        payload = {"folder": str(tmp_path), "word": "héllo", "list": [1, None, {"a": 0.5}]}
        assert end["results"] == [{"rank": rank, "world_size": 2, "payload": payload} for rank in range(2)]

    def test_rank_0_is_streamed_and_each_rank_has_a_log(
        self, driver: Driver, request_for: Request, tmp_path: Path
    ) -> None:
        end = driver.run(request_for("echo", {"word": "hello"}))
        assert end["output"] == "rank 0 says hello\n"
        for rank in range(2):
            assert (tmp_path / "job-logs" / f"rank{rank}.log").read_text() == f"rank {rank} says hello\n"

    def test_logs_of_an_earlier_run_are_replaced(self, driver: Driver, request_for: Request, tmp_path: Path) -> None:
        logs = tmp_path / "job-logs"
        logs.mkdir()
        for rank in range(3):
            (logs / f"rank{rank}.log").write_text("of an earlier run\n")
        end = driver.run(request_for("echo", {"word": "hello"}))
        assert "earlier" not in end["output"]
        assert [path.name for path in sorted(logs.iterdir())] == ["rank0.log", "rank1.log"]

    def test_two_jobs_at_once_reduce_among_their_own_ranks(self, driver: Driver, request_for: Request) -> None:
        driver.submit(
            request_for("reduced", {"offset": 0}, name="one"),
            request_for("reduced", {"offset": 10}, name="ten"),
        )
        results = {end["job"]: end.get("results", end) for end in (driver.end(), driver.end())}
        assert results == {"one": [[1.0, 1.0]] * 2, "ten": [[21.0, 21.0]] * 2}

    def test_a_rank_that_raises_is_named_with_its_traceback_first(
        self, driver: Driver, request_for: Request, tmp_path: Path
    ) -> None:
        fault = {"kind": "raise", "rank": 1, "step": 2}
        end = driver.run(request_for("steps", {"num_steps": 4, "faults": [fault]}))
        assert (end["event"], end["rank"], end["reason"]) == ("failed", 1, "raised"), end
        assert fired(tmp_path / "fired") == [Fault(kind="raise", rank=1, step=2)]
        lines = end["text"].splitlines()
        assert lines[0] == "job: rank 1 of 2: raised InjectedFault: injected at step 2 of rank 1"
        assert lines[1] == "Traceback (most recent call last):"
        assert "entries.py" in lines[2]
        assert end["text"].index("rank 1 did step 1") < end["text"].index("rank 0 did step 3")
        assert end["log_tails"]["0"].endswith("rank 0 did step 3\n")

    def test_ranks_that_only_lost_the_one_that_raised_come_after_it(self, driver: Driver, request_for: Request) -> None:
        end = driver.run(request_for("lost_peer", {"rank": 1}))
        assert (end["event"], end["rank"], end["reason"]) == ("failed", 1, "raised"), end
        assert end["traceback"].endswith("ValueError: the cause of it all\n")
        assert "Traceback" not in end["output"], "rank 0's complaint was shown before the cause"

    def test_a_rank_that_is_killed_is_named(self, driver: Driver, request_for: Request, tmp_path: Path) -> None:
        fault = {"kind": "kill", "rank": 0, "step": 1}
        end = driver.run(request_for("steps", {"num_steps": 3, "faults": [fault]}))
        assert (end["event"], end["rank"], end["reason"]) == ("failed", 0, "died"), end
        assert fired(tmp_path / "fired") == [Fault(kind="kill", rank=0, step=1)]
        assert "rank 0 did step 0" in end["log_tails"]["0"]
        assert "rank 1: running, at step 2" in end["text"]

    def test_a_rank_that_leaves_without_a_word_died(self, driver: Driver, request_for: Request) -> None:
        end = driver.run(request_for("leave", {"code": 0}))
        assert (end["event"], end["reason"]) == ("failed", "died"), end
        assert "about to leave" in end["text"]

    def test_a_rank_whose_loop_hangs_is_named_with_its_stack(
        self, driver: Driver, request_for: Request, tmp_path: Path
    ) -> None:
        fault = {"kind": "hang", "rank": 1, "step": 1}
        end = driver.run(request_for("steps", {"num_steps": 3, "faults": [fault]}, hang_timeout_s=2.0))
        assert (end["event"], end["rank"], end["reason"]) == ("failed", 1, "hung"), end
        assert fired(tmp_path / "fired") == [Fault(kind="hang", rank=1, step=1)]
        assert "at step 1 (forward)" in end["text"].splitlines()[0]
        assert "in _strike" in end["log_tails"]["1"]
        assert "_stand_still_until_told" in end["log_tails"]["0"]
        assert "Thread" not in end["output"]

    def test_a_frozen_rank_is_named(self, driver: Driver, request_for: Request, tmp_path: Path) -> None:
        fault = {"kind": "freeze", "rank": 1, "step": 1}
        end = driver.run(request_for("steps", {"num_steps": 3, "faults": [fault]}, frozen_timeout_s=2.0))
        assert (end["event"], end["rank"], end["reason"]) == ("failed", 1, "frozen"), end
        assert fired(tmp_path / "fired") == [Fault(kind="freeze", rank=1, step=1)]

    def test_an_entry_that_cannot_be_imported_is_reported_as_raised(self, driver: Driver, request_for: Request) -> None:
        end = driver.run(request_for("nowhere"))
        assert (end["event"], end["reason"]) == ("failed", "raised"), end
        assert "AttributeError: module 'tests.test_launch.entries' has no attribute 'nowhere'" in end["text"]

    def test_a_result_that_json_cannot_hold_is_reported_as_raised(self, driver: Driver, request_for: Request) -> None:
        end = driver.run(request_for("not_json"))
        assert (end["event"], end["reason"]) == ("failed", "raised"), end
        assert "TypeError: the entry returned what JSON cannot hold" in end["text"]

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_stop_lets_ranks_save_and_return(
        self, driver: Driver, request_for: Request, number: signal.Signals
    ) -> None:
        driver.submit(request_for("until_stopped"))
        driver.until_output("ready")
        driver.signal(number)
        end = driver.end()
        assert (end["event"], end["outcome"], end["killed"]) == ("ended", "stopped", []), end
        assert all(steps > 0 for steps in end["results"])
        assert "saved" in end["output"]

    def test_ranks_that_do_not_leave_in_their_grace_are_killed(self, driver: Driver, request_for: Request) -> None:
        driver.submit(request_for("until_stopped", {"deaf": True}, stop_grace_s=0.5))
        driver.until_output("ready")
        driver.signal(signal.SIGTERM)
        end = driver.end()
        assert (end["event"], end["outcome"], end["killed"]) == ("ended", "stopped", [0, 1]), end
        assert end["results"] == [None, None]

    def test_a_second_interrupt_kills_at_once(self, driver: Driver, request_for: Request) -> None:
        driver.submit(request_for("until_stopped", {"deaf": True}, stop_grace_s=600.0))
        driver.until_output("ready")
        driver.signal(signal.SIGINT)
        driver.until_output("heard")  # two signals at once would be one
        driver.signal(signal.SIGINT)
        end = driver.end()
        assert (end["event"], end["outcome"], end["killed"]) == ("ended", "stopped", [0, 1]), end

    def test_what_a_rank_started_ends_with_it(self, driver: Driver, request_for: Request, tmp_path: Path) -> None:
        driver.submit(request_for("until_stopped", {"child": True}))
        driver.until_output("ready")
        child = int((tmp_path / "child.pid").read_text())
        assert runs(child)
        driver.signal(signal.SIGTERM)
        assert driver.end()["outcome"] == "stopped"
        wait_for(lambda: not runs(child), "the rank's child to end", GONE_S)
