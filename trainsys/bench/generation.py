"""Completions must be drawn at least twice as fast as by `transformers.generate`, from the same weights.

A random-weight Qwen2 of 0.5B parameters (24 layers, width 896, 14 query and 2 key heads, 151,936 tokens) in bf16 draws
`--new` tokens for each of `--prompts` x `--each` completions, at temperature 1 without any other rule and without a
stop token, so both sides draw the same number. Prompts are equally long, so the baseline pads nothing; it gets the
prompts repeated, as its own `num_return_sequences` would do.

    transformers  `AutoModelForCausalLM.generate` with its default cache; with `--static` also with its static cache,
                  which it compiles (minutes)
    ours          `trainsys.rl.sampler.Sampler` on the same transformers model
    decoder       the same on the built-in decoder of the same sizes

The figure is drawn tokens per second, prompts included in the time. Its bound is the memory traffic of the steps:
weights once a step, keys and values of all sequences so far, at the measured bandwidth of a copy.

Gates: in float64 the greedy completions of prompts of unequal length are those of `transformers.generate`, token for
token; in the precision of the run the log-probabilities told with the tokens are those of a whole forward, on average
within 2^-6; and the goal of 2x, which is reported, not enforced.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parallel.bench import commit
from trainsys.config import ModelConfig
from trainsys.models import build
from trainsys.models.huggingface import HuggingFaceModel
from trainsys.rl.logprob import log_probs_of_logits
from trainsys.rl.sampler import Drawing, Sampler, slot_core

GOAL = 2.0
_NO_STOP = -1


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is drawn, from what."""

    layers: int
    dim: int
    heads: int
    kv_heads: int
    ffn_dim: int
    vocab: int
    prompts: int
    each: int
    prompt: int
    new: int

    @property
    def rows(self) -> int:
        """Completions drawn at the same time."""
        return self.prompts * self.each


SMOKE = Sizes(2, 64, 4, 2, 128, 512, prompts=2, each=2, prompt=8, new=8)
FULL = Sizes(24, 896, 14, 2, 4864, 151_936, prompts=32, each=8, prompt=128, new=256)


def main(arguments: list[str]) -> int:
    """Run the benchmark and print its table; 1 where a correctness gate fails."""
    parser = argparse.ArgumentParser(prog="python -m trainsys.bench.generation", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="timed passes of every case (default 5)")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--smoke", action="store_true", help="one pass with a tiny model: does it run?")
    parser.add_argument("--budget-s", type=float, default=110, help="begin no further pass after this (default 110)")
    parser.add_argument("--static", action="store_true", help="also transformers' static, compiled cache")
    parser.add_argument("--prompts", type=int, default=FULL.prompts, help="different prompts (default 32)")
    parser.add_argument("--each", type=int, default=FULL.each, help="completions of each (default 8)")
    parser.add_argument("--new", type=int, default=FULL.new, help="tokens of each completion (default 256)")
    chosen = parser.parse_args(arguments)
    sizes = SMOKE
    if not chosen.smoke:
        sizes = Sizes(
            FULL.layers, FULL.dim, FULL.heads, FULL.kv_heads, FULL.ffn_dim, FULL.vocab,
            chosen.prompts, chosen.each, FULL.prompt, chosen.new,
        )  # fmt: skip
    began_s = time.perf_counter()
    bench = Bench(sizes, static=chosen.static)
    repeats = 1 if chosen.smoke else chosen.repeats
    for repeat in range(repeats + 1):  # the first pass warms up and is not counted
        if repeat > 1 and time.perf_counter() - began_s > chosen.budget_s:
            _say(began_s, f"stopping after {repeat - 1} passes: --budget-s")
            break
        bench.measure(keep=repeat > 0)
        _say(began_s, f"pass {repeat}: {bench.newest()}")
    document = bench.document({"repeats": repeats, "smoke": chosen.smoke})
    if chosen.json:
        chosen.json.write_text(json.dumps(document, indent=1) + "\n")
    _print(document)
    return 0 if all(gate["ok"] for gate in document["gates"] if "goal" not in gate["name"]) else 1


def _say(began_s: float, text: str) -> None:
    print(f"{time.perf_counter() - began_s:6.1f} s  {text}", flush=True)


