"""What a launcher orders the processes of a job that outlives its ranks to do, as JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from faulttol.recovery import Assignment, Member

Order = Mapping[str, Any]


def assign(generation: int, place: Mapping[str, Any]) -> Order:
    """Work in this generation, in this place."""
    return {"order": "assign", "generation": generation, "place": dict(place)}


def abort(generation: int) -> Order:
    """End the work of this generation."""
    return {"order": "abort", "generation": generation}


def dismiss() -> Order:
    """Leave."""
    return {"order": "dismiss"}


def obey(member: Member, order: Order) -> None:
    """Hand an order to the process that it is for; returns at once."""
    match order["order"]:
        case "assign":
            member.assign(Assignment(order["generation"], order["place"]))
        case "abort":
            member.abort(order["generation"])
        case "dismiss":
            member.dismiss()
        case other:
            raise ValueError(f"order {other!r}: none of assign, abort, dismiss")
