"""`python -m checkpoint`: look at, verify, export and tidy checkpoints without a model.

Exits with 0, with 1 if a checkpoint is damaged, with 2 if the request cannot be carried out.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence

from checkpoint import access, catalog, exporting
from checkpoint.errors import CheckpointError, CheckpointNotFound, CorruptCheckpoint, UnsupportedFormat
from checkpoint.manifest import SHARED
from checkpoint.storage import open_storage

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
    if not (found.committed or found.broken or found.uncommitted):
        raise CheckpointNotFound(f"{options.path}: holds no checkpoint")
    rows = [("STEP", "COMMITTED", "RANKS", "SIZE", "STATE", "FOLDER")]
    damaged = bool(found.broken)
    for reader in found.committed:
        record = reader.record
        try:
            catalog.check(reader, "quick")
            state = "ok"
        except CorruptCheckpoint as error:
            state, damaged = "damaged", True
            print(f"checkpoint: {error}", file=sys.stderr)
        size = _size(record.nbytes)
        rows.append((str(record.step), record.created, str(record.world_size), size, state, reader.folder))
    for name, fault in found.broken:
        print(f"checkpoint: {fault}", file=sys.stderr)
        rows.append((str(name.step), "?", "?", "?", "damaged", name.folder))
    rows += [(str(name.step), "-", "-", "-", "uncommitted", name.folder) for name in found.uncommitted]
    _table(rows)
    return int(damaged)


def _show(options: argparse.Namespace) -> int:
    """Describe one checkpoint and its tensors."""
    reader = access.open_reader(options.path)
    record = reader.record
    chosen = access.select(reader, options.names, rank="any")
    print(f"path      {reader.url}")
    print(f"step      {record.step}")
    print(f"committed {record.created}, number {record.sequence} of its root")
    print(f"run       {record.run_id}, {record.world_size} rank{'s' if record.world_size > 1 else ''}")
    print(f"size      {_size(record.nbytes)} in {len(record.files)} files")
    print(f"versions  {', '.join(f'{k} {v}' for k, v in record.versions.items())}")
    print(f"shared    {reader.shared!r}\n")
    rows = [("TENSOR", "DTYPE", "SHAPE", "SLICES", "SIZE", "OF RANK")]
    for name, owner in chosen:
        slices = reader.table.rows(name, owner)
        size = _size(sum(row.nbytes for row in slices))
        shape = "x".join(map(str, slices[0].global_shape)) or "scalar"
        who = "-" if owner == SHARED else str(owner)
        rows.append((name, slices[0].dtype, shape, str(len(slices)), size, who))
    _table(rows)
    return 0


def _verify(options: argparse.Namespace) -> int:
    """Verify one checkpoint."""
    begun_s = time.monotonic()
    report = access.verify(options.path, deep=not options.quick)
    took_s = time.monotonic() - begun_s
    for problem in report.problems:
        print(f"checkpoint: {problem}", file=sys.stderr)
    how = "sizes and slice table" if options.quick else "every byte"
    verdict = "ok" if report.ok else f"{len(report.problems)} problem{'s' if len(report.problems) > 1 else ''}"
    amount = f"{_size(report.nbytes)}, {report.num_tensors} tensors, {took_s:.1f} s"
    print(f"{report.path}: {verdict} ({how}, {amount})")
    return int(not report.ok)


def _export(options: argparse.Namespace) -> int:
    """Write tensors into one safetensors file."""
    nbytes = exporting.export(options.path, options.out, options.names)
    print(f"{options.out}: {_size(nbytes)}")
    return 0


def _gc(options: argparse.Namespace) -> int:
    """Remove what is abandoned or superseded."""
    if options.keep_last is not None and options.keep_last < 1:
        raise ValueError(f"--keep-last: {options.keep_last}; allowed are integers from 1")
    storage = open_storage(options.path)
    before_s = time.time() - options.idle_s
    folders = catalog.removable(
        storage,
        keep_last=_NEVER if options.keep_last is None else options.keep_last,
        keep_every=options.keep_every,
        abandoned=lambda name: catalog.is_idle_since(storage, name, before_s),
    )
    for folder in folders:
        if not options.dry_run:
            catalog.remove(storage, folder)
        print(f"{'would remove' if options.dry_run else 'removed'} {folder}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m checkpoint", description=__doc__.partition("\n\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    ls = commands.add_parser("ls", help="list the checkpoints of a root", description=_ls.__doc__)
    ls.add_argument("path", help="root: a folder or an fsspec URL")
    ls.set_defaults(run=_ls)

    place = "a checkpoint's folder, or a root (its newest checkpoint is meant); a path or an fsspec URL"
    names = "glob over the tensors' names; quote it (default: all)"

    show = commands.add_parser("show", help="describe one checkpoint and its tensors", description=_show.__doc__)
    show.add_argument("path", help=place)
    show.add_argument("--names", default="*", metavar="GLOB", help=names)
    show.set_defaults(run=_show)

    verify = commands.add_parser("verify", help="check a checkpoint's bytes", description=_verify.__doc__)
    verify.add_argument("path", help=place)
    verify.add_argument("--quick", action="store_true", help="only file sizes and the slice table")
    verify.set_defaults(run=_verify)

    export = commands.add_parser("export", help="write one safetensors file", description=_export.__doc__)
    export.add_argument("path", help=place)
    export.add_argument("out", help="the file to write: a path or an fsspec URL")
    export.add_argument("--names", default="*", metavar="GLOB", help=names)
    export.set_defaults(run=_export)

    gc = commands.add_parser("gc", help="remove abandoned and superseded attempts", description=_gc.__doc__)
    gc.add_argument("path", help="root: a folder or an fsspec URL")
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
    gc.set_defaults(run=_gc)
    return parser


def _table(rows: Iterable[tuple[str, ...]]) -> None:
    """Print rows with aligned columns."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _size(nbytes: int) -> str:
    if nbytes < 1024:
        return f"{nbytes} B"
    value = nbytes / 1024
    for unit in ("KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


if __name__ == "__main__":
    sys.exit(main())
