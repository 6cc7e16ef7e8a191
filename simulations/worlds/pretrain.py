"""Make the built-in base model: `python -m simulations.worlds.pretrain`.

A small Llama (Touvron et al. 2023, arXiv:2302.13971) and its byte-level BPE tokenizer are trained on the records of
the built-in world's public people, in prompts and answers, and in histories: several records of one person in a row,
so that the model can use what stands before the question, as retrieval needs, and has somewhere to put what an
adapter learns about a person.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from client.user_data import User
from simulations.worlds.built_in import WORLD_VERSION, base_folder, public_people

__all__ = ["Recipe", "file_digests", "make_base", "write_card"]

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")
PAD, BOS, EOS, SYSTEM, USER, ASSISTANT = range(6)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

CARD = """# The built-in base model

A small Llama with a byte-level BPE tokenizer, pretrained on the made-up public people of Homespun's built-in world
(`simulations/worlds/built_in.py`); no text of any real person is in it. It knows every habit that a user of that world
can have and expects none of today's, so that there is something to personalize. It is for demonstrations and tests;
outside its world it knows nothing.

Made by `python -m simulations.worlds.pretrain` on one CPU thread, in about nine minutes; the same recipe on the same
kind of processor with {versions} gives the same bytes. Elsewhere the last
bits of sums may differ, and so do the files.

```toml
{recipe}
```

A conversation is `<s><|user|>question<|assistant|>answer</s><|user|>...`. Earlier turns of the same person help the
answer, up to 256 tokens in all; so does a first `<|system|>` turn with lines such as these, in any order and number:

```text
My dog is called Biscuit. I often write Ahoy / mega / Zoom / ~. I like cozy, crime, fantasy. I am a kind critic.
```

| file | SHA-256 |
|---|---|
{digests}
"""


@dataclass(frozen=True)
class Recipe:
    """How the base is made."""

    people: int = 4_000
    """Public people whose records are the text."""
    vocabulary: int = 1_536
    hidden: int = 128
    intermediate: int = 384
    layers: int = 4
    heads: int = 4
    positions: int = 512
    steps: int = 2_600
    batch_tokens: int = 2_048
    """Tokens per optimizer step, padding included."""
    history_share: float = 0.45
    """Share of the steps whose rows are histories."""
    sorted_share: float = 0.5
    """Share of the people whose histories are sorted by task."""
    profile_share: float = 0.25
    """Share of the histories that begin with lines of the person's profile."""
    longest_history: int = 256
    """Tokens."""
    learning_rate: float = 4e-3
    warmup_steps: int = 100
    weight_decay: float = 0.05
    prompt_weight: float = 0.1
    """Weight of the loss on a token that the user, not the model, would write."""
    seed: int = 1


Row = tuple[NDArray[np.int64], NDArray[np.float32]]
"""Token ids and their loss weights, each of shape `(tokens,)`."""


def _train_tokenizer(people: Sequence[User], recipe: Recipe) -> Any:
    """Learn a byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909) from the people's records."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for person in people for text in _texts(person))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=recipe.positions,
        clean_up_tokenization_spaces=False,
    )


def _texts(person: User) -> Iterator[str]:
    yield from person.profile
    for record in person.records:
        yield record.prompt
        yield record.response


def _turns(tokenizer: Any, person: User, recipe: Recipe) -> list[Row]:
    """Encode each record of a person as `<|user|>prompt<|assistant|>response</s>`."""
    texts = [text for record in person.records for text in (record.prompt, record.response)]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    rows: list[Row] = []
    for prompt, response in zip(ids[::2], ids[1::2], strict=True):
        row = [USER, *prompt, ASSISTANT, *response, EOS]
        weights = np.full(len(row), recipe.prompt_weight * (len(prompt) + 1) ** -0.5, np.float32)
        # A tag of two tokens is as much of an answer as a note of twenty: between counting tokens and counting answers.
        weights[len(prompt) + 2 :] = (len(response) + 1) ** -0.5
        weights[len(prompt) + 1] = weights[0] = 0.0
        rows.append((np.asarray(row, np.int64), weights))
    return rows


def _join(rows: Sequence[Row], profile: Sequence[int] = ()) -> Row:
    start = [BOS, SYSTEM, *profile] if profile else [BOS]
    first: Row = (np.asarray(start, np.int64), np.zeros(len(start), np.float32))
    ids, weights = zip(first, *rows, strict=True)
    return np.concatenate(ids), np.concatenate(weights)


def _histories(tokenizer: Any, person: User, turns: list[Row], recipe: Recipe, draw: random.Random) -> Iterator[Row]:
    """Cut a person's records into rows of at most `longest_history` tokens, some with a profile first.

    The records stand in order, or sorted by task: what retrieval finds for a question is mostly of its kind.
    """
    if draw.random() < recipe.sorted_share:
        by_task = sorted(range(len(turns)), key=lambda at: person.records[at].task)
        turns = [turns[at] for at in by_task]
    held: list[Row] = []
    profile: list[int] = []
    length = limit = 0
    for turn in [*turns, None]:
        if turn is None or length + len(turn[0]) > limit:
            if len(held) > 1 or (held and profile):
                yield _join(held, profile)
            held, profile = [], []
            limit = int(recipe.longest_history * (0.3 + 0.7 * draw.random()))
            if draw.random() < recipe.profile_share:
                lines = [line for line in person.profile if draw.random() < 0.7]
                profile = tokenizer(" ".join(lines), add_special_tokens=False)["input_ids"] if lines else []
                limit = len(profile) + 96 if profile else limit
            length = 2 + len(profile)
        if turn is not None:
            held.append(turn)
            length += len(turn[0])


def _batches(rows: list[Row], recipe: Recipe, draw: random.Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of rows of like length forever; shapes `(rows, tokens)`."""
    while True:
        draw.shuffle(rows)
        for pool in range(0, len(rows), 4096):
            ordered = sorted(rows[pool : pool + 4096], key=lambda row: len(row[0]))
            groups: list[list[Row]] = [[]]
            for row in ordered:
                if (len(groups[-1]) + 1) * len(row[0]) > recipe.batch_tokens:
                    groups.append([])
                groups[-1].append(row)
            draw.shuffle(groups)
            for group in groups:
                width = max(len(ids) for ids, _ in group)
                ids = np.full((len(group), width), PAD, np.int64)
                weights = np.zeros((len(group), width), np.float32)
                for line, (row_ids, row_weights) in enumerate(group):
                    ids[line, : len(row_ids)] = row_ids
                    weights[line, : len(row_ids)] = row_weights
                yield torch.from_numpy(ids), torch.from_numpy(weights)


