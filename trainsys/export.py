"""From a checkpoint to a model folder, and from that to a sample of text; on one rank, without the engine."""

from __future__ import annotations

from pathlib import Path

import checkpoint as ck
from trainsys import data, models
from trainsys.config import EvaluationConfig, RunConfig
from trainsys.generate import generate

_PREFIX = "model."


def export_model(config: RunConfig, info: ck.CheckpointInfo, prepared: data.PreparedInfo, out: Path) -> None:
    """Write the weights of a checkpoint as a model folder, whatever ranks and ZeRO stage saved it.

    Reads the weights only, verified; needs host memory for one copy of them.
    """
    weights = ck.read(info, f"{_PREFIX}*")
    state = {name.removeprefix(_PREFIX): tensor for name, tensor in weights.items()}
    models.save_pretrained(config.model, state, out, prepared.tokenizer(), max_positions=config.data.sequence_length)


def sample_text(folder: Path, tokenizer: data.Tokenizer, config: EvaluationConfig, seed: int) -> str:
    """Return the prompt and what the model in `folder` adds to it."""
    return generate(
        models.load_pretrained(folder).float(),
        tokenizer,
        config.sample_prompt,
        num_tokens=config.sample_tokens,
        temperature=config.sample_temperature,
        seed=seed,
    )
