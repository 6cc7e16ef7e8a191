"""What a device needs: memory and time of a training step by base and precision, and what a device costs that idles.

    python -m simulations.bench.device                         # the table of docs/devices.md; random weights, offline
    python -m simulations.bench.device --quality MODEL DATA    # what bfloat16 and int8 cost in loss
    python -m simulations.bench.device --idle HOME             # processes of the device in HOME, for two minutes

Each measurement has a process of its own, because memory that a process gave back is not seen in it again. Peaks are
`VmHWM`, which Linux resets on request; a step is one optimizer step over records of equal length. On a busy machine
look at processor seconds: with one thread they are what a quiet one takes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from common.model_files import PRECISIONS

__all__ = ["idle", "main", "measure", "quality"]

ROOT = Path(__file__).resolve().parent.parent.parent
BUILT_IN = ROOT / "simulations" / "worlds" / "base"
SHAPES: dict[str, dict[str, int]] = {
    # as SmolLM2-135M and Qwen2.5-0.5B are, with random weights
    "135M": {"hidden": 576, "layers": 30, "heads": 9, "kv": 3, "inner": 1536, "vocabulary": 49152},
    "0.5B": {"hidden": 896, "layers": 24, "heads": 14, "kv": 2, "inner": 4864, "vocabulary": 151936},
}
RANK, BATCH, TOKENS = 8, 8, 64
IDLE_SECONDS = 120.0


def make_base(shape: dict[str, int], folder: Path) -> Path:
    """Write a Llama of `shape` with random weights in bfloat16, and a tokenizer of numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["inner"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv"],
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, 1000)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def measure(folder: Path, precision: str, *, steps: int = 3, megabytes: float | None = None) -> dict[str, Any]:
    """Open a base in this process and train over it; megabytes and seconds.

    `megabytes` plans the passes as a device does that is granted so much.
    """
    before = _memory("VmRSS")
    from client.base_model import load_base
    from client.memory_plan import MemoryPlan
    from client.optimizers import Recipe
    from client.trainer import Trainer

    imported = _memory("VmRSS")
    plan = MemoryPlan.of(folder, precision, megabytes if megabytes is not None else 1e9)
    _reset_peak()
    began = time.monotonic()
    base = load_base(folder, ("q_proj", "v_proj"), precision=precision)
    loaded = {"seconds_to_load": time.monotonic() - began, "load_peak": _memory("VmHWM"), "loaded": _memory("VmRSS")}
    trainer = Trainer(base, rank=RANK, scaling=2.0, pass_tokens=plan.pass_tokens)
    plan.apply(base)
    generator = np.random.default_rng(0)
    top = min(1000, base.model.config.vocab_size)
    records = [_Record(generator.integers(3, top, TOKENS).astype(np.int32), 8) for _ in range(BATCH)]
    recipe = Recipe(steps=1, batch=BATCH, learning_rate=0.01, optimizer="adam")
    start = np.zeros(trainer.layout.size, np.float32)
    trainer.fit(start, [records], recipe, [generator])
    _reset_peak()
    seconds: list[float] = []
    processor: list[float] = []
    for _ in range(steps):
        began, worked = time.monotonic(), time.process_time()
        trainer.fit(start, [records], recipe, [generator])
        seconds.append(time.monotonic() - began)
        processor.append(time.process_time() - worked)
    return {
        "python": before,
        "imported": imported,
        **loaded,
        "step_peak": _memory("VmHWM"),
        "seconds_per_step": float(np.median(seconds)),
        "processor_seconds_per_step": float(np.median(processor)),
        "planned_for": plan.megabytes,
        "pass_tokens": plan.pass_tokens,
        "adapter_values": trainer.layout.size,
        "parameters": sum(one.numel() for one in base.model.parameters())
        + sum(one.numel() for one in base.model.buffers() if one.dtype == _int8()),
    }


def quality(model: Path, data: Path, *, users: int = 8, steps: int = 60) -> list[dict[str, Any]]:
    """What each precision costs: loss of real users' validation records, nats per token, before and after training."""
    from client.base_model import load_base
    from client.optimizers import Recipe
    from client.trainer import Trainer
    from client.user_data import Encoder
    from client.vault import encode_user
    from simulations.worlds.loaders import load_users

    found: list[dict[str, Any]] = []
    for precision in PRECISIONS:
        base = load_base(model, ("q_proj", "v_proj"), precision=precision)
        trainer = Trainer(base, rank=RANK, scaling=2.0)
        encoder = Encoder(base.tokenizer, TOKENS)
        people = [encode_user(user, encoder) for user in load_users(str(data))]
        people = [one for one in people if len(one.train) >= BATCH and one.validation][:users]
        recipe = Recipe(steps=steps, batch=BATCH, learning_rate=0.005, optimizer="adam")
        from common.adapters import initial_vector

        start = initial_vector(trainer.layout, np.random.default_rng(0))
        orders = [np.random.default_rng(number) for number in range(len(people))]
        trained = trainer.fit(start, [one.train for one in people], recipe, orders)
        records = [record for one in people for record in one.validation]
        owner = np.repeat(np.arange(len(people)), [len(one.validation) for one in people])
        plain = trainer.score(records)
        own = trainer.score(records, adapters=trained, owner=owner)
        found.append(
            {
                "precision": precision,
                "users": len(people),
                "before": float(plain.nats.sum() / plain.tokens.sum()),
                "after": float(own.nats.sum() / own.tokens.sum()),
            }
        )
    return found


