"""`python -m checkpoint`: look at, verify, move and tidy checkpoints without a model.

Exits with 0, with 1 if a checkpoint is damaged or distrusted, with 2 if the request cannot be carried out.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from checkpoint import access, catalog, exporting, importing, retention
from checkpoint.errors import CheckpointError, CorruptCheckpoint, UnsupportedFormat
from checkpoint.manifest import SHARED
from checkpoint.reader import Reader
from checkpoint.shard import rank_name
from checkpoint.storage import open_storage
from checkpoint.terminal import Progress, dtype_of, print_table, size_of, size_text

_NEVER = 1 << 62
"""As keep_last: nothing is ever superseded."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (CorruptCheckpoint, UnsupportedFormat) as error:
        print(f"checkpoint: {error}", file=sys.stderr)
        return 1
    except (CheckpointError, ValueError) as error:
        print(f"checkpoint: {error}", file=sys.stderr)
        return 2


def _ls(options: argparse.Namespace) -> int:
    """List what a root holds."""
    storage = open_storage(options.path)
    found = catalog.scan(storage)
    if found.is_empty:
        raise access.nothing_in(storage)
    rows: list[dict[str, Any]] = []
    for reader in found.committed:
        record = reader.record
        try:
            catalog.check(reader, "quick")
            state = "ok"
        except CorruptCheckpoint as error:
            state = "distrusted" if reader.is_distrusted() else "damaged"
            print(f"checkpoint: {error}", file=sys.stderr)
        pinned = storage.size(f"{reader.folder}/{catalog.PIN}") is not None
        rows.append(
            {"step": record.step, "committed": record.created, "ranks": record.world_size, "nbytes": record.nbytes}
            | {"state": state, "pinned": pinned, "folder": reader.folder}
        )
    for name, fault in found.broken:
        print(f"checkpoint: {fault}", file=sys.stderr)
        rows.append({"step": name.step, "state": "damaged", "folder": name.folder})
    rows += [{"step": n.step, "state": "uncommitted", "folder": n.folder} for n in found.uncommitted]
    rows += [{"step": n.step, "state": "retired", "folder": n.folder} for n in found.retired]
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        print_table(["STEP", "COMMITTED", "RANKS", "SIZE", "STATE", "FOLDER"], map(_listed, rows))
    return int(any(row["state"] in ("damaged", "distrusted") for row in rows))


def _show(options: argparse.Namespace) -> int:
    """Describe one checkpoint, its tensors, and what each rank wrote."""
    reader = access.open_reader(options.path)
    described = _describe(reader, options.names)
    if options.json:
        print(json.dumps(described, indent=1, default=repr))
        return 0
    record = reader.record
    print(f"path      {reader.url}")
    print(f"step      {record.step}")
    print(f"committed {record.created}, number {record.sequence} of its root")
    print(f"run       {record.run_id}, {record.world_size} rank{'s' if record.world_size > 1 else ''}")
    print(f"size      {size_text(record.nbytes)} in {len(record.files)} files")
    print(f"versions  {', '.join(f'{k} {v}' for k, v in record.versions.items())}")
    print(f"shared    {reader.shared!r}\n")
    ranks = [
        (w["rank"], w["slices"], size_text(w["nbytes"]), size_text(w["objects_nbytes"])) for w in described["written"]
    ]
    print_table(["RANK", "SLICES", "WROTE", "OBJECTS"], ranks)
    print()
    print_table(["TENSOR", "DTYPE", "SHAPE", "SLICES", "SIZE", "OF RANK"], map(_shown, described["tensors"]))
    return 0


