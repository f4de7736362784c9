"""Hugging Face causal language models behind the contract of this package. Nothing is downloaded."""

# Shapes: B batch, T tokens, V vocabulary rows.

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parallel.loss import cross_entropy
from parallel.shards import Shard, shard_of
from trainsys.config import ModelConfig
from trainsys.errors import ConfigError, MissingExtraError
from trainsys.models.attention import Core
from trainsys.models.initialisation import seed_of
from trainsys.models.layers import Head
from trainsys.models.recompute import Recompute, as_recompute, checkpoint_arguments

_PLAIN_HEADS = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose logits are known to be the product with the head and nothing more."""
PREFIX = "causal_lm."
"""What the names of a `HuggingFaceModel`'s parameters have before those of the model inside."""


class HuggingFaceModel(nn.Module):
    """A `transformers` causal LM with this package's forward.

    Documents are told to it by positions that start again at 0, from which `transformers` builds the mask of
    each kind of layer, sliding windows included (a mask of ours would replace them). The auxiliary loss is
    the model's own router loss times its own `router_aux_loss_coef`.
    """

    def __init__(self, causal_lm: Any) -> None:
        super().__init__()
        self.causal_lm: Any = causal_lm
        self.config: Any = causal_lm.config
        self._aux_weight = float(getattr(self.config, "router_aux_loss_coef", 0.0) or 0.0)
        self.weights_folder: Path | None = None
        """Where the weights are that a model on the meta device has none of yet."""
        head = causal_lm.get_output_embeddings()
        self._fuses_loss = type(head) is nn.Linear and not self._aux_weight
        if self._fuses_loss:
            head.__class__ = Head
        self._separates_documents = self._examine()
        self.core: Core | None = None

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        targets_BT: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, T, V] and the weighted auxiliary loss; with document ids every document counts from 0.

        With `targets_BT` their summed cross-entropy takes the place of the logits, which are never all there where
        the model does nothing to them and has no auxiliary loss.
        Where ranks share sequences (`trainsys.models.context`) positions are those given.

        Raises: ConfigError if there are document ids and the model attends across them whatever one says.
        """
        given = self._given(tokens_BT, positions_BT, document_ids_BT)
        if targets_BT is not None and self._fuses_loss:
            loss = self.causal_lm.get_output_embeddings()(self._hidden(given), targets_BT)
            return loss, loss.new_zeros((), dtype=torch.float32)
        output = self.causal_lm(**given)
        result = output.logits if targets_BT is None else cross_entropy(output.logits, targets_BT)
        aux_loss = self._aux_weight * output.aux_loss if self._aux_weight else result.new_zeros((), dtype=torch.float32)
        return result, aux_loss

    @property
    def head(self) -> nn.Linear | None:
        """The layer whose product with `features` the logits are; None where the model does more to them."""
        return self.causal_lm.get_output_embeddings() if self._fuses_loss else None

    def features(
        self, tokens_BT: Tensor, *, positions_BT: Tensor | None = None, document_ids_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What goes into the `head`, [B, T, D], and the auxiliary loss, 0 where there is a `head`; see `forward`."""
        x_BTD = self._hidden(self._given(tokens_BT, positions_BT, document_ids_BT))
        return x_BTD, x_BTD.new_zeros((), dtype=torch.float32)

    def _given(self, tokens_BT: Tensor, positions_BT: Tensor | None, document_ids_BT: Tensor | None) -> dict[str, Any]:
        """What the model inside is called with."""
        wants: dict[str, Any] = {"output_router_logits": True} if self._aux_weight else {}
        if self.core is not None:
            assert positions_BT is not None, "a part of a sequence does not tell its positions"
            like = torch.empty(0, dtype=self.causal_lm.dtype, device=tokens_BT.device)
            wants["core_plan"] = (self.core, self.core.prepare(document_ids_BT, positions_BT, like))
        elif document_ids_BT is not None:
            if not self._separates_documents:
                problem = f"{self.config.model_type} models cannot keep documents apart; allowed: false"
                raise ConfigError([f"config: data.document_mask: {problem}"])
            positions_BT = restarted_positions(document_ids_BT)
        return {"input_ids": tokens_BT, "position_ids": positions_BT, "use_cache": False, **wants}

    def _hidden(self, given: Mapping[str, Any]) -> Tensor:
        """What goes into the head."""
        return self.causal_lm.base_model(**given).last_hidden_state  # type: ignore[no-any-return]

    def _apply(self, fn: Any, recurse: bool = True) -> HuggingFaceModel:
        """Converts as usual, but for the buffers that are not saved: they keep their dtype.

        Rotary frequencies are among them; in bf16 the angle of position 1000 would be off by a turn. They are
        kept in fp32 by `from_pretrained` as well.
        """
        derived = [
            (module, name, buffer.dtype, buffer)
            for module in self.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and name in module._non_persistent_buffers_set
        ]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module, name, dtype, before in derived:
            after = module._buffers[name]
            if after is not None and after.dtype != dtype:
                module._buffers[name] = before.to(after.device)
        return self

    @torch.no_grad()
    def _examine(self) -> bool:
        """Whether positions that restart separate documents, tried on four tokens.

        Finds out as well whether the logits are the head's product and nothing more.
        Raises: ConfigError if an output changes with a later token.
        """
        if next(self.causal_lm.parameters()).is_meta:
            self._fuses_loss = self._fuses_loss and self.config.model_type in _PLAIN_HEADS
            return True
        training = self.causal_lm.training
        self.causal_lm.eval()

        def logits(tokens: list[int]) -> Tensor:
            output = self.causal_lm(
                input_ids=torch.tensor([tokens]), position_ids=torch.tensor([[0, 1, 0, 1]]), use_cache=False
            )
            return output.logits[0]  # type: ignore[no-any-return]

        if self._fuses_loss:
            given = {"input_ids": torch.tensor([[1, 2, 3, 4]]), "position_ids": torch.tensor([[0, 1, 0, 1]])}
            product = self.causal_lm.get_output_embeddings()(self._hidden({**given, "use_cache": False}))[0]
            self._fuses_loss = torch.equal(product, logits([1, 2, 3, 4]))
        base, other_end, other_start = logits([1, 2, 3, 4]), logits([1, 2, 3, 5]), logits([5, 2, 3, 4])
        self.causal_lm.train(training)
        rounding = 1e-5 * float(base.abs().max())
        if not torch.allclose(base[:3], other_end[:3], rtol=0, atol=rounding):
            problem = f"{self.config.model_type} models see later tokens; a causal language model is wanted"
            raise ConfigError([f"config: model.path: {problem}"])
        return torch.allclose(base[2:], other_start[2:], rtol=0, atol=rounding)


