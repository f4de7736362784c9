"""One run, fully described: the sections of a recipe, composed.

Loading, overriding and checking live in `trainsys.recipe`; this file only says what there is to set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from checkpoint.config import CheckpointConfig
from faulttol.config import FaultTolConfig
from launch.config import LaunchConfig
from offload.config import OffloadConfig
from parallel.config import ParallelConfig
from trainsys.rl.config import RLConfig

_STRICT: Mapping[str, Any] = {"extra": "forbid", "strict": True}


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig:
    """Mixture of experts in place of the dense feed-forward; `num_experts = 0` is the dense decoder."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT

    num_experts: int = 0
    """Routed experts per layer; 0 keeps every layer dense."""
    top_k: int = 2
    """Routed experts a token visits; 1 to num_experts."""
    num_shared_experts: int = 0
    """Experts every token visits."""
    ffn_dim: int = 0
    """Hidden width of one expert; 0 takes model.ffn_dim."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """`softmax` over all experts, or a `sigmoid` each (DeepSeek-V3, arXiv 2412.19437); the chosen are normalised."""
    routed_scaling: float = 1.0
    """What the weights of a token's routed experts sum to."""
    num_groups: int = 1
    """Groups of consecutive experts, those of one node; divides num_experts."""
    top_groups: int = 1
    """Groups that a token's experts may lie in (node-limited routing); 1 to num_groups."""
    capacity_factor: float = 0.0
    """An expert takes at most this many times its even share of a micro-batch; 0 drops no token."""
    balance: Literal["loss", "bias", "none"] = "loss"
    """`loss` adds the load-balancing loss; `bias` moves a bias that counts in the choice alone (arXiv 2408.15664)."""
    balance_weight: float = 0.01
    """balance=loss: weight of that loss (Switch Transformer, arXiv 2101.03961, eq. 4); 0 turns it off."""
    bias_rate: float = 0.001
    """balance=bias: by how much a step moves a bias."""
    z_weight: float = 0.0
    """Weight of the router's z-loss (ST-MoE, arXiv 2202.08906, eq. 5); 0 turns it off."""
    first_dense_layers: int = 0
    """Leading layers that stay dense."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The model to train: the built-in decoder, or a Hugging Face causal LM folder."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT

    kind: Literal["decoder", "hf"] = "decoder"
    """`decoder`: built in, sizes below; `hf`: the causal LM in `path` (extra `hf`), sizes from its config.json."""
    path: str = ""
    """kind=hf: folder with config.json and, for continued training, safetensors weights."""
    num_layers: int = 6
    """kind=decoder: transformer blocks."""
    dim: int = 384
    """kind=decoder: width of the residual stream; a multiple of 2 x num_heads unless head_dim is set."""
    num_heads: int = 6
    """kind=decoder: query heads."""
    num_kv_heads: int = 0
    """kind=decoder: key/value heads; divides num_heads; 0 takes num_heads."""
    head_dim: int = 0
    """kind=decoder: width of one head, even; 0 takes dim / num_heads."""
    ffn_dim: int = 0
    """kind=decoder: hidden width of SwiGLU; 0 takes 8/3 dim rounded up to a multiple of 64."""
    vocab_size: int = 0
    """Rows of the embedding; 0 takes the tokenizer's vocabulary rounded up to a multiple of 64."""
    rope_theta: float = 10000.0
    """kind=decoder: base of the rotary frequencies."""
    norm_eps: float = 1e-5
    """kind=decoder: epsilon of RMSNorm."""
    tied_head: bool = True
    """kind=decoder: the output projection is the embedding."""
    dropout: float = 0.0
    """kind=decoder: probability after attention and feed-forward; 0 to 1."""
    moe: MoEConfig = field(default_factory=MoEConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Text in, token windows out."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT

    path: str = "stdlib"
    """`stdlib` (source text of the running interpreter's standard library), a file, folder or glob of .txt, .md,
    .py, .jsonl or .parquet, any fsspec URL of these, or a folder written by `trainsys data prepare`."""
    tokenizer: str = "bytes"
    """`bytes` (256 values and an end-of-document token), a tokenizer.json, or a Hugging Face tokenizer folder."""
    text_key: str = "text"
    """Field of .jsonl rows and column of .parquet files that holds the text."""
    sequence_length: int = 256
    """Tokens a sample feeds to the model; the target is the same window one token later."""
    validation_path: str = ""
    """Held-out text, same forms as `path`; empty holds out `validation_fraction` of the documents."""
    validation_fraction: float = 0.02
    """Share of documents held out, chosen by a hash of their text; 0 to 0.5. Unused with `validation_path`."""
    document_mask: bool = True
    """Attention, positions and targets stop at document boundaries inside a packed window."""
    cache_dir: str = ""
    """Where prepared tokens are kept and found again; empty: `.data/` beside the run's folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """Sequences per optimizer step, and how they are cut."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT

    global_sequences: int = 16
    """Sequences in one optimizer step over all ranks; a multiple of micro_sequences x data ranks."""
    micro_sequences: int = 8
    """Sequences in one forward of one rank; the rest is gradient accumulation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """The optimizer."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT

    kind: Literal["adamw", "muon"] = "adamw"
    """`adamw` for everything; `muon` orthogonalises the momentum of the hidden matrices and uses AdamW for the rest."""
    lr: float = 1e-3
    """Peak learning rate (AdamW groups)."""
    muon_lr: float = 2e-3
    """kind=muon: peak learning rate of the matrices, whose steps are scaled to the size of AdamW's (0.2 x lr)."""
    muon_momentum: float = 0.95
    """kind=muon: Nesterov momentum; 0 to 1."""
    beta1: float = 0.9
    """Decay of AdamW's first moment; 0 to 1."""
    beta2: float = 0.95
    """Decay of AdamW's second moment; 0 to 1."""
    eps: float = 1e-8
    """AdamW's denominator offset."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms, biases and embeddings are not decayed."""
    decay_embeddings: bool = False
    """Also decay embedding matrices."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Learning rate over the steps, as a factor of the peak."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """`cosine`: down to final_ratio at the last step; `wsd`: warm up, stay, decay linearly over decay_steps."""
    warmup_steps: int = 20
    """Steps of linear warm-up; the first step already moves."""
    decay_steps: int = 0
    """kind=wsd: steps of the final decay; 0 takes a fifth of the run."""
    final_ratio: float = 0.1
    """Factor at the last step; 0 to 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """What trains the model: forward, backward and update, and what each rank keeps of it."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT

    backend: Literal["auto", "deepspeed", "torch"] = "auto"
    """`deepspeed`, or `torch`: FSDP2 and torch alone; `auto` takes DeepSpeed where it runs the layout, else torch
    (`python -m parallel table` prints which runs what)."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """0 replicates; 1 shards optimizer state over the data ranks, 2 also gradients, 3 also parameters. Data ranks are
    shard x context, or with parallel.shard = 1 replicate x context."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """dtype of weights and activations; bf16 and fp16 keep fp32 master weights and need zero_stage >= 1. `auto` takes
    bf16 where the devices of all ranks multiply it in hardware, else fp32; a resumed run keeps what it began with."""
    gradient_clip_norm: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What backward computes again instead of keeping it: nothing; what is cheap (all but matrix products and fused
    attention); each block, of which only the input is kept."""
    compile: bool = False
    """torch.compile each block."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one."""
    bucket_numel: int = 50_000_000
    """Elements reduced or gathered in one collective."""
    timeout_s: float = 600.0
    """Longest time one collective may take before it raises."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Validation loss and a sample of text."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT

    every: int = 100
    """Steps between two evaluations; 0 evaluates only at the end."""
    sequences: int = 64
    """Held-out sequences per evaluation, the same ones every time; 0 turns evaluation off."""
    sample_tokens: int = 200
    """Tokens generated at the end of the run; 0 generates none."""
    sample_prompt: str = "def "
    """What the sample continues."""
    sample_temperature: float = 0.8
    """Softmax temperature of the sample; 0 takes the most likely token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WandbConfig:
    """Weights & Biases (extra `wandb`)."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT

    mode: Literal["off", "offline", "online"] = "off"
    """`offline` writes the run to `RUN/wandb` for a later `wandb sync`."""
    project: str = "trainsys"
    """Project the run appears under."""
    entity: str = ""
    """Team or user; empty takes the account's default."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsConfig:
    """Where numbers go; `RUN/metrics.jsonl` is always written."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT

    every: int = 1
    """Steps between two records."""
    console: Literal["auto", "rich", "plain", "off"] = "auto"
    """`rich` draws one live line, `plain` prints a line a record; `auto` asks the terminal."""
    peak_flops_per_s: float = 0.0
    """Peak of one rank's device for the utilisation figure (MFU); 0 takes the known value of a GPU, or measures a
    matrix product on this CPU and says so."""
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileConfig:
    """A window of steps recorded with the torch profiler (Chrome trace per rank in `RUN/profile`)."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT

    start_step: int = 0
    """First step recorded; counted from 1, 0 records nothing."""
    num_steps: int = 3
    """Steps recorded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything that decides a run."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT

    name: str
    """Name of the run, and of its folder."""
    steps: int
    """Optimizer steps of the whole run; resuming does not add to it."""
    run_dir: str = ""
    """Folder of the run; empty takes `runs/<name>`."""
    seed: int = 0
    """Decides initial weights, data order, dropout and the sample."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rl: RLConfig = field(default_factory=RLConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faulttol: FaultTolConfig = field(default_factory=FaultTolConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
