"""The frozen base: a Hugging Face causal LM, opened once, named by the digest of its files.

A model is taken when its hidden states times its output layer are its logits and its target modules are plain linear
layers; anything else is refused by name before a single example is trained. No code from a model folder is ever run.
"""

from __future__ import annotations

import copy
import json
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from client.int8_linear import Int8Linear, is_kept, quantize
from common.errors import ConfigError, DataError
from common.model_files import LinearModule, linear_modules, model_digest, precise_digest

__all__ = ["BaseModel", "SharedBase", "load_base"]


@dataclass(frozen=True)
class BaseModel:
    """An opened base.

    Attributes:
        model: The causal LM, in evaluation mode, with frozen weights.
        tokenizer: Its tokenizer, with a pad token.
        folder: Where its files lie.
        digest: SHA-256 over the names and contents of its files, hex; bound to the precision where that is not float32.
        modules: Its target layers in the order of the adapter's layout.
        precision: How its weights are held.
    """

    model: Any
    tokenizer: Any
    folder: Path
    digest: str
    modules: tuple[LinearModule, ...]
    precision: str = "float32"

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def hidden(self, ids: Tensor) -> Tensor:
        """Map token ids `(rows, tokens)`, padded on the right, to the last hidden states `(rows, tokens, hidden)`.

        No attention mask: with causal attention, padding on the right is never seen by what stands before it.
        """
        return self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states `(positions, hidden)` to logits `(positions, vocabulary)`."""
        logits = self.model.get_output_embeddings()(hidden)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        scale = getattr(self.model.config, "logits_scaling", None)
        return logits if scale is None else logits / scale


def load_base(
    folder: Path,
    targets: Sequence[str],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    precision: str = "float32",
) -> BaseModel:
    """Open the model in `folder` on `device`.

    Args:
        folder: Of the model.
        targets: Last name parts of the layers that carry adapters.
        device: Where the weights go.
        dtype: What float weights are computed in; for tests.
        precision: How they are held: float32, bfloat16, or int8, where embedding, norms and output layer stay float32.

    Raises:
        DataError: A file is missing or is not a causal LM that transformers knows without remote code.
        ConfigError: A target is not a linear layer of this model, or its logits are not its output layer's.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar per worker process says nothing

    modules = linear_modules(folder, targets)
    digest = precise_digest(model_digest(folder), precision)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            model: Any = _load_int8(folder, options) if precision == "int8" else None
            if model is None:
                wide = torch.bfloat16 if precision == "bfloat16" else dtype
                opened: Any = AutoModelForCausalLM.from_pretrained(
                    folder, dtype=wide, use_safetensors=True, output_loading_info=True, **options
                )
                model, found = cast("tuple[Any, Mapping[str, Any]]", opened)
                _check_whole(folder, found)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{folder}: not a causal language model that can be opened here: {first[:200]}") from None
    if precision == "int8":
        quantize(model)
    model = model.to(torch.device(device))
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    base = BaseModel(model, tokenizer, folder, digest, modules, precision)
    _check_modules(base)
    _check_logits(base)
    rows = int(model.get_input_embeddings().weight.shape[0])
    if tokenizer.vocab_size > rows:  # added tokens come on top, and may never be used
        raise DataError(f"{folder}: its tokenizer has {tokenizer.vocab_size} tokens and its model knows {rows} of them")
    return base


def _check_whole(folder: Path, found: Mapping[str, Any]) -> None:
    """Refuse weights that no file has: they would be drawn anew in every process, and no digest would name them."""
    missing = sorted(map(str, found.get("missing_keys", ())))
    if missing:
        raise DataError(f"{folder}: no file has the tensor {missing[0]} ({len(missing)} missing in all)")


