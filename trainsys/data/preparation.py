"""Preparing: found by key, or done once, by one process, and published whole.

The work is done in `.NAME.partial` beside the folder, under a lock, and renamed when all of it is there.
"""

from __future__ import annotations

from pathlib import Path

from faulttol.durable import sync_folder
from trainsys.config import DataConfig
from trainsys.data.disk import room
from trainsys.data.errors import PreparedError
from trainsys.data.lock import exclusive
from trainsys.data.pipeline import OnProgress, Pipeline
from trainsys.data.plan import Plan, plan_from_config, plan_from_prepared
from trainsys.data.prepared import PreparedInfo, is_prepared, read_prepared
from trainsys.data.shard import ShardFormat
from trainsys.data.tokenizer import load_tokenizer

SHARD_TOKENS = 1 << 26
_STALLED_AFTER_S = 600.0


def prepare(
    config: DataConfig,
    out_dir: Path,
    *,
    on_progress: OnProgress | None = None,
    format: ShardFormat = "arrow",
    shard_tokens: int = SHARD_TOKENS,
) -> PreparedInfo:
    """Writes the tokens of `config.path` to the folder `out_dir` and says what it holds.

    Memory is bounded by a few batches, whatever the source (but one JSONL line is held whole). Killed, it
    goes on when called again; done already, it returns at once; while another process does the same, it waits
    for that one. `on_progress` is called from this thread after every few MB of text and every finished
    shard. `shard_tokens` is the size at which shards close.

    Raises:
        DataError: what is wrong with the source, the tokenizer, the folder or the disk; see
        `trainsys.data.errors`.
    """
    prepared = _prepared_source(config)
    if prepared is None:
        plan = plan_from_config(config, format, shard_tokens)
    elif prepared.format == "arrow":
        raise PreparedError(f"{config.path}: already prepared; train on it as it is")
    else:
        plan = plan_from_prepared(prepared, format, shard_tokens)
    return _prepare(plan, out_dir, on_progress)


def ensure_prepared(config: DataConfig, cache_dir: Path, *, on_progress: OnProgress | None = None) -> Path:
    """The folder of Arrow shards for `config`: the one it names, or one found in or added to `cache_dir`.

    A source whose listing changed (sizes, modification times, entity tags) is prepared anew, beside the old
    one. Of a prepared folder, its own tokenizer and held-out split count; `config.tokenizer` may repeat it or
    stay `bytes`. Safe to call from every rank at once.

    Raises:
        DataError: as `prepare`; PreparedError for a corrupt folder.
    """
    prepared = _prepared_source(config)
    if prepared is None:
        plan = plan_from_config(config, "arrow", SHARD_TOKENS)
    elif prepared.format == "arrow":
        return prepared.path
    else:
        plan = plan_from_prepared(prepared, "arrow", SHARD_TOKENS)
    out_dir = cache_dir / plan.key[:20]
    if is_prepared(out_dir):
        return read_prepared(out_dir).path
    return _prepare(plan, out_dir, on_progress).path


def _prepared_source(config: DataConfig) -> PreparedInfo | None:
    """The prepared folder that `config.path` names, if it names one and the rest of the section agrees with
    it."""
    path = Path(config.path.removeprefix("file://")).expanduser()
    if not is_prepared(path):
        return None
    info = read_prepared(path)
    if config.validation_path:
        raise PreparedError(f"{path}: a prepared folder has its held-out split; leave data.validation_path empty")
    if config.tokenizer != "bytes" and load_tokenizer(config.tokenizer).digest != info.tokenizer().digest:
        raise PreparedError(f"{path}: prepared with another tokenizer than {config.tokenizer} (data.tokenizer)")
    return info


def _prepare(plan: Plan, out_dir: Path, on_progress: OnProgress | None) -> PreparedInfo:
    out_dir = out_dir.absolute()
    work = out_dir.parent / f".{out_dir.name}.partial"
    lock = out_dir.parent / f".{out_dir.name}.lock"
    with room(out_dir):
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(lock, stalled_after_s=_STALLED_AFTER_S, progress=lambda: _sizes(work)):
            if is_prepared(out_dir):
                return _same(plan, out_dir)
            if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
                raise PreparedError(f"{out_dir}: not empty, and not a prepared folder; name another folder")
            Pipeline(plan, work, on_progress).complete()
            work.rename(out_dir)
            sync_folder(out_dir.parent)
            return read_prepared(out_dir)


def _same(plan: Plan, out_dir: Path) -> PreparedInfo:
    info = read_prepared(out_dir)
    if info.source_key != plan.key:
        raise PreparedError(
            f"{out_dir}: already holds other tokens (of {info.source}, from other files or settings); "
            "name another folder or delete it"
        )
    return info


def _sizes(folder: Path) -> tuple[tuple[str, int], ...]:
    """Names and sizes of the files in `folder`: changes as long as somebody works there."""
    found = []
    for file in folder.rglob("*"):
        try:
            found.append((str(file), file.stat().st_size))
        except FileNotFoundError:
            continue
    return tuple(sorted(found))
