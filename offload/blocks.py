"""What every tier says of blocks, and asks of the tensors that go into them."""

from __future__ import annotations

import torch

from offload.errors import BlockError
from offload.tier import Block, TierSpec


def what(block: Block) -> str:
    """Return the block in words."""
    return f"a block of {block.num_bytes} bytes{of(block)}"


def of(block: Block) -> str:
    """Return whose it is, in words, where that is known."""
    return f" of {block.owner}" if block.owner else ""


def new_block(spec: TierSpec, num_bytes: int, owner: str) -> Block:
    """Return a block of a tier, which has still to give it a place.

    Raises:
        BlockError: it would be empty.
    """
    block = Block(spec.name, num_bytes, owner)
    if num_bytes < 1:
        raise BlockError(f"tier {spec.label}: {what(block)}; at least 1 byte is needed")
    return block


def unknown(spec: TierSpec, block: Block) -> BlockError:
    """Return the error about a block that is none of the tier's."""
    return BlockError(
        f"tier {spec.label}: {what(block)} (of tier {block.tier_name}) is not, or no longer, one of its blocks"
    )


def flat_bytes(spec: TierSpec, block: Block, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor for a block as flat bytes that share its memory.

    Raises:
        BlockError: it is not on the CPU, not contiguous, or not of the block's size.
    """
    problem = (
        f"on {tensor.device}, not on the CPU"
        if tensor.device.type != "cpu"
        else "not contiguous"
        if not tensor.is_contiguous()
        else f"of {tensor.nbytes} bytes"
        if tensor.nbytes != block.num_bytes
        else ""
    )
    if problem:
        raise BlockError(
            f"tier {spec.label}: a tensor {problem}; a contiguous CPU tensor of the block's "
            f"{block.num_bytes} bytes{of(block)} is needed"
        )
    return tensor.detach().reshape(-1).view(torch.uint8)