def _load_int8(folder: Path, options: dict[str, Any]) -> Any:
    """Open a model tensor by tensor, each linear layer quantized as it comes: the float model is never whole.

    Returns None where its files do not name its tensors one to one, and the ordinary way has to be taken.
    """
    from accelerate import init_empty_weights
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, **options)
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    linears = {name for name, one in model.named_modules() if type(one) is nn.Linear and not is_kept(name)}
    missing = set(dict(model.named_parameters(remove_duplicate=False)))
    others: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in list(opened.keys()):
                if name not in missing:
                    return None
                module, _, leaf = name.rpartition(".")
                if module in linears and leaf == "weight":
                    parent, _, last = module.rpartition(".")
                    setattr(model.get_submodule(parent), last, Int8Linear(opened.get_tensor(name)))
                else:
                    others[name] = nn.Parameter(opened.get_tensor(name).float(), requires_grad=False)
    for name, value in others.items():
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, value)
    model.tie_weights()
    return None if any(parameter.is_meta for parameter in model.parameters()) else model


class SharedBase:
    """The weights of one base, opened once, under as many models as work at the same time.

    Adapters are laid over a model by changing it, so who trains and who answers need a model each; the weights below
    are the same tensors, which nobody changes.
    """

    def __init__(self, folder: Path, precision: Callable[[], str] = lambda: "float32") -> None:
        """Remember where the model is; it is opened when the first one asks, at `precision` unless that one says."""
        self.folder = folder
        self._precision = precision
        self._lock = threading.Lock()
        self._first: BaseModel | None = None

    @property
    def is_open(self) -> bool:
        """Whether the weights are in memory."""
        return self._first is not None

    @property
    def width(self) -> int:
        """Its hidden size; 0 where its files do not say."""
        try:
            config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
            return int(config.get("hidden_size") or config.get("text_config", {}).get("hidden_size", 0))
        except (OSError, ValueError, TypeError, AttributeError):
            return 0

    def model(self, targets: Sequence[str], precision: str | None = None) -> BaseModel:
        """Give a model of its own to whoever asks, with adapters possible on `targets`.

        It is held as whoever trains over it says; who only answers takes it as it is.

        Raises:
            DataError, ConfigError: As for `load_base`.
        """
        with self._lock:
            if self._first is None or precision not in (None, self._first.precision):
                self._first = None
                self._first = load_base(self.folder, targets, precision=precision or self._precision())
            first = self._first
            tensors = [*first.model.parameters(), *first.model.buffers()]
            memo: dict[int, Any] = {
                id(one): nn.Parameter(one.data, requires_grad=False) if isinstance(one, nn.Parameter) else one
                for one in tensors
            }
            mine = replace(
                first, model=copy.deepcopy(first.model, memo), modules=tuple(linear_modules(self.folder, targets))
            )
        _check_modules(mine)
        return mine


def _check_modules(base: BaseModel) -> None:
    for module in base.modules:
        try:
            layer = base.model.get_submodule(module.name)
        except AttributeError:
            raise ConfigError(f"targets: {module.name} stands in the files but not in the opened model") from None
        if type(layer) not in (nn.Linear, Int8Linear):
            raise ConfigError(
                f"targets: layer {module.name} is {type(layer).__name__}; only Linear layers can carry an adapter"
            )
    for name, layer in base.model.named_modules():
        if "router" in name.rsplit(".", 1)[-1] or type(layer).__name__.endswith("TopKRouter"):
            raise ConfigError(
                f"model: layer {name} routes tokens between experts, which couples a batch's examples; not supported"
            )


@torch.no_grad()
def _check_logits(base: BaseModel) -> None:
    """Our way to the logits must be the model's own, or losses would silently be something else."""
    rows = torch.arange(1, 9, device=base.device)[None] % base.model.config.get_text_config().vocab_size
    theirs = base.model(input_ids=rows, use_cache=False).logits
    ours = base.logits(base.hidden(rows).flatten(0, 1)).view_as(theirs)
    if not torch.allclose(ours, theirs, atol=1e-4, rtol=1e-3):
        raise ConfigError(
            f"model: {type(base.model).__name__} does more to its logits than an output layer; not supported"
        )
