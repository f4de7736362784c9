"""Saved states of any optimizer of AdamW's kind, into the tiers of a machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from offload import norms
from offload.kernels import States
from offload.machine import Machine
from offload.states import KINDS


def load(machine: Machine, parameters: Sequence[torch.Tensor], entries: Mapping[int, Mapping[str, Any]]) -> None:
    """Set all states, and parameters that have a saved master; `entries` as in a state_dict's `state`.

    Without a `master` the parameter's value is it; without an entry the parameter has made no step.
    """
    machine.settle()  # what is still on its way back would come over what is loaded
    machine.drop_prefetched()
    values: list[dict[str, torch.Tensor]] = []
    for number, parameter in enumerate(parameters):
        entry = entries.get(number, {})
        mine = norms.local(parameter).detach()
        master = entry.get("master", mine)
        machine.steps[number] = int(entry.get("step", 0))
        zeros = torch.zeros_like(mine, dtype=torch.float32)
        values.append(
            {"master": master, "exp_avg": entry.get("exp_avg", zeros), "exp_avg_sq": entry.get("exp_avg_sq", zeros)}
        )
        if "master" in entry:
            mine.copy_(norms.local(master))
    for subgroup in machine.subgroups:
        parts = {
            kind: torch.cat(
                [
                    norms.local(values[piece.parameter][kind])
                    .detach()
                    .reshape(-1)[piece.start : piece.start + piece.count]
                    .to(device=machine.device, dtype=torch.float32)
                    for piece in subgroup.pieces
                ]
            )
            for kind in KINDS
        }
        machine.store.write(subgroup.index, States(*(parts[kind] for kind in KINDS)))
