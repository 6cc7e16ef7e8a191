"""The frozen base: a Hugging Face causal LM, opened once, named by the digest of its files.

A model is taken when its hidden states times its output layer are its logits and its target modules are plain linear
layers; anything else is refused by name before a single example is trained. No code from a model folder is ever run.
"""

from __future__ import annotations

import copy
import json
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import ConfigError, DataError
from common.model_files import LinearModule, linear_modules, model_digest

__all__ = ["BaseModel", "SharedBase", "load_base"]


@dataclass(frozen=True)
class BaseModel:
    """An opened base.

    Attributes:
        model: The causal LM, in evaluation mode, with frozen weights.
        tokenizer: Its tokenizer, with a pad token.
        folder: Where its files lie.
        digest: SHA-256 over the names and contents of its files, hex.
        modules: Its target layers in the order of the adapter's layout.
    """

    model: Any
    tokenizer: Any
    folder: Path
    digest: str
    modules: tuple[LinearModule, ...]

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
    folder: Path, targets: Sequence[str], *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> BaseModel:
    """Open the model in `folder` on `device`.

    Raises:
        DataError: A file is missing or is not a causal LM that transformers knows without remote code.
        ConfigError: A target is not a linear layer of this model, or its logits are not its output layer's.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar per worker process says nothing

    modules = linear_modules(folder, targets)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, dtype=dtype, use_safetensors=True
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{folder}: not a causal language model that can be opened here: {first[:200]}") from None
    model: Any = model.to(torch.device(device))  # pyright: ignore[reportArgumentType]
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    base = BaseModel(model, tokenizer, folder, model_digest(folder), modules)
    _check_modules(base)
    _check_logits(base)
    return base


class SharedBase:
    """The weights of one base, opened once, under as many models as work at the same time.

    Adapters are laid over a model by changing it, so who trains and who answers need a model each; the weights below
    are the same tensors, which nobody changes.
    """

    def __init__(self, folder: Path) -> None:
        """Remember where the model is; it is opened when the first one asks."""
        self.folder = folder
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

    def model(self, targets: Sequence[str]) -> BaseModel:
        """Give a model of its own to whoever asks, with adapters possible on `targets`.

        Raises:
            DataError, ConfigError: As for `load_base`.
        """
        with self._lock:
            if self._first is None:
                self._first = load_base(self.folder, targets)
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
        if type(layer) is not nn.Linear:
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