def _describe(reader: Reader, names: str) -> dict[str, Any]:
    record = reader.record
    tensors = []
    for name, owner in access.select(reader, names, rank="any"):
        rows = reader.table.rows(name, owner)
        tensors.append(
            {"name": name, "dtype": rows[0].dtype, "shape": list(rows[0].global_shape), "slices": len(rows)}
            | {"nbytes": sum(row.nbytes for row in rows), "rank": None if owner == SHARED else owner}
        )
    files = {file.path: file.nbytes for file in record.files}
    slices = [row.file for row in reader.table.all_rows()]
    written = [
        {"rank": rank, "slices": slices.count(f"{rank_name(rank)}.safetensors")}
        | {"nbytes": files.get(f"{rank_name(rank)}.safetensors", 0)}
        | {"objects_nbytes": files.get(f"{rank_name(rank)}.objects.json", 0)}
        for rank in range(record.world_size)
    ]
    return {
        "path": reader.url,
        "step": record.step,
        "committed": record.created,
        "sequence": record.sequence,
        "run": record.run_id,
        "ranks": record.world_size,
        "size": record.nbytes,
        "files": files,
        "versions": dict(record.versions),
        "shared": reader.shared,
        "tensors": tensors,
        "written": written,
    }


def _listed(row: Mapping[str, Any]) -> tuple[object, ...]:
    """Return the cells of a row of `ls`."""
    state = row["state"] + (", pinned" if row.get("pinned") else "")
    size = size_text(row.get("nbytes"))
    return row["step"], row.get("committed", "-"), row.get("ranks", "-"), size, state, row["folder"]


def _shown(tensor: Mapping[str, Any]) -> tuple[object, ...]:
    """Return the cells of a tensor's row of `show`."""
    shape = "x".join(map(str, tensor["shape"])) or "scalar"
    rank = "-" if tensor["rank"] is None else tensor["rank"]
    return tensor["name"], tensor["dtype"], shape, tensor["slices"], size_text(tensor["nbytes"]), rank


def _verify(options: argparse.Namespace) -> int:
    """Verify one checkpoint."""
    begun_s = time.monotonic()
    with Progress("verified") as progress:
        report = access.verify(options.path, deep=not options.quick, progress=progress)
    took_s = time.monotonic() - begun_s
    if options.json:
        kept = {"path": report.path, "ok": report.ok, "deep": report.deep, "problems": list(report.problems)}
        print(json.dumps(kept | {"tensors": report.num_tensors, "nbytes": report.nbytes, "seconds": took_s}, indent=1))
        return int(not report.ok)
    for problem in report.problems:
        print(f"checkpoint: {problem}", file=sys.stderr)
    how = "sizes and slice table" if options.quick else "every byte"
    verdict = "ok" if report.ok else f"{len(report.problems)} problem{'s' if len(report.problems) > 1 else ''}"
    amount = f"{size_text(report.nbytes)}, {report.num_tensors} tensors, {took_s:.1f} s"
    print(f"{report.path}: {verdict} ({how}, {amount})")
    return int(not report.ok)


def _export(options: argparse.Namespace) -> int:
    """Write tensors as one safetensors file, a Hugging Face folder, or a torch DCP folder."""
    kind: exporting.Format | exporting.HuggingFace = options.format
    if kind == "huggingface":
        kind = exporting.HuggingFace(max_shard_bytes=options.max_shard, config_from=options.config_from)
    with Progress("written") as progress:
        nbytes = exporting.export(
            options.path,
            options.out,
            options.names,
            format=kind,
            dtype=options.dtype,
            rename=options.strip_prefix,
            progress=progress,
        )
    print(f"{options.out}: {size_text(nbytes)}")
    return 0


def _import(options: argparse.Namespace) -> int:
    """Add a checkpoint of another library to a root."""
    info = importing.import_from(options.source, options.root, step=options.step, trust_pickle=options.trust_pickle)
    print(f"{info.path}: {size_text(info.nbytes)}")
    return 0


def _gc(options: argparse.Namespace) -> int:
    """Remove what is abandoned or superseded; what is pinned stays."""
    if options.keep_last is not None and options.keep_last < 1:
        raise ValueError(f"--keep-last: {options.keep_last}; allowed are integers from 1")
    storage = open_storage(options.path)
    keep_last = _NEVER if options.keep_last is None else options.keep_last
    abandoned = functools.partial(retention.is_idle_since, storage, time_s=time.time() - options.idle_s)
    kept: dict[str, Any] = {"keep_last": keep_last, "keep_every": options.keep_every, "abandoned": abandoned}
    told, removals = "removed", retention.collect(storage, **kept)
    if options.dry_run:
        told, removals = "would remove", (removal for removal in retention.removable(storage, **kept))
    num_removed = 0
    with contextlib.closing(removals):  # who cannot print any more leaves no mark
        for removal in removals:
            print(f"{told} {removal}")
            num_removed += 1
    if not num_removed and catalog.scan(storage).is_empty:
        raise access.nothing_in(storage)
    return 0