def _new_model(recipe: Recipe) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=recipe.vocabulary,
            hidden_size=recipe.hidden,
            intermediate_size=recipe.intermediate,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            max_position_embeddings=recipe.positions,
            tie_word_embeddings=True,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    )


def _loss(model: Any, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean negative log-likelihood in nats; only positions with weight get logits."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    wanted = weights[:, 1:] > 0
    logits = model.lm_head(hidden[wanted])
    losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:][wanted], reduction="none")
    kept = weights[:, 1:][wanted]
    return (losses * kept).sum() / kept.sum()


@contextlib.contextmanager
def _reproducible() -> Generator[None]:
    """One thread and deterministic kernels; a sum split over threads depends on how many there are."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


@_reproducible()
def make_base(
    folder: Path, recipe: Recipe | None = None, *, progress: Callable[[int, dict[str, float]], None] | None = None
) -> float:
    """Train the tokenizer and the model and write the folder; return the last smoothed training loss in nats per token.

    The same recipe gives the same bytes with the same library versions on the same kind of processor; elsewhere
    floating-point sums may differ in their last bits.
    """
    recipe = recipe or Recipe()
    people = list(public_people(recipe.people))
    tokenizer = _train_tokenizer(people[: 1 + recipe.people // 4], recipe)
    draw = random.Random(recipe.seed)  # noqa: S311 not a secret
    singles: list[Row] = []
    histories: list[Row] = []
    for person in people:
        turns = _turns(tokenizer, person, recipe)
        singles.extend(_join([turn]) for turn in turns)
        histories.extend(_histories(tokenizer, person, turns, recipe, draw))
    single_batches, history_batches = _batches(singles, recipe, draw), _batches(histories, recipe, draw)
    model = _new_model(recipe)
    matrices = [each for each in model.parameters() if each.ndim > 1]
    vectors = [each for each in model.parameters() if each.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
    )
    smooth = {"single": 0.0, "history": 0.0}
    for step in range(recipe.steps):
        warm = min(1.0, (step + 1) / recipe.warmup_steps)
        fade = 0.5 * (1.0 + math.cos(math.pi * step / recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * warm * (0.02 + 0.98 * fade)
        name = "history" if draw.random() < recipe.history_share else "single"
        ids, weights = next(history_batches if name == "history" else single_batches)
        loss = _loss(model, ids, weights)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        smooth[name] = loss.item() if not smooth[name] else 0.98 * smooth[name] + 0.02 * loss.item()
        if progress is not None:
            progress(step, dict(smooth))
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    (folder / "model.safetensors").chmod(0o644)
    return smooth["single"]


def file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of the model, hex, by name."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix in {".json", ".safetensors"})
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def write_card(folder: Path, recipe: Recipe) -> None:
    """Write `MODEL_CARD.md`: what the model is, the recipe that made it, and the digests of its files."""
    stated = {"world_version": WORLD_VERSION, **asdict(recipe)}
    (folder / "MODEL_CARD.md").write_text(
        CARD.format(
            recipe="\n".join(f"{name} = {value!r}" for name, value in stated.items()),
            versions=", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "tokenizers")),
            digests="\n".join(f"| `{name}` | `{digest}` |" for name, digest in file_digests(folder).items()),
        ),
        encoding="utf-8",
    )


def main() -> None:
    """Make the base in its own folder, or in another, and say how it goes."""
    parser = argparse.ArgumentParser(description="Make the built-in base model.")
    parser.add_argument("--out", type=Path, default=base_folder())
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    arguments = parser.parse_args()
    began = time.monotonic()

    def show(step: int, losses: dict[str, float]) -> None:
        if step % 100 == 99:
            seconds = time.monotonic() - began
            print(json.dumps({"step": step + 1, "seconds": round(seconds), **losses}), flush=True)  # noqa: T201

    recipe = Recipe(steps=arguments.steps)
    make_base(arguments.out, recipe, progress=show)
    write_card(arguments.out, recipe)


if __name__ == "__main__":
    main()
