"""`homespun device ...`: what the owner of a device runs."""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from client import chat_cli, data_cli, fleet_cli, learn_cli, levels_cli, owner_cli, rights_cli
from common.errors import ConfigError, DataError

if TYPE_CHECKING:
    from client.user_data import User

__all__ = ["app"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help=f"The vault of this device: what it holds, what it may send, what it sent.\n\n\b\n{rights_cli.WHAT_IS_KEPT}",
    rich_markup_mode=None,
)

owner_cli.add_to(app)
fleet_cli.add_to(app)
levels_cli.add_to(app)
chat_cli.add_to(app)
data_cli.add_to(app)
learn_cli.add_to(app)
rights_cli.add_to(app)

OUTBOX = "outbox"


@app.command("up")
def up(
    detach: Annotated[bool, typer.Option(help="go on in the background")] = False,
    data: Annotated[
        Path | None, typer.Option(help="without a federation: JSON lines of users", show_default=False)
    ] = None,
    user: Annotated[str | None, typer.Option(help="... which of them is the owner", show_default=False)] = None,
    model: Annotated[
        str | None, typer.Option(help="... base model: a Hugging Face folder or a hub name", show_default=False)
    ] = None,
    socket: Annotated[
        Path | None, typer.Option(help="... Unix socket that a SuperNode's node-config names", show_default=False)
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="... TOML of what the owner grants; kept signed", show_default=False)
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="... LoRA rank of the runs that are joined")] = 2,
    alpha: Annotated[
        float | None, typer.Option(help="... LoRA alpha; 2 x rank when absent", show_default=False)
    ] = None,
    targets: Annotated[str, typer.Option(help="... linear layers that carry an adapter")] = "q_proj,v_proj",
    max_tokens: Annotated[int, typer.Option(min=8, help="... a record is cut to this many tokens")] = 64,
    roster: Annotated[
        Path | None,
        typer.Option(
            help="... JSON list of the keys of all enrolled devices; without it secure sums are refused",
            show_default=False,
        ),
    ] = None,
) -> int:
    """Run this device until it is told to stop: its vault and page, and in a federation that it joined a SuperNode.

    With --socket, serve a vault alone, for who brings a SuperNode of their own.

    Example: homespun device up --detach
    """
    if socket is None:
        if any(given is not None for given in (data, user, model, policy)):
            raise ConfigError("up: data, user, model and policy were given by joining; with --socket, a vault alone")
        return fleet_cli.up_here(detach)
    if data is None or user is None or model is None:
        raise ConfigError("up: --socket serves a vault alone and needs --data, --user and --model")
    return _vault_alone(data, user, model, socket, policy, rank, alpha, targets, max_tokens, roster)


def _vault_alone(
    data: Path,
    user: str,
    model: str,
    socket: Path,
    policy: Path | None,
    rank: int,
    alpha: float | None,
    targets: str,
    max_tokens: int,
    roster: Path | None,
) -> int:
    from client.base_model import load_base
    from client.budget_keeper import BudgetKeeper
    from client.device_home import DeviceHome
    from client.gate import Gate
    from client.preflight import Preflight
    from client.round_states import StoredStates
    from client.secure_sums import sums_of_device
    from client.trainer import Trainer
    from client.user_data import Encoder
    from client.vault import Vault, encode_user
    from client.vault_service import FleetService, Outbox, serving
    from common.model_files import model_folder
    from common.wire import ReleaseSpec

    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", level=logging.WARNING)
    own = read_user(data, user)
    home = DeviceHome.open(create=True, say=lambda text: typer.echo(text, err=True))
    if policy is not None:
        home.grant(owner_cli.policy_from(policy))
    with ExitStack() as stack:
        keeper = BudgetKeeper(home, stack.enter_context(home.open_ledger()))
        subject = keeper.subject
        base = load_base(model_folder(model), tuple(part.strip() for part in targets.split(",")))
        trainer = Trainer(base, rank=rank, scaling=(2.0 * rank if alpha is None else alpha) / rank)
        silo = home.policy().units == ("example",)  # a party, whose records are split one by one
        encoded = encode_user(own, Encoder(base.tokenizer, max_tokens), by_record=silo)
        preflight = Preflight(trainer)

        def grants(spec: ReleaseSpec, number: int) -> None:
            keeper.check(spec, number)
            preflight.check(spec)

        vault = Vault(
            trainer,
            {subject: encoded}.__getitem__,
            seed=int.from_bytes(home.master.subkey("training-order")[:8]) >> 1,
            residents=[subject],
            gate=Gate(keeper.record, keep=keeper.keep),
            grants=grants,
            states=StoredStates(home.open_kept, base.digest),
            sums=sums_of_device(home, keeper, roster),
        )
        outbox = Outbox(home.folder / OUTBOX, home.master.subkey("outbox"))
        service = FleetService(vault, outbox, model=base.digest)
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        stack.enter_context(serving(service, socket, dim=trainer.layout.size))
        place = {"subject": subject, "socket": str(socket.absolute()), "model": base.digest}
        typer.echo(json.dumps({**place, "key": home.key.verify_key.hex}))
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