def _pin(options: argparse.Namespace) -> int:
    """Keep a checkpoint from retention and gc, until it is unpinned."""
    print(f"pinned {access.pin(options.path)}")
    return 0


def _unpin(options: argparse.Namespace) -> int:
    """Leave a checkpoint to retention and gc again."""
    print(f"unpinned {access.pin(options.path, False)}")
    return 0


_ROOT = "root: a folder or an fsspec URL"
_PLACE = "a checkpoint's folder, or a root (its newest checkpoint is meant); a path or an fsspec URL"
_NAMES = "glob over the tensors' names; quote it (default: all)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m checkpoint", description=__doc__.partition("\n\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, about: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=about, description=run.__doc__)
        made.set_defaults(run=run)
        return made

    ls = command("ls", _ls, "list the checkpoints of a root")
    ls.add_argument("path", help=_ROOT)

    show = command("show", _show, "describe one checkpoint, its tensors and its ranks")
    show.add_argument("path", help=_PLACE)
    show.add_argument("--names", default="*", metavar="GLOB", help=_NAMES)

    verify = command("verify", _verify, "check a checkpoint's bytes")
    verify.add_argument("path", help=_PLACE)
    verify.add_argument("--quick", action="store_true", help="only file sizes and the slice table")
    verify.add_argument("--deep", action="store_true", help="every byte: the default")
    for each in (ls, show, verify):
        each.add_argument("--json", action="store_true", help="print JSON")

    _add_export(command("export", _export, "write tensors for other tools"))
    _add_import(command("import", _import, "add a checkpoint of another library"))
    _add_gc(command("gc", _gc, "remove abandoned and superseded attempts"))
    command("pin", _pin, "keep a checkpoint from retention").add_argument("path", help=_PLACE)
    command("unpin", _unpin, "leave it to retention again").add_argument("path", help=_PLACE)
    return parser


def _add_export(export: argparse.ArgumentParser) -> None:
    export.add_argument("path", help=_PLACE)
    export.add_argument("out", help="the file or new folder to write: a path or an fsspec URL")
    export.add_argument("--names", default="*", metavar="GLOB", help=_NAMES)
    export.add_argument(
        "--format", choices=["safetensors", "huggingface", "dcp"], default="safetensors", help="default: %(default)s"
    )
    export.add_argument("--dtype", type=dtype_of, help="convert floating-point tensors: bfloat16, float32, ...")
    export.add_argument("--strip-prefix", default="", metavar="TEXT", help="take this off the names that have it")
    export.add_argument(
        "--max-shard",
        type=size_of,
        default="5GB",
        metavar="SIZE",
        help="huggingface: of one file (default: %(default)s)",
    )
    export.add_argument("--config-from", metavar="FOLDER", help="huggingface: where config.json and the tokenizer lie")


def _add_import(importer: argparse.ArgumentParser) -> None:
    importer.add_argument(
        "source", help="a safetensors file, or a folder that Hugging Face, torch DCP or DeepSpeed (ZeRO 1-3) wrote"
    )
    importer.add_argument("root", help=_ROOT)
    importer.add_argument("--step", type=int, metavar="N", help="step of the checkpoint (default: the source's, or 0)")
    importer.add_argument("--trust-pickle", action="store_true", help="let the source run code; only if you trust it")


def _add_gc(gc: argparse.ArgumentParser) -> None:
    gc.add_argument("path", help=_ROOT)
    gc.add_argument("--keep-last", type=int, metavar="N", help="also remove all but the N newest checkpoints")
    gc.add_argument("--keep-every", type=int, default=0, metavar="N", help="but keep steps that N divides")
    gc.add_argument(
        "--idle-s",
        type=float,
        default=3600.0,
        metavar="S",
        help="uncommitted attempts untouched for this long are abandoned (default: %(default)g)",
    )
    gc.add_argument("--dry-run", action="store_true", help="only say what would be removed")


if __name__ == "__main__":
    sys.exit(main())
