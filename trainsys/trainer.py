"""The training loop: data, step, evaluation, checkpoint, metrics, composed."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

import checkpoint as ck
import faulttol
from faulttol.config import CorruptionConfig
from launch import RankContext
from parallel import hybrid
from trainsys import data, elastic, meter, metrics, models, offloading, recipe, schedule, setup, snapshot
from trainsys.check import accumulation_steps, check, data_ranks, num_ranks
from trainsys.config import RunConfig
from trainsys.corruption import Inspector
from trainsys.distrust import heed
from trainsys.drill import Drill
from trainsys.engines import DTYPES, Engine, open_engine
from trainsys.export import export_model, sample_text
from trainsys.folder import RunFolder
from trainsys.hostmemory import HostMemory
from trainsys.metrics import Metrics
from trainsys.optim import build_optimizer, plan_of
from trainsys.preemption import watched
from trainsys.saving import Saver
from trainsys.snapshot import Place
from trainsys.step import StepStats, agree, evaluate, train_step

if TYPE_CHECKING:
    from trainsys.rl.run import Summary as PolicySummary


@dataclass(frozen=True, slots=True)
class Summary:
    """How a run ended."""

    outcome: str
    """`completed`, or `stopped` as asked with steps left."""
    step: int
    loss: float
    """Of the last step; not a number if none was made."""
    validation_loss: float
    """Of the last evaluation; not a number if none was made."""
    unigram_entropy: float
    """Nats per token of a model that only counts tokens: what both losses are read against."""


def run_rank(context: RankContext, payload: Mapping[str, Any]) -> dict[str, Any] | None:
    """Train on this rank and return its Summary as JSON; the entry of every launcher, see `session.rank_payload`.

    None for a spare that was not needed.
    """
    recipe_config = recipe.from_tree(payload["config"])
    if os.path.isdir(payload["cwd"]):  # relative paths of a recipe mean the same here as where it was launched
        os.chdir(payload["cwd"])
    folder = RunFolder(Path(payload["folder"]))
    if recipe_config.faulttol.mode == "act":
        elastic.warm_up(recipe_config, folder)

    def work() -> dict[str, Any]:
        is_again = context.generation > payload["first_generation"]
        config = elastic.with_ranks(recipe_config, context.env.world_size) if is_again else recipe_config
        check(folder.as_begun(config), world_size=context.env.world_size)
        resume = payload["resume"] or is_again
        with elastic.recorded(config, folder, context):
            summary = train(context, config, lambda: folder, resume=resume, threads=payload["threads"])
        return dataclasses.asdict(summary)

    return context.run(work)


def train(
    context: RankContext,
    config: RunConfig,
    choose_folder: Callable[[], RunFolder],
    *,
    resume: bool,
    threads: int,
) -> Summary | PolicySummary:
    """Train on this rank of a checked `config`; every rank calls it, rank 0 alone calls `choose_folder`."""
    torch.set_num_threads(threads)
    if config.rl.tasks:
        from trainsys.rl.run import train_policy

        if not config.rl.sharing.external:
            return train_policy(context, config, choose_folder, resume=resume)
        from trainsys.rl.peers import joining

        node, join = config.rl.sharing.node, joining(config)
        return train_policy(context, config, choose_folder, resume=resume, node=node, join=join)
    shared = setup.build(config, choose_folder, context)
    if config.faulttol.mode == "act":
        elastic.check_links(shared)
    with Trainer(shared, resume=resume) as trainer:
        return trainer.run()


class Trainer:
    """One rank of a run, from its start or its newest checkpoint to its end."""

    def __init__(self, shared: setup.Setup, *, resume: bool) -> None:
        """Build model, engine, data and checkpointer; with `resume` continue from the newest checkpoint, if any."""
        config = shared.config
        self._shared, self._config = shared, config
        self._dtype = DTYPES[config.engine.precision]
        self._fence = elastic.fence_of(config, shared.folder, shared.context.generation)
        self._links = elastic.answering(config, shared.folder, shared.context)
        self._drill = Drill(shared.folder, shared.rank) if config.faulttol.drill else None
        self._validation = (0, float("nan"))
        self._resumed_from = ""
        self._is_complete = False
        with contextlib.ExitStack() as stack:
            self._build(stack, resume)
            self._closing = stack.pop_all()

    def _build(self, stack: contextlib.ExitStack, resume: bool) -> None:
        config, shared = self._config, self._shared
        shared.context.heartbeat.beat(step=0, phase="build")
        snapshot.seed_generators(config.seed, shared.seed_index)
        self._engine = self._open_engine(stack)
        stack.callback(self._engine.close)
        self._dataset = data.TokenDataset(shared.prepared.path, "train", config.data.sequence_length)
        self._order = data.Order(len(self._dataset), config.seed)
        self._loader = self._open_loader()
        stack.callback(self._loader.close)
        if self._drill is not None:
            stack.callback(self._drill.close)
        memory = HostMemory(shared) if config.checkpoint.memory.every else None
        if memory is not None:  # ends after the checkpointer, which is still to be opened
            stack.callback(lambda: memory.end() if self._is_complete else memory.storage.close())
        self._checkpointer = ck.Checkpointer(
            shared.folder.checkpoints,
            config=config.checkpoint,
            rank=shared.rank,
            world_size=num_ranks(config.parallel),
            run_id=shared.launch_id,
            memory=memory.storage if memory else None,
        )
        # Of a rank that is lost the votes never come: recovery must not wait for saves under way.
        lost = ck.SaveFailed("given up: the job lost a rank, and goes on from the checkpoint before")
        stack.enter_context(shared.context.releasing(lambda: self._checkpointer.cancel(lost)))
        if self._fence is not None:
            self._checkpointer.admit_with(self._fence.check)  # which holds on to nothing else
        stack.enter_context(self._checkpointer)
        self._place = Place(step=0, data=data.DataPosition.of(self._dataset, self._order, 0), tokens_seen=0)
        if resume:
            self._resume()
        self._metrics = self._open_metrics()
        stack.callback(self._metrics.close)
        self._inspector: Inspector | None = None
        if config.faulttol.corruption != CorruptionConfig():
            self._inspector = Inspector(
                self._engine,
                shared,
                right_step=self._place.step,
                drill=self._drill,
                say=self._metrics.say,
                admit=self._admit,
            )
            stack.callback(self._inspector.close)
        self._saver = Saver(
            self._checkpointer,
            self._engine,
            self._metrics.write,
            control=shared.control,
            lasting=("local", "remote") if config.checkpoint.remote.url else ("local",),
            saved_step=0 if self._resumed_from == "memory" else self._place.step,
        )
        stack.enter_context(watched(shared.context.stop_requested, self._saver.preempt))
        if self._drill is not None:
            self._drill.connect()
        self._phases = meter.Phases(shared.device)
        self._throughput = meter.Throughput(config.steps)
        self._utilisation = meter.Utilisation(shared.device, self._dtype, config.metrics.peak_flops_per_s)

    def __enter__(self) -> Trainer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for pending saves (after an error only briefly), flush metrics, release the engine."""
        self._closing.__exit__(kind, error, trace)

    def run(self) -> Summary:
        """Train to the last step or until any rank is asked to stop; either way all is saved when this returns."""
        self._greet()
        stats: StepStats | None = None
        stopped = False
        self._throughput.mark(0)
        with self._profile() as step_done:
            while self._place.step < self._config.steps:
                self._beat("data")
                if self._drill is not None:
                    self._drill.at(self._place.step + 1)
                batch = self._loader.step(self._place.data.position)
                stop = self._shared.context.stop_requested()
                probe = self._links is not None and self._links.is_asked()
                agreed = agree(self._shared.control, batch.num_targets, stop, probe=probe, tells=self._shared.counts)
                stopped = agreed.stop
                if stopped:
                    break
                if agreed.probe:
                    self._probe()
                stats = self._train(batch, agreed.num_targets)
                step_done()
                if _due(self._place.step, self._config.evaluation.every):
                    self._evaluate()
                self._beat("save")
                self._saver.after_step(self._place)
        self._beat("save")
        faulttol.mark_phase("save")
        self._saver.finish(self._place)
        if stopped:
            self._metrics.say(f"stopped after step {self._place.step} as asked; --resume continues from there")
        else:
            self._finish()
            self._is_complete = True
        return Summary(
            outcome="stopped" if stopped else "completed",
            step=self._place.step,
            loss=stats.loss if stats else float("nan"),
            validation_loss=self._validation[1],
            unigram_entropy=self._shared.prepared.unigram_entropy,
        )

    def _train(self, batch: data.StepBatch, targets: int) -> StepStats:
        config, step = self._config, self._place.step + 1
        self._beat("train", step)
        faulttol.mark_step(step, tokens=batch.num_targets)
        inspector = self._inspector
        if inspector is not None:
            inspector.begin(step)
        factor = schedule.factor(config.schedule, step, config.steps)
        stats = train_step(
            self._engine,
            batch,
            total_targets=targets,
            data_ranks=data_ranks(config.parallel),
            lr=(factor, factor * config.optim.lr),
            control=self._shared.control,
            phases=self._phases,
            inspect=inspector.before_update if inspector is not None else lambda: None,
        )
        self._place = Place(
            step=step,
            data=replace(self._place.data, position=self._place.data.position + config.batch.global_sequences),
            tokens_seen=self._place.tokens_seen + targets,
        )
        faulttol.mark_step_end(loss=stats.loss, grad_norm=inspector.take_norm() if inspector is not None else None)
        self._throughput.mark(targets)
        if _due(step, config.metrics.every) or step == config.steps:
            seen = offloading.seen(self._engine)
            self._metrics.write(step, {**metrics.train_record(stats, self._pace()), **seen})
        return stats

    def _probe(self) -> None:
        """Measure the links between the ranks, as whoever watches them has asked for."""
        self._beat("probe")
        faulttol.mark_phase("probe")
        started = time.perf_counter()
        assert self._links is not None
        self._links.probe(self._place.step + 1, device=self._shared.device.type)
        self._throughput.skip(time.perf_counter() - started)

    def _evaluate(self) -> None:
        if not self._config.evaluation.sequences:
            return
        self._beat("evaluate")
        faulttol.mark_phase("evaluate")
        started = time.perf_counter()
        validation = data.ValidationSet(
            data.TokenDataset(self._shared.prepared.path, "validation", self._config.data.sequence_length),
            sequences=self._config.evaluation.sequences,
            micro_sequences=self._config.batch.micro_sequences,
            data_rank=self._shared.mesh.data_rank(self._shared.rank),
            data_ranks=data_ranks(self._config.parallel),
            document_mask=self._config.data.document_mask,
        )
        loss, tokens = evaluate(self._engine, validation, self._shared.control, tells=self._shared.counts)
        self._validation = (self._place.step, loss)
        seconds = time.perf_counter() - started
        self._throughput.skip(seconds)
        self._metrics.write(self._place.step, metrics.validation_record(loss, tokens, seconds))

    def _resume(self) -> None:
        shared = self._shared
        shared.context.heartbeat.beat(step=0, phase="load")

        def heed_distrust() -> None:
            self._admit()
            heed(shared.folder, self._checkpointer)

        setup.all_or_none(heed_distrust if shared.rank == 0 else lambda: None, control=shared.control)
        found = snapshot.load_newest(self._checkpointer, self._engine, self._dataset, self._order, self._shared.control)
        if found is not None:
            self._place, self._resumed_from = found[0], found[1].info.tier

    def _finish(self) -> None:
        """Evaluate, write the model folder and show a sample of what it says."""
        if self._validation[0] < self._place.step:
            self._evaluate()
        self._beat("export")
        faulttol.mark_phase("export")
        setup.all_or_none(self._export if self._shared.rank == 0 else lambda: None, self._shared.control)

    def _export(self) -> None:
        config, shared = self._config, self._shared
        entropy = shared.prepared.unigram_entropy
        loss = f"validation loss {self._validation[1]:.4f} nats/token" if self._validation[0] else "not validated"
        self._metrics.say(
            f"done: {self._place.step} steps, {self._place.tokens_seen:,} tokens; {loss} "
            f"(counting tokens alone: {entropy:.4f})"
        )
        info = self._checkpointer.latest()
        assert info is not None, "the last step was saved and waited for"
        self._admit()
        export_model(config, info, shared.prepared, shared.folder.model)
        self._metrics.say(f"model: {shared.folder.model}")
        if config.evaluation.sample_tokens:
            text = sample_text(shared.folder.model, shared.tokenizer, config.evaluation, config.seed)
            self._metrics.say(f"sample:\n{text}")

    def _open_engine(self, stack: contextlib.ExitStack) -> Engine:
        """Build the model, which is whole and the same on every rank, and train this rank's part of it."""
        config, shared = self._config, self._shared
        # Where it can be, the model has no memory until it is cut.
        with torch.device("meta") if config.model.kind == "decoder" else contextlib.nullcontext():
            model = models.build(
                config.model,
                vocab_size=shared.prepared.vocab_size,
                max_positions=config.data.sequence_length,
                recompute=offloading.recompute_of(config),
                seed=config.seed,
            )
        self._parameters = models.num_parameters(model)
        self._flops_per_token = models.flops_per_token(model, config.data.sequence_length)
        plan = plan_of(model, config.optim)
        part = hybrid.apply(
            model,
            shared.groups,
            models.Anatomy(config.data.sequence_length),
            num_micro_batches=accumulation_steps(config),
            place=self._materialise,
            timeout_s=config.engine.timeout_s,
        )
        stack.callback(part.close)
        if config.engine.compile:
            models.compile_parts(part.module)
        stack.enter_context(offloading.swapping(config, part.module, shared.device))
        with shared.context.making_groups():
            return open_engine(part, config, lambda module: build_optimizer(module, config.optim, plan))

    def _materialise(self, part: torch.nn.Module) -> torch.nn.Module:
        """Bring this rank's part of the model to its device, with its weights."""
        device, dtype = offloading.home_of(self._config, self._shared.device), self._dtype
        if not next(part.parameters()).is_meta:
            return part.to(device=device, dtype=dtype)
        return models.materialise(part, device, dtype, self._config.seed)

    def _open_loader(self) -> data.BatchLoader:
        config, shared = self._config, self._shared
        return data.BatchLoader(
            self._dataset,
            self._order,
            global_sequences=config.batch.global_sequences,
            micro_sequences=config.batch.micro_sequences,
            data_rank=shared.mesh.data_rank(shared.rank),
            data_ranks=data_ranks(config.parallel),
            document_mask=config.data.document_mask,
        )

    def _open_metrics(self) -> Metrics:
        if self._shared.rank != 0:
            return Metrics([])
        self._admit()  # what it drops from the file may be a later generation's
        return metrics.open_metrics(
            self._config,
            self._shared.folder.path,
            self._shared.run_id,
            recipe.to_tree(self._config),
            after_step=self._place.step,
            stream=sys.stdout,
            admit=self._admit,
        )

    def _admit(self) -> None:
        """Return if this process may write. Raises: Fenced where its generation is over."""
        if self._fence is not None:
            self._fence.check()

    def _greet(self) -> None:
        config, prepared, peak = self._config, self._shared.prepared, self._utilisation.peak
        place = self._place.step
        start = f"resumes after step {place} (from the {self._resumed_from} tier)" if place else "starts"
        self._metrics.say(
            f"{config.name} {start}: {self._parameters:,} parameters in {self._shared.precision}, "
            f"ZeRO {config.engine.zero_stage}, {num_ranks(config.parallel)} rank(s) on {self._shared.device.type}, "
            f"{prepared.train.tokens:,} tokens of {prepared.source}; folder {self._shared.folder.path}"
        )
        self._metrics.say(
            f"counting tokens alone reaches {prepared.unigram_entropy:.4f} nats/token (unigram entropy); peak "
            f"{peak.flops_per_s / 1e9:,.0f} GFLOP/s per rank ({peak.how})"
        )
        if self._shared.precision.warning:
            self._metrics.say(self._shared.precision.warning)

    def _pace(self) -> metrics.Pace:
        rate = self._throughput.tokens_per_s
        return metrics.Pace(
            tokens_seen=self._place.tokens_seen,
            tokens_per_s=rate,
            mfu=self._utilisation.of(rate * self._flops_per_token / num_ranks(self._config.parallel)),
            eta_s=self._throughput.eta_s(self._place.step),
            data_wait_s=self._loader.wait_s,
            memory_bytes=meter.memory_peak_bytes(self._shared.device),
        )

    def _beat(self, phase: str, step: int | None = None) -> None:
        self._shared.context.heartbeat.beat(step=self._place.step if step is None else step, phase=phase)

    @contextlib.contextmanager
    def _profile(self) -> Iterator[Callable[[], None]]:
        """Yield what to call after every step; records the window that `profile` asks for."""
        window = self._config.profile
        if not window.start_step or self._place.step >= window.start_step + window.num_steps - 1:
            yield lambda: None
            return
        skipped = max(0, window.start_step - 1 - self._place.step)
        active = window.start_step + window.num_steps - 1 - self._place.step - skipped
        target = self._shared.folder.profile / f"rank{self._shared.rank}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        with torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=skipped, warmup=0, active=active, repeat=1),
            on_trace_ready=lambda profile: profile.export_chrome_trace(str(target)),
        ) as profile:
            yield profile.step
        offloading.write_trace(self._engine, target.with_suffix(".offload.json"))


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
