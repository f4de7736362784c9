"""Experts of Hugging Face models over two ranks against one process, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.config import ParallelConfig
from parallel.expert import ExpertGroups, dispatch_stats, expert_parameters, has_experts, parallelize
from parallel.groups import MeshGroups
from parallel.mesh import Mesh
from parallel.shards import gather_state, shards_of
from tests.ranks import run_ranks

pytest.importorskip("transformers", reason="the extra hf is not installed")

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 16,
    "pad_token_id": None,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
KINDS: dict[str, dict[str, Any]] = {"Mixtral": {"num_local_experts": 4}, "Qwen3Moe": MOE}
ROWS = (1, 2)


def _make(kind: str, **sizes: Any) -> Any:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**SIZES, **sizes)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").double()


def _tokens() -> Tensor:
    return torch.randint(0, 50, (sum(ROWS), 7), generator=torch.Generator().manual_seed(1))


def _backward(model: Any, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(input_ids=tokens, use_cache=False).logits
    logits.square().sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def _one_rank(rank: int, world_size: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with MeshGroups(Mesh(ParallelConfig(replicate=2, expert=2), world_size)) as groups:
        for kind, sizes in KINDS.items():
            model = _make(kind, **sizes)
            assert has_experts(model)
            parallelize(model, ExpertGroups.of(groups))
            logits, grads = _backward(model, _tokens().split(ROWS)[rank])
            experts = expert_parameters(model)
            assert len(experts) == 4
            for name, grad in grads.items():
                if name not in experts:
                    dist.all_reduce(grad)
            found[kind] = (logits, grads, shards_of(model), dispatch_stats(model).routes)
        for kind, sizes in (("Llama", {}), ("GptOss", {"num_local_experts": 4})):
            with pytest.raises(ValueError, match="parallel") as caught:
                parallelize(_make(kind, **sizes), ExpertGroups.of(groups))
            found[kind] = str(caught.value)
    return found


def test_stacked_experts_of_hugging_face_models_equal_one_process() -> None:
    ranks = run_ranks(_one_rank, 2, timeout_s=120)
    for kind, sizes in KINDS.items():
        logits, grads = _backward(_make(kind, **sizes), _tokens())
        ours = torch.cat([found[kind][0] for found in ranks])
        torch.testing.assert_close(ours, logits, rtol=1e-12, atol=1e-14)
        gathered = gather_state([(found[kind][2], found[kind][1]) for found in ranks])
        assert gathered.keys() == grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(gathered[name], grad, rtol=1e-12, atol=1e-13, msg=name)
        assert sum(found[kind][3] for found in ranks) == 2 * 2 * 7 * sum(ROWS)
    assert all(found["Llama"] == ranks[0]["Llama"] for found in ranks)
    assert ranks[0]["Llama"] == "parallel.expert: 2: no experts are known in LlamaForCausalLM; allowed: 1"
    assert ranks[0]["GptOss"].startswith("parallel.expert: experts of GptOssExperts are not known (is_concatenated")
