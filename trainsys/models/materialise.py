"""Weights for models that were built on the meta device, a parameter at a time: no rank ever has the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parallel.shards import shard_of, shards_of
from trainsys.config import ModelConfig
from trainsys.errors import ConfigError, MissingExtraError
from trainsys.models.huggingface import PREFIX, HuggingFaceModel, initial_parts, make_buffers
from trainsys.models.initialisation import fill, materialise_decoder, spread


@torch.no_grad()
def materialise(model: nn.Module, device: torch.device, dtype: torch.dtype, seed: int) -> nn.Module:
    """Gives every parameter on the meta device its values, and returns the model, now on `device` in `dtype`.

    A model is what `build` returned, or what holds the modules of a decoder's stages and its `config`. The values
    are those that `build` gives the whole model for `seed` (or reads from its folder), of which each parameter takes
    the part that its tag says: call it after the model was shared and cut. Buffers too come to be.
    Raises: ConfigError if files of weights are not this model's.
    """
    if isinstance(model, HuggingFaceModel):
        if model.weights_folder is None:
            for name, values in initial_parts(model, seed):
                fill(model, name, values, device, dtype)
        else:
            _read(model, model.weights_folder, device, dtype)
        make_buffers(model)
    else:
        config: Any = model.config
        assert isinstance(config, ModelConfig), "a decoder, or the modules of its stages with its config"
        materialise_decoder(
            model, num_layers=config.num_layers, std=spread(config.dim), device=device, dtype=dtype, seed=seed
        )
    _check_buffers(model)
    return model.to(device=device, dtype=dtype)


def _read(model: HuggingFaceModel, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise MissingExtraError("reading model folders", "train") from error
    wanted = {name.removeprefix(PREFIX): name for name in shards_of(model)}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in wanted.keys() & set(file.keys()):
                name = wanted.pop(key)
                values: Tensor = file.get_tensor(key)
                shard = shard_of(model.get_parameter(name))
                if tuple(values.shape) != shard.global_shape:
                    problem = f"{key} is {tuple(values.shape)}, the model has {shard.global_shape}"
                    raise ConfigError(
                        [f"config: model.path: the weights in '{folder}' are not this model's: {problem}"]
                    )
                fill(model, name, shard.take(values), device, dtype)
    if wanted:
        raise _misfit(folder, f"missing {sorted(wanted)[:5]}")


def _misfit(folder: Path, problem: str) -> ConfigError:
    return ConfigError([f"config: model.path: the weights in '{folder}' are not this model's: {problem}"])


def _check_buffers(model: nn.Module) -> None:
    unset = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if unset:
        raise ConfigError(
            [f"config: model: buffers {', '.join(unset)} cannot be made after the fact; build on the CPU"]
        )
