"""The stages of a Hugging Face model, one after the other, are the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.test_trainsys.test_models_huggingface import DENSE, DOCUMENTS, TOKENS, write_config
from trainsys.config import ModelConfig
from trainsys.errors import ConfigError
from trainsys.models import build
from trainsys.models.huggingface import HuggingFaceModel
from trainsys.models.huggingface_stages import HuggingFaceStage

TARGETS = TOKENS.roll(-1, 1).masked_fill(DOCUMENTS == 8, -100)


def _model(folder: Path, name: str) -> HuggingFaceModel:
    path = str(write_config(folder, name, num_hidden_layers=4))
    config = ModelConfig(kind="hf", path=path)
    model = build(config, vocab_size=257, max_positions=64, recompute="none", seed=0)
    assert isinstance(model, HuggingFaceModel)
    return model.double()


def _chain(stages: list[HuggingFaceStage], document_ids_BT: Tensor | None, targets_BT: Tensor | None) -> Tensor:
    x, aux = TOKENS, None
    for stage in stages:
        x, aux = stage(x, aux, document_ids_BT=document_ids_BT, targets_BT=targets_BT)
    return x


@pytest.mark.parametrize("name", DENSE)
def test_stages_in_a_row_equal_the_model(tmp_path: Path, name: str) -> None:
    model = _model(tmp_path, name)
    stages = [HuggingFaceStage(model, first, end) for first, end in ((0, 1), (1, 2), (2, 4))]
    for ids in (None, DOCUMENTS):
        torch.testing.assert_close(
            _chain(stages, ids, None), model(TOKENS, document_ids_BT=ids)[0], rtol=1e-12, atol=1e-14
        )
    loss, _ = model(TOKENS, document_ids_BT=DOCUMENTS, targets_BT=TARGETS)
    loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    _chain(stages, DOCUMENTS, TARGETS).backward()  # type: ignore[no-untyped-call]
    names: set[str] = set()
    for stage in stages:
        for parameter_name, parameter in stage.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[parameter_name], rtol=1e-12, atol=1e-14)
            names.add(parameter_name)
    assert names == set(expected)
    assert "causal_lm.model.layers.3.mlp.up_proj.weight" in dict(stages[2].named_parameters())


def test_a_stage_holds_no_parameter_of_another(tmp_path: Path) -> None:
    stage = HuggingFaceStage(_model(tmp_path, "llama"), 1, 3)
    assert {name.split(".")[3] for name, _ in stage.named_parameters()} == {"1", "2"}
    assert not any(isinstance(module, nn.Embedding) for module in stage.modules())


def test_rotary_frequencies_keep_their_precision(tmp_path: Path) -> None:
    model = _model(tmp_path, "llama")
    stages = nn.ModuleList([HuggingFaceStage(model, 0, 2), HuggingFaceStage(model, 2, 4)]).to(torch.bfloat16)
    buffers = [buffer for stage in stages for buffer in stage.buffers()]
    assert buffers
    assert {buffer.dtype for buffer in buffers} == {torch.float32}
    assert {parameter.dtype for parameter in stages.parameters()} == {torch.bfloat16}


def test_a_model_with_a_loss_of_its_routers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"parallel\.pipeline: the loss of a mixtral model is more"):
        HuggingFaceStage(_model(tmp_path, "mixtral"), 0, 2)
