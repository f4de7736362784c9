"""Folders that DeepSpeed's `engine.save_checkpoint` wrote under ZeRO 1, 2 or 3, as the source of an import.

Every rank's file of optimizer states holds flat vectors. Under ZeRO 1 and 2 a parameter group is one vector, cut
into equal parts, one a rank: in it parameters follow each other, each with its own padding, and there is padding at
the end. Under ZeRO 3 every parameter is cut by itself into ceil(numel / ranks) elements a rank, padding on the
last; in a rank's vector of a sub-group the cuts of its parameters follow each other. These are facts of DeepSpeed
0.19.8; the package itself is not needed to read its files.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from checkpoint.errors import CheckpointNotFound, CorruptCheckpoint, UnsupportedFormat
from checkpoint.pickles import Record, load_torch, record_class
from checkpoint.region import Region, Shape
from checkpoint.stream import Contents, Stream

LATEST = "latest"
MODEL_ENDING = "_model_states.pt"

_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<model_rank>\d+)_model_states\.pt")
_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<model_rank>\d+)_?optim_states\.pt")
_CONVERTED = frozenset(
    [
        "module",
        "buffer_names",
        "optimizer",
        "param_shapes",
        "frozen_param_shapes",
        "frozen_param_fragments",
        "shared_params",
    ]
)
"""What of a file of model states becomes tensors or is not needed any more; the rest is kept as values."""
_CLASSES: Mapping[str, Any] = {
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
    **{
        name: record_class(name)
        for name in (
            "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
            "deepspeed.runtime.fp16.loss_scaler.LossScaler",
            "deepspeed.utils.tensor_fragment.fragment_address",
        )
    },
}


@dataclass(frozen=True, slots=True)
class Cut:
    """Elements [start, start + numel) of one of a rank's flat vectors."""

    rank: int
    vector: int
    start: int
    numel: int


@dataclass(frozen=True, slots=True)
class Placed:
    """Where the flat vectors hold a parameter: its elements in order."""

    name: str
    shape: Shape
    cuts: tuple[Cut, ...]


def is_model_file(name: str) -> bool:
    """Whether a file has the name of a model's states."""
    return _MODEL_FILE.fullmatch(name) is not None


def contents(source: str, *, trust_pickle: bool) -> Contents:
    """Return what a DeepSpeed folder holds, or the tag folder that its `latest` names.

    Raises CheckpointNotFound, CorruptCheckpoint, UntrustedPickle, UnsupportedFormat.
    """
    folder = _tag_folder(Path(source))
    models, optimizers = _files(folder)
    try:
        model = _Model([_load(path, trust_pickle) for path in models])
        parts = _Partitions([_load(path, trust_pickle)["optimizer_state_dict"] for path in optimizers], model)
        tensors: dict[str, torch.Tensor] = {}
        kept = {"optimizer": parts.values(), "zero_stage": parts.stage, "ranks": len(optimizers)} | model.values()
        kept = _plain(kept, "deepspeed", tensors)
        streams = [*model.streams(parts), *parts.streams(model), *(Stream.of(*item) for item in tensors.items())]
        step = int(model.first["global_steps"])
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise CorruptCheckpoint(f"{folder}: is not what DeepSpeed 0.19 writes under ZeRO ({error!r})") from error
    except CorruptCheckpoint as error:
        raise CorruptCheckpoint(f"{folder}: {error}") from error
    return Contents(step=step, streams=streams, objects={}, shared={"deepspeed": kept})


