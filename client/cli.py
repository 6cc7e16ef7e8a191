"""`homespun device ...`: what the owner of a device runs."""

from __future__ import annotations

import json
import logging
import secrets
import signal
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.errors import ConfigError, DataError

if TYPE_CHECKING:
    from client.policy import Policy
    from client.user_data import User
    from common.keys import MasterKey, SigningKey
    from common.ledger import Ledger

__all__ = ["app"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="The vault of this device: what it holds, what it may send, what it sent.",
    rich_markup_mode=None,
)

POLICY, LEDGER, DEVICE_KEY, OUTBOX = "policy.toml", "ledger.jsonl", "device.key", "outbox"


@app.callback()
def _group() -> None:
    """Keep `device` a group of commands while it has a single one."""


@app.command("up")
def up(
    data: Annotated[Path, typer.Option(help="JSON lines of users; one of them is the owner of this device")],
    user: Annotated[str, typer.Option(help="which of them")],
    model: Annotated[str, typer.Option(help="base model: a Hugging Face folder or a hub name")],
    socket: Annotated[Path, typer.Option(help="Unix socket that a SuperNode's node-config names")],
    policy: Annotated[
        Path | None, typer.Option(help="TOML of what the owner grants; kept signed", show_default=False)
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="LoRA rank of the runs that are joined")] = 2,
    alpha: Annotated[float | None, typer.Option(help="LoRA alpha; 2 x rank when absent", show_default=False)] = None,
    targets: Annotated[str, typer.Option(help="linear layers that carry an adapter")] = "q_proj,v_proj",
    max_tokens: Annotated[int, typer.Option(min=8, help="a record is cut to this many tokens")] = 64,
) -> int:
    """Serve this device's vault over a Unix socket, until it is told to stop.

    Example: homespun device up --data me.jsonl --user me --model ./SmolLM2-135M --socket ~/.homespun.sock
    """
    from client.base_model import load_base
    from client.device_ledger import DeviceLedger
    from client.gate import Gate
    from client.trainer import Trainer
    from client.user_data import Encoder
    from client.vault import Vault, encode_user
    from client.vault_service import FleetService, Outbox, serving
    from common.files import make_private_folder
    from common.keys import MasterKey
    from common.model_files import model_folder
    from common.places import state_home

    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", level=logging.WARNING)
    home = state_home() / "device"
    make_private_folder(home)
    own = read_user(data, user)
    master = MasterKey.open(home)
    key = _device_key(home / DEVICE_KEY, master)
    granted = _policy(home / POLICY, policy, key)
    with ExitStack() as stack:
        ledger = stack.enter_context(_ledger(home / LEDGER, key))
        subject = str(ledger.header["subject"])
        base = load_base(model_folder(model), tuple(part.strip() for part in targets.split(",")))
        trainer = Trainer(base, rank=rank, scaling=(2.0 * rank if alpha is None else alpha) / rank)
        silo = granted.units == ("example",)  # a party, whose records are split one by one
        encoded = encode_user(own, Encoder(base.tokenizer, max_tokens), by_record=silo)
        books = DeviceLedger(ledger, granted)
        vault = Vault(
            trainer,
            {subject: encoded}.__getitem__,
            seed=int.from_bytes(master.subkey("training-order")[:8]) >> 1,
            residents=[subject],
            gate=Gate(books.record),
            grants=books.check,
        )
        outbox = Outbox(home / OUTBOX, master.subkey("outbox"))
        service = FleetService(vault, outbox, model=base.digest)
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        stack.enter_context(serving(service, socket, dim=trainer.layout.size))
        typer.echo(json.dumps({"subject": subject, "socket": str(socket.absolute()), "model": base.digest}))
        sys.stdout.flush()
        stop.wait()
    return 0


def read_user(path: Path, name: str) -> User:
    """Find one user in JSON lines of `{"user", "texts" | "examples"}`.

    Raises:
        DataError: The file cannot be read as that, or the user is not in it; names the line, never what stands there.
    """
    from client.user_data import Record, User

    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    entry: dict[str, Any] = json.loads(line)
                    if str(entry["user"]) != name:
                        continue
                    texts = [Record("", _text(text)) for text in entry.get("texts", ())]
                    examples = [
                        Record(_text(one["prompt"]), _text(one["response"]), task="reply")
                        for one in entry.get("examples", ())
                    ]
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise DataError(
                        f'{path}: line {number}: not {{"user", "texts"}} or {{"user", "examples"}}'
                    ) from None
                return User(name, (*texts, *examples))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {type(error).__name__}") from None
    raise DataError(f"{path}: this user is not in the file")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _device_key(path: Path, master: MasterKey) -> SigningKey:
    from common.keys import SigningKey

    sealing_key = master.subkey("device-key")
    if path.exists():
        return SigningKey.load(path, sealing_key=sealing_key)
    key = SigningKey.generate()
    key.save(path, sealing_key=sealing_key)
    return key


def _policy(path: Path, given: Path | None, key: SigningKey) -> Policy:
    """Read the signed policy in force; one that is given now is the owner's word, and is signed and kept."""
    from client.policy import Policy

    if given is not None:
        try:
            granted = Policy.parse(given.read_bytes())
        except OSError as error:
            raise ConfigError(f"{given}: cannot be read: {error.strerror}") from None
        granted.save(path, key)
    elif not path.exists():
        Policy.model_validate({}).save(path, key)
    return Policy.load(path, key.verify_key)


def _ledger(path: Path, key: SigningKey) -> Ledger:
    """Continue the ledger of this device's subject, who is given a random name when it begins."""
    from common.ledger import Ledger

    if path.exists():
        return Ledger.open(path, key)
    return Ledger.create(path, key, {"role": "device", "subject": secrets.token_hex(16)})