class Bench:
    """The models, the cases and their samples."""

    def __init__(self, sizes: Sizes, *, static: bool) -> None:
        self._sizes = sizes
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        self._samples: dict[tuple[str, str, str], list[float]] = {}
        self._gates: list[dict[str, Any]] = []
        began_s = time.perf_counter()
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(1)
        shape = (sizes.prompts, sizes.prompt)
        self._prompts = torch.randint(0, sizes.vocab, shape, generator=generator).to(self._device)
        self._theirs = _transformers_model(sizes, self._device)
        with self._device:  # the wrapper tries the model on a few tokens
            ours = HuggingFaceModel(copy.deepcopy(self._theirs)).eval()
        slot_core(ours)
        self._gates.append(_same_tokens(ours, self._theirs, self._device, 48 if sizes is not SMOKE else 8))
        _say(began_s, f"greedy tokens compared in float64: {self._gates[-1]['value']:.0f} differ")
        self._theirs, ours = self._theirs.to(self._dtype), ours.to(self._dtype)
        decoder = _decoder(sizes).to(self._device, self._dtype).eval()
        self._drawing = Drawing(sizes.vocab, _NO_STOP, sizes.new, 1.0)
        self._cases: dict[str, Callable[[], object]] = {
            "transformers": self._their_case(None),
            **({"transformers static": self._their_case("static")} if static else {}),
            "ours": self._our_case(ours),
            "decoder": self._our_case(decoder),
        }
        self._gates.append(self._same_log_probs(ours))
        _say(began_s, f"log-probabilities compared with a whole forward: {self._gates[-1]['value']:.2g}")

    def measure(self, *, keep: bool) -> None:
        """One pass over every case, baseline and candidates in turn."""
        for case, draw in self._cases.items():
            seconds = self._seconds(draw)
            if keep:
                rate = self._sizes.rows * self._sizes.new / seconds
                self._samples.setdefault((case, "drawn", "tokens/s"), []).append(rate)
                self._samples.setdefault((case, "step", "ms"), []).append(1e3 * seconds / self._sizes.new)

    def newest(self) -> str:
        """Return the last sample of each case as text."""
        found = [f"{case} {v[-1]:,.0f} tokens/s" for (case, _, unit), v in self._samples.items() if unit == "tokens/s"]
        return ", ".join(found) or "warmed up"

    def document(self, parameters: dict[str, object]) -> dict[str, Any]:
        """Everything measured, in the schema that all benchmarks share."""
        results = [
            {"case": case, "metric": metric, "unit": unit, "samples": samples}
            | {"median": statistics.median(samples), "min": min(samples), "max": max(samples)}
            for (case, metric, unit), samples in self._samples.items()
        ]
        median = {row["case"]: float(row["median"]) for row in results if row["unit"] == "tokens/s"}  # type: ignore[arg-type]
        ratio = median["ours"] / median["transformers"]
        goal = {"name": "goal: drawn tokens/s over transformers.generate", "value": ratio, "limit": GOAL}
        sizes = {name: getattr(self._sizes, name) for name in Sizes.__slots__}
        return {
            "name": "trainsys.generation",
            "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": {
                "system": platform.platform(),
                "processor": torch.cuda.get_device_name() if self._device.type == "cuda" else platform.machine(),
                "cpus": os.cpu_count(),
            },
            "versions": {"torch": version("torch"), "transformers": version("transformers")},
            "parameters": parameters | sizes | {"dtype": str(self._dtype).removeprefix("torch.")},
            "results": results,
            "bounds": [self._bound()],
            "gates": [*self._gates, goal | {"ok": ratio >= GOAL}],
        }

    def _their_case(self, cache: str | None) -> Callable[[], object]:
        sizes, repeated = self._sizes, self._prompts.repeat_interleave(self._sizes.each, 0)
        kind: dict[str, Any] = {} if cache is None else {"cache_implementation": cache}

        def draw() -> object:
            drawn = _generate(self._theirs, repeated, sizes.new, do_sample=True, **kind)
            assert drawn.shape == (sizes.rows, sizes.prompt + sizes.new), drawn.shape
            return drawn

        return draw

    def _our_case(self, model: nn.Module) -> Callable[[], object]:
        sampler = Sampler(model, slots=self._sizes.rows)
        prompts = self._prompts.tolist()
        seeds = [[row * self._sizes.each + index for index in range(self._sizes.each)] for row in range(len(prompts))]

        def draw() -> object:
            drawn = sampler.draw(prompts, seeds, self._drawing)
            assert (
                sum(len(one.tokens) for of_prompt in drawn for one in of_prompt) == self._sizes.rows * self._sizes.new
            )
            return drawn

        return draw

    @torch.no_grad()
    def _same_log_probs(self, model: HuggingFaceModel) -> dict[str, Any]:
        """Compare what the sampler says of its tokens with one forward over the whole sequences."""
        prompts = self._prompts[:4].tolist()
        drawn = Sampler(model, slots=4).draw(prompts, [[1]] * len(prompts), self._drawing)
        worst = 0.0
        for prompt, (one,) in zip(prompts, drawn, strict=True):
            tokens = torch.tensor([[*prompt, *one.tokens]], device=self._device)
            positions = torch.arange(tokens.shape[1], device=self._device)[None]
            logits = model(tokens, positions_BT=positions)[0][0, len(prompt) - 1 : -1]
            told = torch.tensor(one.log_probs, device=self._device)
            whole = log_probs_of_logits(logits, tokens[0, len(prompt) :])
            worst = max(worst, float((told - whole).abs().mean()))
        limit = 2**-6 if self._dtype == torch.bfloat16 else 2**-16
        name = "mean difference of log-probabilities from a whole forward, nats"
        return {"name": name, "value": worst, "limit": limit, "ok": worst <= limit}

    def _bound(self) -> dict[str, Any]:
        sizes = self._sizes
        weights = sum(parameter.numel() * parameter.itemsize for parameter in self._theirs.parameters())
        of_token = 2 * sizes.layers * sizes.kv_heads * (sizes.dim // sizes.heads) * self._dtype.itemsize
        cached = sizes.rows * of_token * (sizes.prompt + sizes.new / 2)
        source = torch.empty(2**30 if self._device.type == "cuda" else 2**26, dtype=torch.uint8, device=self._device)
        target = torch.empty_like(source)
        seconds = min(self._seconds(lambda: target.copy_(source)) for _ in range(5))
        bandwidth = 2 * source.numel() / seconds
        return {
            "metric": "drawn",
            "value": sizes.rows * bandwidth / (weights + cached),
            "unit": "tokens/s",
            "how": f"weights and half-full cache once a step at {bandwidth / 1e9:,.0f} GB/s, the rate of a copy",
        }

    def _seconds(self, action: Callable[[], object]) -> float:
        self._synchronize()
        began_s = time.perf_counter()
        action()
        self._synchronize()
        return time.perf_counter() - began_s

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def _transformers_model(sizes: Sizes, device: torch.device) -> Any:
    """Return a Qwen2 with random weights in fp32."""
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.Qwen2Config(
        hidden_size=sizes.dim,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        intermediate_size=sizes.ffn_dim,
        vocab_size=sizes.vocab,
        max_position_embeddings=max(64, 2 * (sizes.prompt + sizes.new)),
        tie_word_embeddings=True,
    )
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def _decoder(sizes: Sizes) -> nn.Module:
    return build(
        ModelConfig(
            num_layers=sizes.layers,
            dim=sizes.dim,
            num_heads=sizes.heads,
            num_kv_heads=sizes.kv_heads,
            ffn_dim=sizes.ffn_dim,
            vocab_size=sizes.vocab,
        ),
        vocab_size=sizes.vocab,
        max_positions=max(64, 2 * (sizes.prompt + sizes.new)),
        recompute="none",
        seed=0,
    )


@torch.no_grad()
def _generate(model: Any, tokens: Tensor, new: int, *, mask: Tensor | None = None, **options: Any) -> Tensor:
    result: Tensor = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens) if mask is None else mask,
        max_new_tokens=new,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        **options,
    )
    return result


