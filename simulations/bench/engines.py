"""The ways of training a benchmark's users, each a function that runs one round: ours, and what it is held against.

Everything runs in this process with one thread, as a worker does; only pfl has a process and an environment of its own.
A round is local training of every user, the clip of every update, the sum and central noise.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, Self

import numpy as np

from simulations.bench.workloads import RANK, SCALING, TARGETS, VOCABULARY, BenchRecord, Workload, llama

__all__ = ["Pfl", "bench_trainer", "matrix_products", "one_by_one", "opacus_steps", "ours", "silo_steps"]

LEARNING_RATE, CLIP, NOISE = 0.1, 1.0, 0.5
CHUNK = 16
SILO_STEPS, SILO_RECORDS = 6, 32


def bench_trainer(model: Any = None, *, compiled: bool = False, pass_tokens: int | None = None) -> Any:
    """A trainer over the standard base."""
    from client.base_model import BaseModel
    from client.trainer import Trainer
    from common.model_files import LinearModule

    model = llama() if model is None else model
    layers = [(name, layer) for name, layer in model.named_modules() if name.endswith(TARGETS)]
    modules = tuple(LinearModule(name, layer.in_features, layer.out_features) for name, layer in layers)
    tokenizer = SimpleNamespace(pad_token_id=0)
    trainer = Trainer(
        BaseModel(model, tokenizer, Path(), "0" * 64, modules), rank=RANK, scaling=SCALING, pass_tokens=pass_tokens
    )
    if compiled:
        trainer.compile()
    return trainer


def _start(layout: Any) -> Any:
    return np.random.default_rng(0).normal(0, 0.02, layout.size).astype(np.float32)


def ours(trainer: Any, workload: Workload, users: list[list[BenchRecord]], size: int = CHUNK) -> Callable[[], None]:
    """One round of the stacked trainer, in the chunks that the simulator hands out."""
    from client.trainer import Recipe
    from common.privacy import Randomness, clip_rows

    start = _start(trainer.layout)
    recipe = Recipe(workload.steps, workload.batch, LEARNING_RATE)
    randomness = Randomness.rehearsal(0, "bench")

    def run() -> None:
        total = np.zeros(trainer.layout.size)
        for first in range(0, len(users), size):
            chunk = users[first : first + size]
            orders = [np.random.default_rng(first + index) for index in range(len(chunk))]
            trained = trainer.fit(start, chunk, recipe, orders)
            total += clip_rows(trained, CLIP, origin=start).sum(axis=0, dtype=np.float64)
        total += NOISE * randomness.normal(total.size)

    return run


def _peft(device: str = "cpu") -> tuple[Any, list[Any]]:
    from peft import LoraConfig, get_peft_model

    adapter = LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), target_modules=list(TARGETS), task_type="CAUSAL_LM")
    model: Any = get_peft_model(llama(), adapter).to(device).train()
    return model, [parameter for parameter in model.parameters() if parameter.requires_grad]


def _padded(records: list[BenchRecord]) -> tuple[Any, Any]:
    import torch

    width = max(len(record.ids) for record in records)
    ids = torch.zeros(len(records), width, dtype=torch.long)
    labels = torch.full((len(records), width), -100)
    for row, record in enumerate(records):
        ids[row, : len(record.ids)] = torch.from_numpy(record.ids.astype(np.int64))
        labels[row, : len(record.ids)] = ids[row, : len(record.ids)]
    return ids, labels


def one_by_one(workload: Workload, users: list[list[BenchRecord]], device: str = "cpu") -> Callable[[], None]:
    """One round as a plain PyTorch loop over a PEFT model: user after user, each batch padded to its longest record."""
    import torch

    model, trainable = _peft(device)
    start = [parameter.detach().clone() for parameter in trainable]
    batch = workload.batch
    data = [[_padded(own[at : at + batch]) for at in range(0, len(own), batch)] for own in users]

    def run() -> None:
        total = [torch.zeros_like(parameter) for parameter in trainable]
        for own in data:
            optimizer = torch.optim.SGD(trainable, lr=LEARNING_RATE)
            for ids, labels in own:
                optimizer.zero_grad()
                model(input_ids=ids.to(device), labels=labels.to(device)).loss.backward()
                optimizer.step()
            with torch.no_grad():
                moved = [parameter - first for parameter, first in zip(trainable, start, strict=True)]
                norm = torch.sqrt(torch.stack([each.square().sum() for each in moved]).sum())
                factor = min(1.0, CLIP / max(float(norm), 1e-30))
                for added, each, parameter, first in zip(total, moved, trainable, start, strict=True):
                    added.add_(each, alpha=factor)
                    parameter.copy_(first)

    return run


def _batches(records: list[BenchRecord], size: int) -> list[list[BenchRecord]]:
    """The Poisson batches that `fit_example_dp` draws from the benchmark's seed, 8 records on average."""
    from common.privacy import Randomness

    randomness, rate = Randomness.rehearsal(7, "silo"), min(1.0, 8 / len(records))
    batches: list[list[BenchRecord]] = []
    for _ in range(SILO_STEPS):
        batches.append([records[int(index)] for index in randomness.poisson_sample(len(records), rate)])
        randomness.normal(size)
    return batches