def restarted_positions(document_ids_BT: Tensor) -> Tensor:
    """Positions [B, T] that count from 0 in every document."""
    index_T = torch.arange(document_ids_BT.shape[1], device=document_ids_BT.device)
    starts_BT = torch.zeros_like(document_ids_BT, dtype=torch.int64)
    starts_BT[:, 1:] = index_T[1:] * (document_ids_BT[:, 1:] != document_ids_BT[:, :-1])
    return index_T - starts_BT.cummax(dim=1).values


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of a model or of stages of one, first to last."""
    layer_type = _transformers().modeling_layers.GradientCheckpointingLayer
    return [module for module in model.modules() if isinstance(module, layer_type)]


def build_huggingface(
    config: ModelConfig,
    *,
    vocab_size: int,
    max_positions: int,
    recompute: Recompute,
    seed: int,
) -> HuggingFaceModel:
    """The causal LM in `config.path` in fp32, with its safetensors weights if there are any, else by `seed`.

    Raises:
        ConfigError: no such folder, not a causal LM, weights that do not fit, or too small for the run.
        MissingExtraError: transformers is not installed.
    """
    transformers = _transformers()
    path = Path(config.path)
    hf_config = read_config(config.path)
    _check_sizes(config, hf_config, vocab_size, max_positions)
    with _no_progress_bars(transformers):
        if any(path.glob("*.safetensors")) and torch.get_default_device().type != "meta":
            causal_lm = _load_weights(transformers, path)
        else:
            if any(path.glob("*.bin")):
                problem = f"'{path}' has pickled weights (*.bin), which are not read; convert them to safetensors"
                raise ConfigError([f"config: model.path: {problem}"])
            with torch.random.fork_rng(devices=[]):
                causal_lm = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
            if torch.get_default_device().type != "meta":
                _initialise(causal_lm, seed)
    if as_recompute(recompute) != "none":
        enable = getattr(causal_lm, "activation_checkpointing_enable", None)  # its name from 5.2x on
        (enable or causal_lm.gradient_checkpointing_enable)(checkpoint_arguments(recompute))
    model = HuggingFaceModel(causal_lm.train())
    if any(path.glob("*.safetensors")):
        model.weights_folder = path
    return model


def _initialise(causal_lm: Any, seed: int) -> None:
    """Initial values as the model itself draws them, module by module, each from a seed of its own."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        seen: set[nn.Parameter] = set()
        for name, module in causal_lm.named_modules():
            own = {parameter for parameter in module._parameters.values() if parameter is not None}
            if own - seen:  # a head that is the embedding keeps its values
                _draw(causal_lm, module, name, seed)
            seen |= own


def _draw(causal_lm: Any, module: nn.Module, name: str, seed: int) -> None:
    torch.manual_seed(seed_of(seed, name))
    for parameter in module._parameters.values():
        if parameter is not None:
            parameter.__dict__.pop("_is_hf_initialized", None)
    causal_lm._init_weights(module)


