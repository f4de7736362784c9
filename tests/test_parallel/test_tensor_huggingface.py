"""Models of transformers shared over tensor ranks against one process, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.errors import PlanError
from parallel.plans import plan_for
from parallel.shards import shards_of
from parallel.tensor import parallelize
from tests.ranks import run_ranks
from tests.test_parallel.tensor_models import How, Trained, assert_equal, train, train_shared
from trainsys.config import ModelConfig
from trainsys.models import build, materialise
from trainsys.models.huggingface import HuggingFaceModel

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 301,
    "hidden_size": 16,
    "intermediate_size": 21,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 6, "num_key_value_heads": 1}),
    "mistral": ("MistralConfig", {"sliding_window": 4}),
}
HOWS = [How(False, True), How(True, True, 10)]


class ExactNorm(nn.Module):
    """RMSNorm in the dtype of its input; transformers rounds to fp32 inside, whatever comes in."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt() * self.weight


def write(folder: Path, name: str, **changes: Any) -> Path:
    kind, extra = CONFIGS[name]
    getattr(transformers, kind)(**{**SIZES, **extra, **changes}).save_pretrained(folder / name)
    return folder / name


def make(folder: Path) -> HuggingFaceModel:
    config = ModelConfig(kind="hf", path=str(folder))
    model = build(config, vocab_size=300, max_positions=32, recompute="none", seed=1)
    assert isinstance(model, HuggingFaceModel)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # ones and zeros would hide a wrong part
            torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.__class__ = ExactNorm
    return model.double()


def _train_all(rank: int, world_size: int, folders: list[Path], hows: list[How]) -> list[Trained]:
    return [train_shared(make(folder), 300, how) for folder in folders for how in hows]


@pytest.mark.parametrize(("world_size", "names"), [(2, ["llama", "qwen2", "qwen3", "mistral"]), (4, ["qwen3"])])
def test_a_shared_model_of_transformers_trains_as_one_process_does(
    tmp_path: Path, world_size: int, names: list[str]
) -> None:
    folders = [write(tmp_path, name) for name in names]
    cases = [(folder, how) for folder in folders for how in HOWS]
    results = run_ranks(_train_all, world_size, folders, HOWS, timeout_s=300)
    for (folder, how), *ranks in zip(cases, *results, strict=True):
        assert_equal(ranks, train(make(folder), 300, {}, how.num_steps))


def _materialised(rank: int, world_size: int, folders: list[Path]) -> None:
    assert dist.group.WORLD is not None
    for folder in folders:
        config = ModelConfig(kind="hf", path=str(folder))
        built = {"vocab_size": 300, "max_positions": 32, "recompute": "none", "seed": 4}
        wanted = build(config, **built)  # type: ignore[arg-type]
        with torch.device("meta"):
            model = build(config, **built)  # type: ignore[arg-type]
        for each in (wanted, model):
            parallelize(each, plan_for(each), dist.group.WORLD, sequence=True, overlap=False)
        materialise(model, torch.device("cpu"), torch.float32, 4)
        assert shards_of(model) == shards_of(wanted)
        mine, theirs = model.state_dict(), wanted.state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        tokens = torch.arange(8)[None]
        assert torch.equal(model(tokens)[0], wanted(tokens)[0])  # rotary frequencies too


def test_parts_of_a_model_are_made_or_read_one_by_one(tmp_path: Path) -> None:
    drawn, read = write(tmp_path / "drawn", "qwen2"), write(tmp_path / "read", "llama")
    make(read).float().causal_lm.save_pretrained(read)
    run_ranks(_materialised, 2, [drawn, read])


def test_models_of_unknown_structure_are_refused_by_the_names_of_their_modules(tmp_path: Path) -> None:
    transformers.GPT2Config(vocab_size=301, n_embd=16, n_layer=1, n_head=2, n_positions=64).save_pretrained(tmp_path)
    with pytest.raises(PlanError, match=r"no way is known to share causal_lm\.transformer\.wte, .* and \d+ more"):
        plan_for(make(tmp_path))
    transformers.Olmo2Config(**SIZES).save_pretrained(tmp_path)
    with pytest.raises(PlanError, match=r"self_attn\.q_norm"):  # over all heads, which no rank has
        plan_for(make(tmp_path))