def silo_steps(trainer: Any, records: list[BenchRecord], *, private: bool) -> Callable[[], None]:
    """Steps of one party: DP-SGD with Poisson batches of 8 on average, or the same batches without clip and noise."""
    import torch

    from client.optimizers import Recipe, StackedOptimizer
    from client.trainer import ExamplePromise
    from common.privacy import Randomness

    start = _start(trainer.layout)
    recipe = Recipe(SILO_STEPS, 8, LEARNING_RATE)
    promise = ExamplePromise(CLIP, NOISE, min(1.0, 8 / len(records)))
    batches = _batches(records, trainer.layout.size)

    def run() -> None:
        if private:
            trainer.fit_example_dp(start, records, recipe, promise, Randomness.rehearsal(7, "silo"))
            return
        theta = torch.from_numpy(start.copy())[None]
        optimizer = StackedOptimizer(recipe)
        for batch in batches:
            gradient = trainer._gradient(batch, np.zeros(len(batch), dtype=np.intp), theta)
            optimizer.step(theta, gradient / recipe.batch)

    return run


def opacus_steps(records: list[BenchRecord], size: int) -> Callable[[], None]:
    """The same steps of DP-SGD with Opacus' hooks on a PEFT model; `size` is that of an adapter's vector."""
    import torch
    import torch.nn.functional as F
    from opacus.grad_sample import GradSampleHooks

    model, trainable = _peft()
    hooks = GradSampleHooks(model, batch_first=True, loss_reduction="sum")
    start = [parameter.detach().clone() for parameter in trainable]
    batches = [_padded(batch) for batch in _batches(records, size)]

    def run() -> None:
        _ = hooks  # they end with their owner
        for ids, labels in batches:
            logits = model(input_ids=ids).logits[:, :-1]
            losses = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
            (losses.sum(dim=1) / (labels[:, 1:] >= 0).sum(dim=1)).sum().backward()
            with torch.no_grad():
                norms = torch.stack([each.grad_sample.flatten(1).norm(dim=1) for each in trainable]).norm(dim=0)
                factors = (CLIP / norms.clamp(min=1e-30)).clamp(max=1.0)
                for each in trainable:
                    gradient = torch.einsum("i,i...->...", factors, each.grad_sample)
                    gradient += NOISE * CLIP * torch.randn_like(gradient)
                    each.sub_(gradient / 8, alpha=LEARNING_RATE)
                    each.grad_sample = each.grad = None
        with torch.no_grad():
            for each, first in zip(trainable, start, strict=True):
                each.copy_(first)

    return run


def matrix_products(
    workload: Workload, users: int, pass_tokens: int = 512, *, laid_out: bool = False
) -> Callable[[], None]:
    """Nothing but the frozen base's matrix products of such a round, at the shapes of our passes: the roofline.

    Forward through every linear layer and the output layer; back to the inputs of all of them but the first layer's,
    below whose adapters nothing has a gradient. Attention and low-rank factors are not counted, nor is anything that
    is not a product. With `laid_out` the matrices of the way there are transposed in memory beforehand, which torch
    multiplies by faster: the stricter roofline.
    """
    import torch

    model = llama()
    config = model.config
    wide, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    tokens = round(users * workload.steps * workload.batch * (workload.shortest + workload.longest) / 2)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator)

    squares = [random(wide, wide) for _ in range(4 * layers)]
    ups = [random(inner, wide) for _ in range(2 * layers)]
    downs, head = [random(wide, inner) for _ in range(layers)], random(VOCABULARY, wide)
    passes = [pass_tokens] * (tokens // pass_tokens) + ([tokens % pass_tokens] if tokens % pass_tokens else [])
    there = {id(each): (each.t().contiguous() if laid_out else each.t()) for each in (*squares, *ups, *downs, head)}
    inputs = {size: (random(size, wide), random(size, inner), random(size, VOCABULARY)) for size in set(passes)}

    def run() -> None:
        for size in passes:
            rows, middle, logits = inputs[size]
            for layer in range(layers):
                for square in squares[4 * layer : 4 * layer + 4]:
                    torch.mm(rows, there[id(square)])
                for up in ups[2 * layer : 2 * layer + 2]:
                    torch.mm(rows, there[id(up)])
                torch.mm(middle, there[id(downs[layer])])
            torch.mm(rows, there[id(head)])
            torch.mm(logits, head)
            for layer in reversed(range(layers)):
                torch.mm(rows, downs[layer])
                for up in ups[2 * layer : 2 * layer + 2]:
                    torch.mm(middle, up)
                for square in squares[4 * layer : 4 * layer + (4 if layer else 1)]:
                    torch.mm(rows, square)

    return run


class Pfl:
    """pfl-research in a process of its own, one round at a time."""

    def __init__(self, python: Path, workload: Workload, users: int, device: str = "cpu") -> None:
        """Start it with the Python of an environment that has pfl."""
        root = Path(__file__).resolve().parent.parent.parent
        self._process = subprocess.Popen(  # noqa: S603 - the caller names the interpreter
            [str(python), "-W", "ignore", "-m", "simulations.bench.pfl_rounds", str(users), workload.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PFL_PYTORCH_DEVICE": device},
        )

    def round(self) -> dict[str, float]:
        """Run one round; returns processor and wall seconds."""
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("pfl's process has no pipes")
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("pfl's process ended")
        return json.loads(line)

    def __enter__(self) -> Self:
        """Give the running process."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