def _same_tokens(ours: HuggingFaceModel, theirs: Any, device: torch.device, new: int) -> dict[str, Any]:
    """Compare greedy completions of prompts of unequal length in float64; the models come back in fp32."""
    generator = torch.Generator().manual_seed(2)
    vocab = theirs.config.vocab_size
    prompts = [torch.randint(1, vocab, (length,), generator=generator).tolist() for length in (3, 11, 24, 5)]
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    wide = Sampler(ours.double(), slots=len(prompts))
    wanted = _generate(theirs.double(), tokens, new, mask=mask, do_sample=False)[:, longest:].tolist()
    found = wide.draw(prompts, [[0]] * len(prompts), Drawing(vocab, _NO_STOP, new, 0.0))
    pairs = zip(found, wanted, strict=True)
    wrong = sum(a != b for (one,), other in pairs for a, b in zip(one.tokens, other, strict=True))
    ours.float()
    theirs.float()
    name = "greedy tokens in float64 that differ from transformers.generate"
    return {"name": name, "value": wrong, "limit": 0, "ok": wrong == 0}


def _print(document: dict[str, Any]) -> None:
    for row in document["results"]:
        numbers = "  ".join(f"{row[key]:12,.2f}" for key in ("median", "min", "max"))
        print(f"{row['case']:20s} {row['metric']:6s} {row['unit']:9s} {numbers}")
    for bound in document["bounds"]:
        print(f"bound                {bound['metric']:6s} {bound['unit']:9s} {bound['value']:12,.2f}  ({bound['how']})")
    for gate in document["gates"]:
        print(f"{'ok' if gate['ok'] else 'FAILED':6s} {gate['name']}: {gate['value']:.3g} (limit {gate['limit']:.3g})")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
