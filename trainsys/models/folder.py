"""A trained model as a folder that stands by itself: sizes, weights, tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainsys.config import ModelConfig, MoEConfig
from trainsys.data import Tokenizer, TokenizerError, load_tokenizer
from trainsys.errors import ConfigError, MissingExtraError
from trainsys.models.decoder import Decoder, resolve
from trainsys.models.huggingface import build_huggingface, write_huggingface

_MODEL_TYPE = "trainsys-decoder"
_TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def save_pretrained(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    out_dir: Path,
    tokenizer: Tokenizer,
    *,
    max_positions: int | None = None,
) -> None:
    """Writes the model of `config` with the weights `state` into `out_dir`, replacing files of the same name.

    `state` has the names of the built model's parameters; a shared tensor may come under one name only.
    kind=decoder: config.json, model.safetensors, the tokenizer; `load_pretrained` reads it, and
    `max_positions` (None: no limit) becomes its limit. kind=hf: what `AutoModelForCausalLM.from_pretrained`
    opens, with the tokenizer's files beside it; reads config.json in `config.path` again.

    Raises: ConfigError if `state` is not the whole model. MissingExtraError without safetensors.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    if config.kind == "hf":
        write_huggingface(config, state, out_dir)
        _write_tokenizer(Path(config.path), tokenizer, out_dir)
        return
    resolved = resolve(config, tokenizer.vocab_size)
    with torch.device("meta"):
        model = Decoder(resolved, max_positions=max_positions, recompute="none")
    kept = {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}
    if resolved.tied_head:
        kept.pop("head.weight", None)
    _check_names(_shapes(model), kept)
    _safetensors().save_file(kept, out_dir / "model.safetensors", metadata={"format": "pt"})
    described = {
        "model_type": _MODEL_TYPE,
        "dtype": str(next(iter(kept.values())).dtype).removeprefix("torch."),
        "max_positions": max_positions,
        "tokenizer": tokenizer.save(out_dir),
        "model": asdict(resolved),
    }
    (out_dir / "config.json").write_text(json.dumps(described, indent=2) + "\n")


def load_pretrained(folder: Path) -> nn.Module:
    """The model that `save_pretrained` wrote to `folder`, on the CPU, for evaluation.

    A decoder comes back in the dtype it was saved in, a Hugging Face model in fp32. Raises: ConfigError if
    there is none, or it does not fit.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ConfigError([f"{folder}: has no config.json; give a folder written by save_pretrained"])
    described = json.loads(path.read_text())
    if described.get("model_type") != _MODEL_TYPE:
        config = ModelConfig(kind="hf", path=str(folder))
        return build_huggingface(config, vocab_size=0, max_positions=0, recompute="none", seed=0).eval()
    return _load_decoder(Path(folder), described).eval()


def _load_decoder(folder: Path, described: Mapping[str, Any]) -> Decoder:
    sizes = dict(described["model"])
    config = ModelConfig(**{**sizes, "moe": MoEConfig(**sizes["moe"])})
    with torch.device("meta"):
        model = Decoder(config, max_positions=described["max_positions"], recompute="none")
    state = _safetensors().load_file(folder / "model.safetensors")
    _check_names(_shapes(model), state)
    if config.tied_head:
        state["head.weight"] = state["embedding.weight"]
    model.load_state_dict(state, assign=True)
    if config.tied_head:
        model.head.weight = model.embedding.weight
    return model


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Of the parameters, a shared one once, and of the buffers that are saved (biases of routers)."""
    saved = model.state_dict().keys()
    buffers = {name: buffer.shape for name, buffer in model.named_buffers() if name in saved}
    return {name: parameter.shape for name, parameter in model.named_parameters()} | buffers


def _check_names(wanted: Mapping[str, torch.Size], state: Mapping[str, Tensor]) -> None:
    wrong = [f"{name}: missing" for name in wanted.keys() - state.keys()]
    wrong += [f"{name}: not of this model" for name in state.keys() - wanted.keys()]
    wrong += [
        f"{name}: {tuple(state[name].shape)}, the model has {tuple(wanted[name])}"
        for name in wanted.keys() & state.keys()
        if state[name].shape != wanted[name]
    ]
    if wrong:
        raise ConfigError(f"weights: {problem}" for problem in wrong)


def _write_tokenizer(source: Path, tokenizer: Tokenizer, out_dir: Path) -> None:
    """Puts the tokenizer's files beside the weights: the model's own ones if it was trained with them."""
    if tokenizer.spec == "bytes":
        return
    saved = out_dir / tokenizer.save(out_dir)
    origin = saved
    try:
        if load_tokenizer(str(source)).digest == tokenizer.digest:
            origin = source
    except TokenizerError:
        origin = saved  # the model's folder has none
    for name in _TOKENIZER_FILES:
        if (origin / name).is_file():
            shutil.copyfile(origin / name, out_dir / name)
    shutil.rmtree(saved)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise MissingExtraError("writing and reading model folders", "train") from error
    return safetensors.torch
