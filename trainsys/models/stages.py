"""How models are taken apart for parallel.hybrid: stages whose parameters are named as in the whole."""

# Shapes: B batch, T tokens of this rank, D model width.

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from parallel.pipeline import Layer
from parallel.pipeline.runtime import Inputs
from trainsys.errors import ConfigError
from trainsys.models.attention import Core, rotation
from trainsys.models.context import share_sequences
from trainsys.models.decoder import Block, Decoder
from trainsys.models.huggingface import HuggingFaceModel, blocks_of
from trainsys.models.huggingface_stages import HuggingFaceStage
from trainsys.models.moe import MoE


class Anatomy:
    """A parallel.hybrid.Anatomy of the models of this package."""

    def __init__(self, sequence_length: int) -> None:
        """`sequence_length` is what layers are told to cost for."""
        self._length = sequence_length

    def share_sequences(self, model: nn.Module, core: Core) -> None:
        """Let all attention layers attend by `core`."""
        share_sequences(model, core)

    def layers(self, model: nn.Module) -> tuple[Sequence[Layer], Layer, Layer]:
        """Return the costs of the blocks, the embedding and the head; times are operations per token."""
        if isinstance(model, HuggingFaceModel):
            text = model.config.get_text_config()
            heads = text.num_attention_heads
            width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
            layers, weight = blocks_of(model), model.causal_lm.lm_head.weight
        else:
            decoder = _decoder(model)
            width = decoder.config.num_heads * decoder.config.head_dim
            layers, weight = list(decoder.blocks), decoder.head.weight
        attention = 6 * self._length * width  # causal scores and mixing, forward and back
        blocks = [Layer(time=attention + 6 * _used(block), state_bytes=16 * _numel(block)) for block in layers]
        # A tied head is a copy on the last stage. Looking rows up costs next to nothing.
        return blocks, Layer(time=0.0, state_bytes=16 * weight.numel()), Layer(time=6.0 * weight.numel())

    def stage(self, model: nn.Module, first: int, end: int) -> nn.Module:
        """Return blocks [first, end) as a stage."""
        if isinstance(model, HuggingFaceModel):
            return HuggingFaceStage(model, first, end)
        return Stage(_decoder(model), first, end)

    def stream(self, stages: Sequence[nn.Module], inputs: Inputs, num_ranks: int) -> Tensor:
        """Return an uninitialised tensor like the residual stream between stages."""
        tokens_BT, stage = inputs["tokens_BT"], stages[0]
        assert tokens_BT is not None
        if isinstance(stage, HuggingFaceStage):
            if num_ranks > 1:  # masks are made for as many tokens as there are hidden states
                raise ConfigError(
                    ["config: parallel.sequence: not in pipelines of Hugging Face models; allowed: false"]
                )
            dim = stage.config.get_text_config().hidden_size
        else:
            assert isinstance(stage, Stage)
            dim = stage.config.dim
        return next(stage.parameters()).new_empty(tokens_BT.shape[0], tokens_BT.shape[1] // num_ranks, dim)


def _decoder(model: nn.Module) -> Decoder:
    if isinstance(model, Decoder):
        return model
    raise ConfigError([f"config: parallel.pipeline: {type(model).__name__} has no stages; allowed: 1"])


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _used(block: nn.Module) -> float:
    """Return the parameters of a block that a token meets: of the experts those it is sent to."""
    unused = sum(
        _numel(layer.experts) * (1 - layer.routing.top_k / layer.routing.num_experts)
        for layer in block.modules()
        if isinstance(layer, MoE)
    )
    return _numel(block) - unused


class Stage(nn.Module):
    """Blocks `first` to `end` of a decoder, whose modules it takes over; the embedding and the head go with the ends.

    Where the head is tied to the embedding, the last stage has the embedding's module too, for its name alone.
    """

    def __init__(self, model: Decoder, first: int, end: int) -> None:
        super().__init__()
        config, num_layers = model.config, len(model.blocks)
        self.config = config
        self.is_first, self.is_last = first == 0, end == num_layers
        if self.is_first or (self.is_last and config.tied_head):
            self.embedding = model.embedding
        self.blocks = nn.ModuleDict({str(layer): model.blocks[layer] for layer in range(first, end)})
        if self.is_last:
            self.norm, self.head = model.norm, model.head

    def forward(
        self,
        x: Tensor,
        aux: Tensor | None,
        *,
        positions_BT: Tensor,
        document_ids_BT: Tensor | None = None,
        targets_BT: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """From tokens [B, T] or the residual stream to the residual stream, logits, or the summed loss of targets.

        The auxiliary loss is added to `aux`, which is None for the first stage. Positions are given, as the stream
        may be shared along the sequence.
        """
        x_BTD = self.embedding(x) if self.is_first else x
        cos, sin = rotation(positions_BT, self.config.head_dim, self.config.rope_theta, x_BTD.dtype)
        blocks = [block for block in self.blocks.values() if isinstance(block, Block)]
        plan = blocks[0].attention.core.prepare(document_ids_BT, positions_BT, x_BTD)
        if aux is None:
            aux = x_BTD.new_zeros((), dtype=torch.promote_types(x_BTD.dtype, torch.float32))
        for block in blocks:
            x_BTD, more = block(x_BTD, cos, sin, plan)
            aux = aux + more
        return (self.head(self.norm(x_BTD), targets_BT) if self.is_last else x_BTD), aux