def place_groups(
    groups: Sequence[Mapping[str, Shape]], paddings: Sequence[Sequence[int]], part_numels: Sequence[int], num_ranks: int
) -> list[Placed]:
    """Return where ZeRO 1 and 2 hold each parameter. Pure.

    Args:
        groups: names and shapes of each group's parameters, in the order of its vector.
        paddings: elements after each of them.
        part_numels: of each group, how many elements of its vector a rank holds, padding included.
        num_ranks: how many ranks hold a part.
    """
    placed = []
    for vector, (shapes, pads, part) in enumerate(zip(groups, paddings, part_numels, strict=True)):
        position = 0
        for (name, shape), padding in zip(shapes.items(), pads, strict=True):
            end = position + math.prod(shape)
            cuts = []
            for rank in range(position // part, -(-end // part)) if end > position else ():
                first, last = max(position, rank * part), min(end, (rank + 1) * part)
                cuts.append(Cut(rank, vector, first - rank * part, last - first))
            placed.append(Placed(name, shape, tuple(cuts)))
            position = end + padding
        if position > part * num_ranks:
            raise CorruptCheckpoint(f"group {vector} has {part * num_ranks} elements, its parameters need {position}")
    return placed


def place_each(groups: Sequence[Mapping[str, Shape]], num_ranks: int) -> list[Placed]:
    """Return where ZeRO 3 holds each parameter, given those of each sub-group in order. Pure."""
    placed = []
    for vector, shapes in enumerate(groups):
        position = 0
        for name, shape in shapes.items():
            part = -(-math.prod(shape) // num_ranks)
            placed.append(Placed(name, shape, _cuts(math.prod(shape), [part] * num_ranks, vector, position)))
            position += part
    return placed


def _cuts(numel: int, parts: Sequence[int], vector: int, start: int) -> tuple[Cut, ...]:
    """Return the cuts of a tensor that is spread over the ranks in parts, the last of them padded."""
    cuts = []
    for rank, part in enumerate(parts):
        held = min(part, numel)
        if held:
            cuts.append(Cut(rank, vector, start, held))
        numel -= held
    if numel:
        raise CorruptCheckpoint(f"{numel} elements of a parameter are held by no rank")
    return tuple(cuts)


class _Model:
    """The files of model states: one, or under ZeRO 3 one for each rank."""

    def __init__(self, files: Sequence[Mapping[str, Any]]) -> None:
        self.first = files[0]
        self._files = files
        self.module: Mapping[str, torch.Tensor] = self.first["module"]
        self.groups: list[dict[str, Shape]] = [
            {name: tuple(shape) for name, shape in group.items()} for group in self.first["param_shapes"] or ()
        ]

    def streams(self, parts: _Partitions) -> Iterator[Stream]:
        """Yield parameters and buffers in the types that the model computes with."""
        aliases: Mapping[str, str] = self.first["shared_params"] or {}
        frozen = {n: tuple(shape) for n, shape in (self.first["frozen_param_shapes"] or {}).items()}
        for name, tensor in self.module.items():
            owner = aliases.get(name, name)
            shape = tuple(tensor.shape)
            # ZeRO 3 leaves an empty tensor in a parameter's place.
            if owner in parts.placed and shape != parts.placed[owner].shape:
                yield _stream(f"model.{name}", parts.placed[owner], parts.masters, self.module[owner].dtype)
            elif owner in frozen and shape != frozen[owner]:
                fragments = [[file["frozen_param_fragments"][owner].reshape(-1)] for file in self._files]
                cuts = _cuts(math.prod(frozen[owner]), [f[0].numel() for f in fragments], 0, 0)
                yield _stream(f"model.{name}", Placed(name, frozen[owner], cuts), fragments, tensor.dtype)
            else:
                yield Stream.of(f"model.{name}", tensor)

    def values(self) -> dict[str, Any]:
        """Return what is there beside weights: counters, schedulers, configuration, the client's state."""
        return {key: value for key, value in self.first.items() if key not in _CONVERTED and value is not None}


class _Partitions:
    """The flat vectors of all ranks, and what lies where in them."""

    def __init__(self, ranks: Sequence[Mapping[str, Any]], model: _Model) -> None:
        self._first = ranks[0]
        self.stage = int(self._first.get("zero_stage", 1))  # stage 1 with bf16 and fp32 gradients does not say
        self._has_padding = "zero_stage" not in self._first  # and saves its vectors with the padding at their end
        if self._first.get("ds_zero_partition_groups"):
            raise UnsupportedFormat("expert parallelism under ZeRO 3 cannot be imported; DeepSpeed can convert it")
        counts = self._first["partition_count"]
        count = max(counts) if isinstance(counts, list) else counts
        if count != len(ranks):
            raise CorruptCheckpoint(f"{count} ranks saved optimizer states, {len(ranks)} files of them are there")
        if self.stage == 3:
            inner = [rank["optimizer_state_dict"] for rank in ranks]
            self.masters: list[list[torch.Tensor]] = [list(rank["fp32_flat_groups"]) for rank in ranks]
            placed = place_each(model.groups, len(ranks))
        else:
            inner = [rank["base_optimizer_state"] for rank in ranks]
            self.masters = [list(rank["single_partition_of_fp32_groups"]) for rank in ranks]
            placed = place_groups(model.groups, *self._group_sizes(ranks, model), len(ranks))
        self._states = [_states(state, len(self.masters[0])) for state in inner]
        self._groups = inner[0]["param_groups"] if isinstance(inner[0], Mapping) else []
        self.placed = {p.name: p for p in placed}
        for cut in itertools.chain.from_iterable(p.cuts for p in placed):
            if cut.start + cut.numel > self.masters[cut.rank][cut.vector].numel():
                raise CorruptCheckpoint(f"the weights of rank {cut.rank} end too early")

    def _group_sizes(
        self, ranks: Sequence[Mapping[str, Any]], model: _Model
    ) -> tuple[Sequence[Sequence[int]], Sequence[int]]:
        """Return the padding after each parameter, and how many elements a rank holds, of each group."""
        sizes = {
            tuple(m.numel() + p * (not self._has_padding) for m, p in zip(masters, rank["group_paddings"], strict=True))
            for masters, rank in zip(self.masters, ranks, strict=True)
        }
        if len(sizes) != 1:
            raise CorruptCheckpoint("the ranks hold parts of different sizes")
        paddings = self._first.get("param_alignment_paddings")
        return paddings or [[0] * len(group) for group in model.groups], sizes.pop()

    def streams(self, model: _Model) -> Iterator[Stream]:
        """Yield fp32 weights, where the model's are not, and the optimizer's tensors."""
        for name, placed in self.placed.items():
            if model.module[name].dtype != torch.float32:
                yield _stream(f"optimizer.master.{name}", placed, self.masters)
            for key in self._keys(placed):
                flat = [[state.get(key) for state in states] for states in self._states]
                yield _stream(f"optimizer.{key}.{name}", placed, flat)

    def values(self) -> dict[str, Any]:
        """Return the optimizer's settings by group, and what of its state is not by element."""
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self._groups]
        rest = [
            {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in state.items() if not _is_flat(v)}
            for state in self._states[0]
        ]
        scaler = self._first.get("loss_scaler")
        return {"param_groups": groups, "state": rest, "loss_scaler": scaler}

    def _keys(self, placed: Placed) -> list[str]:
        """Return which tensors of the optimizer's state hold a parameter."""
        vectors = {cut.vector for cut in placed.cuts}
        states = [self._states[cut.rank][cut.vector] for cut in placed.cuts]
        return sorted({k for state in states for k, v in state.items() if _is_flat(v)}) if vectors else []


def _states(state: Any, num_vectors: int) -> list[Mapping[str, Any]]:
    """Return the optimizer's state for each of a rank's vectors."""
    if isinstance(state, list):  # ZeRO 1 and 2 with elastic_checkpoint
        return state
    ids = [i for group in state["param_groups"] for i in group["params"]]
    if len(ids) != num_vectors:
        raise CorruptCheckpoint(f"the optimizer has {len(ids)} states for {num_vectors} vectors")
    return [state["state"].get(i, {}) for i in ids]


def _is_flat(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 1


def _stream(
    name: str, placed: Placed, flat: Sequence[Sequence[torch.Tensor | None]], dtype: torch.dtype | None = None
) -> Stream:
    """Return a parameter's elements out of the ranks' flat vectors, as one whole tensor."""
    if dtype is None:
        sources = (flat[cut.rank][cut.vector] for cut in placed.cuts)
        dtype = next((source.dtype for source in sources if source is not None), torch.float32)
    return Stream(name, dtype, placed.shape, Region.whole(placed.shape), partial(_joined, name, placed, flat, dtype))


def _joined(
    name: str, placed: Placed, flat: Sequence[Sequence[torch.Tensor | None]], dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    for cut in placed.cuts:
        source = flat[cut.rank][cut.vector]
        if source is None or cut.start + cut.numel > source.numel():
            raise CorruptCheckpoint(f"{name!r}: rank {cut.rank} holds too few elements of it")
        yield source[cut.start : cut.start + cut.numel].to(dtype)


def _tag_folder(folder: Path) -> Path:
    """Return the folder with the files: this one, or the one in it that `latest` names."""
    latest = folder / LATEST
    if not latest.is_file():
        return folder
    tag = latest.read_text().strip()
    if not tag or Path(tag).name != tag or not (folder / tag).is_dir():
        raise CheckpointNotFound(f"{latest}: names {tag!r}, which is no folder beside it; name the tag's own folder")
    return folder / tag


def _files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the files of model states and of optimizer states, by rank."""
    found: dict[re.Pattern[str], dict[int, Path]] = {_MODEL_FILE: {}, _OPTIMIZER_FILE: {}}
    for path in folder.glob("*_states.pt"):
        for pattern, by_rank in found.items():
            match = pattern.fullmatch(path.name)
            if match and int(match["model_rank"]):
                raise UnsupportedFormat(f"{folder}: is spread by tensor parallelism; only data parallelism is imported")
            if match:
                by_rank[int(match["rank"] or 0)] = path
                break
        else:
            raise UnsupportedFormat(f"{path}: is of no kind that is imported (experts, pipeline stages?)")
    if (folder / "offloaded_tensors").exists():
        raise UnsupportedFormat(f"{folder}: optimizer states were on NVMe, in DeepSpeed's own files; not imported")
    models, optimizers = ([by_rank[rank] for rank in sorted(by_rank)] for by_rank in found.values())
    if not models or not optimizers:
        what = "optimizer" if models else "model"
        raise CheckpointNotFound(f"{folder}: holds no {what} states of ZeRO 1, 2 or 3")
    return models, optimizers


def _load(path: Path, trust: bool) -> Any:
    with path.open("rb") as file:
        if file.read(1) == b"{":
            raise UnsupportedFormat(
                f"{path}: was saved through checkpoint.deepspeed_engine: it is part of a checkpoint of this package"
            )
    return load_torch(path, str(path), _CLASSES, trust=trust)


def _plain(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return a value without other libraries' classes; tensors go into `tensors`, and their names stay."""
    if isinstance(value, torch.Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, Record):
        value = {"class": type(value).__name__} | vars(value)
    if isinstance(value, Mapping):
        return {k: _plain(v, f"{path}.{k}", tensors) for k, v in value.items()}
    if isinstance(value, list | tuple):
        kind = tuple if type(value) is tuple else list
        return kind(_plain(v, f"{path}.{i}", tensors) for i, v in enumerate(value))
    return str(value) if isinstance(value, torch.dtype | torch.device) else value