def idle(home: Path, seconds: float = IDLE_SECONDS) -> dict[str, Any]:
    """Resident memory and processor time of every process of the device in `home`, over some time.

    Raises:
        SystemExit: No device runs there.
    """
    from client.agent import agent_pid

    pid = agent_pid(home / "device")
    if pid is None:
        raise SystemExit(f"no device is up in {home}")
    family = _family(pid)
    before = {one: _ticks(one) for one in family}
    time.sleep(seconds)
    family = [one for one in family if _ticks(one) is not None]
    per_second = os.sysconf("SC_CLK_TCK")
    rows: list[dict[str, Any]] = [
        {
            "process": _name(one),
            "rss": _memory("VmRSS", one),
            "pss": _pss(one),
            "cpu_percent": 100 * ((_ticks(one) or 0) - (before[one] or 0)) / per_second / seconds,
        }
        for one in family
    ]
    total = {key: sum(row[key] for row in rows) for key in ("rss", "pss", "cpu_percent")}
    return {"seconds": seconds, "processes": rows, "together": total}


class _Record:
    def __init__(self, ids: Any, first_label: int) -> None:
        self.ids, self.first_label = ids, first_label


def _int8() -> Any:
    import torch

    return torch.int8


def _memory(field: str, pid: int | str = "self") -> float:
    """A line of a process's status, in megabytes; 0 where the platform has none."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0.0
    found = next((line for line in lines if line.startswith(f"{field}:")), "x: 0")
    return int(found.split()[1]) * 1024 / 1e6


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return  # then peaks are those of the whole process


def _pss(pid: int) -> float:
    """What a process holds, with what it shares counted in parts."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024 / 1e6


def _ticks(pid: int) -> int | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[11]) + int(fields[12])


def _family(pid: int) -> list[int]:
    """A process and its descendants."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(path.name)] = int(fields[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def _name(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    known = {
        "supervise": "supervisor",
        "reside": "vault",
        "vault_child": "child with the model",
        "run_node": "SuperNode",
    }
    for word, name in known.items():
        if any(f"import {word}" in one or f"{word} import" in one for one in words):
            return name
    return " ".join(Path(word).name for word in words if word.startswith("/") and "python" not in word)[:40] or words[0]


def _alone(*words: str) -> dict[str, Any]:
    """Run one measurement in a process of its own."""
    command = [sys.executable, "-m", "simulations.bench.device", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)  # noqa: S603
    return json.loads(done.stdout.strip().splitlines()[-1])


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    """Measure, and print one JSON object per line."""
    asked = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    asked.add_argument("--models", default="built-in,135M,0.5B")
    asked.add_argument("--precisions", default=",".join(PRECISIONS))
    asked.add_argument("--granted", type=float, default=None, help="megabytes that a policy grants")
    asked.add_argument("--quality", nargs=2, metavar=("MODEL", "DATA"), type=Path)
    asked.add_argument("--idle", type=Path, metavar="HOME")
    asked.add_argument("--seconds", type=float, default=IDLE_SECONDS)
    asked.add_argument("--one", nargs=2, metavar=("FOLDER", "PRECISION"), help="measure in this process")
    options = asked.parse_args()
    if options.one:
        _say(json.dumps(measure(Path(options.one[0]), options.one[1], megabytes=options.granted)))
    elif options.idle:
        _say(json.dumps(idle(options.idle, options.seconds), indent=1))
    elif options.quality:
        for row in quality(*options.quality):
            _say(json.dumps(row))
    else:
        with tempfile.TemporaryDirectory(prefix="homespun-bench-") as place:
            for name in options.models.split(","):
                folder = BUILT_IN if name == "built-in" else make_base(SHAPES[name], Path(place) / name)
                for precision in options.precisions.split(","):
                    granted = ["--granted", str(options.granted)] if options.granted is not None else []
                    row = _alone("--one", str(folder), precision, *granted)
                    _say(json.dumps({"model": name, "precision": precision, **row}))


if __name__ == "__main__":
    main()
