"""The bench's policies that are computed together are what each would be alone; its figures and curves are right."""

from __future__ import annotations

import itertools
import json
import math
import struct
import zlib
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch.nn import functional

from trainsys.bench import sapo
from trainsys.bench.swarms import alphabet, grid
from trainsys.bench.swarms.simulation import Scenario, Settings, Swarms
from trainsys.bench.swarms.stack import PAD, Adam, Shape, Stack
from trainsys.rl import chart, questions, raster, tasks

_SHAPE = Shape(vocab_size=alphabet.VOCAB_SIZE, columns=13, dim=16, num_layers=2, num_heads=2)
_CPU = torch.device("cpu")


def _stack(num: int) -> Stack:
    stack = Stack(_SHAPE, num, generator=torch.Generator().manual_seed(1), device=_CPU)
    stack.weights = {name: weight.detach().double().requires_grad_() for name, weight in stack.weights.items()}
    return stack


def _single(stack: Stack, policy: int) -> Stack:
    alone = _stack(1)
    alone.weights = {
        name: weight[policy : policy + 1].detach().clone().requires_grad_() for name, weight in stack.weights.items()
    }
    return alone


def _rows(num: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(1, _SHAPE.vocab_size, (num, 4, 12), generator=generator)
    pads = torch.tensor([0, 1, 3, 5]).expand(num, 4)
    return tokens.masked_fill(torch.arange(12) < pads[..., None], PAD), pads


def test_policies_side_by_side_train_as_each_alone_with_torchs_adam() -> None:
    stack = _stack(3)
    singles = [_single(stack, policy) for policy in range(3)]
    tokens, pads = _rows(3)
    together = Adam(stack, 1e-2)
    alone = [torch.optim.Adam(single.weights.values(), 1e-2) for single in singles]
    active = torch.tensor([1.0, 0.0, 1.0])
    for _ in range(3):
        logits = stack.logits(stack.weights, tokens, pads)
        functional.cross_entropy(logits[:, :, :-1].flatten(0, 2), tokens[..., 1:].flatten()).backward()
        together.step(active)
        for policy in (0, 2):
            single, optimizer = singles[policy], alone[policy]
            logits = single.logits(single.weights, tokens[policy][None], pads[policy][None])
            loss = functional.cross_entropy(logits[:, :, :-1].flatten(0, 2), tokens[policy, :, 1:].flatten()) / 3
            loss.backward()
            torch.nn.utils.clip_grad_norm_(single.weights.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    for name, weight in stack.weights.items():
        for policy, single in enumerate(singles):
            torch.testing.assert_close(weight[policy], single.weights[name][0], rtol=1e-9, atol=1e-12)


def test_padding_on_the_left_changes_nothing() -> None:
    stack = _stack(1)
    short = torch.tensor([[[3, 4, 5, 6]]])
    padded = torch.cat((torch.zeros(1, 1, 3, dtype=torch.long), short), -1)
    bare = stack.logits(stack.weights, short, torch.zeros(1, 1, dtype=torch.long))
    shifted = stack.logits(stack.weights, padded, torch.full((1, 1), 3))
    torch.testing.assert_close(shifted[:, :, 3:], bare, rtol=1e-12, atol=1e-12)


def test_greedy_sampling_with_a_cache_takes_what_the_whole_row_says() -> None:
    stack = _stack(2)
    tokens, pads = _rows(2)
    prompts = tokens[..., :8]
    drawn = stack.sample(stack.weights, prompts, pads, num_each=1, num_new=4, generator=None)[:, :, 0]
    rows = torch.cat((prompts, drawn), -1)
    logits = stack.logits(stack.weights, rows, pads)
    for column in range(4):
        before_end = (drawn[..., :column] != PAD).all(-1)
        assert torch.equal(logits[:, :, 7 + column].argmax(-1)[before_end], drawn[..., column][before_end])
    is_over = (drawn == PAD).cumsum(-1) > 0
    assert (drawn[is_over] == PAD).all()


@pytest.mark.parametrize("skill", alphabet.SKILLS)
def test_a_question_fits_the_alphabet(skill: str) -> None:
    for seed in range(50):
        question = tasks.ask(skill, seed)
        answer = tasks.answer_of(question)
        assert len(alphabet.encode(question.prompt)) <= 8
        tokens = [*alphabet.encode(answer), PAD, PAD]
        assert len(tokens) - 1 <= 5 or skill == "increment"
        assert alphabet.decode(tokens) == (answer, len(answer) + 1, True)


def test_a_stopped_grid_goes_on_and_makes_the_same_figures(tmp_path: Path) -> None:
    settings = Settings(
        seeds=2, rounds=2, groups=4, group_size=4, dim=16, num_layers=1, warm_steps=2, questions_per_skill=1
    )
    scenarios = [grid.scaled(scenario, settings) for scenario in grid.SCENARIOS if scenario.name == "skill-gap 4/4"]

    def run(path: Path, budget_s: float) -> bool:
        return grid.run(scenarios, settings, device="cpu", jobs=1, path=path, budget_s=budget_s)

    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    assert run(whole, math.inf)
    assert not run(parts, 1e-3)  # one is begun, for nothing says yet how long it takes
    assert len(grid.lines(parts)) == 1
    with parts.open("a") as file:
        file.write('{"scenario": "cut off wh')
    with parts.open("a") as file:
        file.write("\n")
    assert run(parts, math.inf)
    assert list(grid.results(parts, scenarios[0], settings, "cpu")) == list(
        grid.results(whole, scenarios[0], settings, "cpu")
    )


def test_rounds_that_nobody_shares_into_are_filled_unless_they_are_not_to_be() -> None:
    settings = Settings(seeds=1, rounds=3, groups=8, group_size=4, dim=16, num_layers=1, questions_per_skill=1)
    found = {}
    for fill in (True, False):
        everybody_silent = Scenario(name="", num_local=4, num_external=4, absent=tuple(range(5)), fill=fill)
        found[fill] = Swarms(everybody_silent, settings, first_seed=0, device=_CPU).run()
    assert {(node.generated, node.external) for node in found[True]} == {(3 * 8, 0)}
    assert {(node.generated, node.external) for node in found[False]} == {(3 * 4, 0)}


def test_an_interval_is_students() -> None:
    low, high = sapo.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (low, high) == pytest.approx((1.0368, 4.9632), abs=1e-3)  # 3 +- 2.776 x 1.5811 / sqrt(5)
    assert sapo.interval([1.0]) == (-math.inf, math.inf)


def test_questions_held_out_are_not_trained_on() -> None:
    specs = [questions.TaskSpec(skill) for skill in alphabet.SKILLS]
    held_out = {question.prompt for question in questions.draw(specs, 200, (0,), held_out=True)}
    assert not held_out & {question.prompt for question in questions.draw(specs, 2000, (5,))}


def test_a_chart_is_xml_with_a_line_and_a_name_for_each_curve() -> None:
    curves = [chart.Line(f"<{index}>", [(x, x * index) for x in range(5)]) for index in range(10)]
    curves.append(chart.Line("nothing", [(0, math.nan)]))
    root = ElementTree.fromstring(chart.draw(curves, title="a & b", x_label="x", y_label="y"))
    space = "{http://www.w3.org/2000/svg}"
    drawn = [line for line in root.findall(f"{space}polyline") if line.get("stroke-width") == "2"]
    assert len(drawn) == 10
    assert [line.get("stroke-dasharray") is not None for line in drawn] == [False] * 8 + [True] * 2
    names = [text.text or "" for text in root.findall(f"{space}text")]
    assert [name for name in names if name.startswith("<")] == [f"<{index}> {4 * index:.3g}" for index in range(10)]
    assert ElementTree.fromstring(chart.draw([], title="", x_label="", y_label="")) is not None


def test_a_chart_as_png_has_each_curve_where_its_points_are() -> None:
    picture = chart.plan(
        [chart.Line("rising", [(0, 0), (10, 1)]), chart.Line("one", [(5, 0.25)])], title="t", x_label="x", y_label="y"
    )
    data = raster.png(picture, scale=1)
    pixels = _decoded(data)
    assert (pixels.shape[1], pixels.shape[0]) == (picture.width, picture.height)
    blue, orange = (torch.tensor([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) for colour in ("#0072b2", "#d55e00"))
    for share in (0.1, 0.5, 0.9):
        column, row = round(56 + 400 * share), round(296 - 256 * share)
        around = pixels[row - 2 : row + 2, column - 2 : column + 2].reshape(-1, 3)
        assert (around - blue).abs().sum(1).min() < 30, "the line passes here"
        assert (pixels[row - 60, column] == 255).all() or share == 0.9, "and nothing is above it"
    assert (pixels[232 - 1 : 232 + 1, 256] - orange).abs().sum(1).min() < 30, "a single point is a dot"
    assert (pixels[14:24, 56:64] < 128).any(), "the title has been written"


def _decoded(data: bytes) -> torch.Tensor:
    """Return the pixels of a PNG whose rows are not filtered, its checksums checked."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack_from(">I", data, at + 8 + size)[0] == zlib.crc32(kind + body)
        chunks[kind], at = body, at + 12 + size
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, *form = struct.unpack(">2I5B", chunks[b"IHDR"])
    assert form == [8, 2, 0, 0, 0]
    rows = torch.tensor(list(zlib.decompress(chunks[b"IDAT"]))).view(height, 1 + 3 * width)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, 3)


def test_lines_of_other_code_are_no_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(seeds=1, rounds=1)
    scenario = grid.SCENARIOS[0]
    path = tmp_path / "lines.jsonl"
    for code, nodes in (("old", [1]), (grid.code_version(), [2])):
        monkeypatch.setattr(grid, "code_version", lambda code=code: code)
        line = {"scenario": scenario.name, "seed": 0, "key": grid._key(scenario, settings, "cpu"), "nodes": nodes}
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
    assert list(grid.results(path, scenario, settings, "cpu")) == [[2]]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.31, 0.41, [0.3, 0.32, 0.34, 0.36, 0.38, 0.4, 0.42]), (3, 3, None)],
)
def test_ticks_are_round_and_enclose(low: float, high: float, expected: list[float] | None) -> None:
    found = chart.ticks(low, high)
    assert expected is None or found == pytest.approx(expected)
    assert found[0] <= low
    assert found[-1] >= high


def test_labels_keep_their_order_and_distance() -> None:
    rows = [100.0, 101.0, 100.5, 290.0, 291.0]
    placed = chart.spread(rows, 15)
    ordered = sorted(range(5), key=rows.__getitem__)
    assert all(placed[b] - placed[a] >= 15 - 1e-9 for a, b in itertools.pairwise(ordered))