@torch.no_grad()
def initial_parts(model: HuggingFaceModel, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yields this rank's part of each parameter that is on the meta device, with the values of `build_huggingface`.

    A module's whole parameters are there for a moment, on the CPU.
    """
    causal_lm = model.causal_lm
    seen: set[nn.Parameter] = set()
    for path, module in causal_lm.named_modules():
        meta = {leaf: p for leaf, p in module._parameters.items() if p is not None and p.is_meta and p not in seen}
        if meta:
            shards = {leaf: shard_of(parameter) for leaf, parameter in meta.items()}
            values = _drawn(causal_lm, module, path, seed, shards)
            seen.update(meta.values())
            for leaf, part in values.items():
                yield f"{PREFIX}{path}.{leaf}", part


@torch.no_grad()
def make_buffers(model: HuggingFaceModel) -> None:
    """Makes the buffers that are on the meta device, which rotary embeddings derive from the configuration.

    Raises: ConfigError if there are others.
    """
    for path, module in model.causal_lm.named_modules():
        if not any(buffer is not None and buffer.is_meta for buffer in module._buffers.values()):
            continue
        if not hasattr(module, "original_inv_freq"):
            raise ConfigError([f"config: model.path: {path} has buffers that cannot be made after the fact"])
        for leaf, buffer in module._buffers.items():
            module._buffers[leaf] = None if buffer is None else torch.zeros_like(buffer, device="cpu")
        model.causal_lm._init_weights(module)


def _drawn(causal_lm: Any, module: nn.Module, path: str, seed: int, shards: Mapping[str, Shard]) -> dict[str, Tensor]:
    """This rank's parts of a module's parameters, with the values that the whole module gets."""
    kept = dict(module._parameters)
    for leaf, shard in shards.items():
        module._parameters[leaf] = nn.Parameter(torch.empty(shard.global_shape, dtype=torch.float32, device="cpu"))
    with torch.random.fork_rng(devices=[]):
        _draw(causal_lm, module, path, seed)
    drawn = {leaf: shards[leaf].take(module._parameters[leaf]) for leaf in shards}  # type: ignore[arg-type]
    module._parameters.update(kept)
    return drawn


def read_config(folder: str) -> Any:
    """The `transformers` configuration in `folder`.

    Raises: ConfigError if there is none, or none of a causal LM.
    """
    transformers = _transformers()
    path = Path(folder)
    if not path.is_dir():
        raise ConfigError([f"config: model.path: '{folder}' is no folder; no hub is asked: give a local folder"])
    if not (path / "config.json").is_file():
        raise ConfigError([f"config: model.path: '{folder}' has no config.json; give a model's folder"])
    try:
        hf_config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        problem = f"{path / 'config.json'}: {' '.join(str(error).split())}"
        raise ConfigError([f"config: model.path: {problem}"]) from error
    if type(hf_config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or hf_config.is_encoder_decoder:
        problem = f"'{folder}' holds a {hf_config.model_type} model; a causal language model is wanted"
        raise ConfigError([f"config: model.path: {problem}"])
    return hf_config


def write_huggingface(config: ModelConfig, state: Mapping[str, Tensor], out_dir: Path) -> None:
    """Writes the model of `config.path` with `state` as `AutoModelForCausalLM.from_pretrained` opens it.

    Works on a twin without memory, so the trained model may be sharded or gone. `state` may leave out the
    second name of a shared tensor.
    """
    transformers = _transformers()
    hf_config = read_config(config.path)
    dtype = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    with torch.device("meta"):
        twin = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=dtype)
    if (Path(config.path) / "generation_config.json").is_file():
        twin.generation_config = transformers.GenerationConfig.from_pretrained(config.path)
    with _no_progress_bars(transformers):
        twin.save_pretrained(out_dir, state_dict={name.removeprefix(PREFIX): t for name, t in state.items()})


def _load_weights(transformers: Any, path: Path) -> Any:
    causal_lm, report = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, local_files_only=True, trust_remote_code=False, output_loading_info=True
    )
    kinds = ("missing_keys", "mismatched_keys", "unexpected_keys")
    wrong = "; ".join(f"{kind} {sorted(map(str, report[kind]))[:5]}" for kind in kinds if report[kind])
    if wrong:
        raise ConfigError([f"config: model.path: the weights in '{path}' are not this model's: {wrong}"])
    return causal_lm


def _check_sizes(config: ModelConfig, hf_config: Any, vocab_size: int, max_positions: int) -> None:
    text = hf_config.get_text_config()
    wrong = []
    if text.vocab_size < vocab_size:
        wrong.append(
            f"model.path: the model in '{config.path}' has {text.vocab_size} rows, under the tokenizer's"
            f" {vocab_size} tokens; train with the model's own tokenizer (data.tokenizer)"
        )
    if config.vocab_size not in (0, text.vocab_size):
        wrong.append(f"model.vocab_size: {config.vocab_size}, but config.json has {text.vocab_size}; allowed: 0")
    limit = getattr(text, "max_position_embeddings", None) or max_positions
    if limit < max_positions:
        wrong.append(f"data.sequence_length: {max_positions} is over the model's {limit} positions")
    if wrong:
        raise ConfigError(f"config: {problem}" for problem in wrong)


@contextmanager
def _no_progress_bars(transformers: Any) -> Iterator[None]:
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _transformers() -> Any:
    try:
        import transformers
        import transformers.modeling_layers
    except ImportError as error:
        raise MissingExtraError("model.kind = 'hf'", "hf") from error
    return transformers
