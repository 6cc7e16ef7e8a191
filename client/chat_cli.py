"""`homespun device chat|serve|open|feedback`: the owner's own model, used and corrected."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.errors import ConfigError, HomespunError, Refusal

if TYPE_CHECKING:
    from client.device_home import DeviceHome

__all__ = ["add_to", "chat_here"]

Json = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]
Ask = Callable[[str, list[tuple[str, str]], dict[str, Any]], Iterator[dict[str, Any]]]

HELP = """/base, /global, /personal  who answers from now on      /why    what stood before the last question
/good, /bad, /edit TEXT    say what the answer was worth  /keep   learn from the last question and its answer
/new                       forget this conversation       /quit   leave"""

feedback = typer.Typer(
    no_args_is_help=True,
    help="What you said about answers, and the pairs it makes.\n\nExample: homespun device feedback list",
    rich_markup_mode=None,
)


def add_to(app: typer.Typer) -> None:
    """Put these commands into `homespun device`."""
    app.command("chat")(chat)
    app.command("serve")(serve)
    app.command("open")(open_page)
    app.add_typer(feedback, name="feedback")


def chat(
    system: Annotated[str, typer.Option(help="who answers: base, global, personal, or a system of a run")] = "personal",
    prompt: Annotated[str | None, typer.Option(help="answer this and leave", show_default=False)] = None,
    tokens: Annotated[int, typer.Option(min=1, help="longest answer, in tokens")] = 256,
    temperature: Annotated[
        float | None, typer.Option(min=0, max=2, help="0 takes the likeliest token", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="repeats a draw", show_default=False)] = None,
    as_json: Json = False,
) -> int:
    """Talk to your own model. Nothing of it is kept unless you say so.

    Example: homespun device chat --system personal --prompt "What is my dog called?"
    """
    return chat_here(system, prompt, tokens, temperature, seed, as_json)


def chat_here(
    system: str, prompt: str | None, tokens: int, temperature: float | None, seed: int | None, as_json: bool
) -> int:
    """Answer one prompt, or as many as there are on standard input."""
    from client.owner_cli import open_home

    if as_json and prompt is None:
        raise ConfigError("chat: --json prints the answer to --prompt")
    home = open_home()
    ask = _answers_of(home)
    sampling: dict[str, Any] = {"max_tokens": tokens, "temperature": temperature, "seed": seed}
    if prompt is None:
        return _conversation(home, ask, system, sampling)
    if as_json:
        given, text, last = _collected(ask(system, [("user", prompt)], sampling))
        print(
            json.dumps({"system": system, "answer": text, "tokens": last["tokens"], "finish": last["finish"], **given})
        )
        return 0
    for piece in ask(system, [("user", prompt)], sampling):
        print(piece.get("text", ""), end="", flush=True)
    print()
    return 0


def serve(
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="port", show_default=False)] = None,
    beyond: Annotated[
        bool,
        typer.Option("--beyond-this-machine", help="yes, let other machines reach the endpoint, without TLS"),
    ] = False,
    new_key: Annotated[bool, typer.Option("--new-key", help="make another key; the one before is refused")] = False,
    as_json: Json = False,
) -> int:
    """Serve your models to programs that speak OpenAI's protocol, on this machine alone; shows address and key.

    A device that is up serves already: then this says where, and leaves. --host with another address than loopback is
    not enough to be reached from elsewhere; --beyond-this-machine says it a second time. Your page stays here anyway.

    Example: homespun device serve
    """
    from client.agent import noted_as_up
    from client.model_process import ModelProcess
    from client.owner_access import Access
    from client.owner_cli import open_home, refuse_passphrase
    from client.owner_host import begin_alone, owners_side
    from client.owner_line import OwnerLine
    from client.owner_server import LOOPBACK, is_loopback

    home = open_home()
    refuse_passphrase(home)
    if not is_loopback(host) and not beyond:
        raise Refusal("not-asked", f"{host} can be reached from other machines; --beyond-this-machine says so too")
    if beyond and is_loopback(host):
        raise ConfigError(f"serve: --beyond-this-machine needs --host; {host} is this machine alone")
    if new_key:
        Access(home).renew_key()
    line = OwnerLine(home)
    if line.is_up:
        if port is not None or host != LOOPBACK:
            raise Refusal(
                "vault-running", "this device serves already; `homespun device down` first, or leave them out"
            )
        _say_where(f"http://{LOOPBACK}:{line.ask('status')['port']}/v1", Access(home).key, as_json)
        return 0
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    process = ModelProcess(lambda: begin_alone(home))
    with noted_as_up(home.folder, serves=True):  # so that `down` and `forget` end it, and `backup` waits for that
        try:
            with owners_side(home, lambda: process, host=host, port=port) as side:
                _say_where(side.address, side.key, as_json)
                process.get_ready()
                if not is_loopback(host):
                    said = "other machines reach it without TLS: whoever reads the traffic reads the key"
                    print(said, file=sys.stderr)
                stop.wait()
        finally:
            process.end()
    return 0


def open_page(
    show: Annotated[bool, typer.Option("--print", help="print the link, and open nothing")] = False,
    as_json: Json = False,
) -> int:
    """Open your page: chat, compare, correct, see what was sent. The link is good once, for ten minutes.

    Example: homespun device open
    """
    import webbrowser

    from client.owner_cli import open_home
    from client.owner_host import page_link

    link = page_link(open_home())
    print(json.dumps({"link": link}) if as_json else link)
    if not show and not as_json:
        webbrowser.open(link)
    return 0


@feedback.command("list")
def list_feedback(as_json: Json = False) -> int:
    """List what you said about answers, the newest first.

    Example: homespun device feedback list
    """
    from dataclasses import asdict

    from client.feedback_store import FeedbackStore
    from client.owner_cli import open_home

    said = list(FeedbackStore(open_home()).all().items())[::-1]
    if as_json:
        print(json.dumps([{"id": name, **asdict(one)} for name, one in said]))
        return 0
    if not said:
        print("nothing yet; `homespun device feedback add`, /edit in a chat, or the page")
    for name, one in said:
        wanted = f" -> {_short(one.edited)}" if one.edited else ""
        print(f"{name[:8]}  {one.kind:<4}  {_short(one.prompt)}: {_short(one.answer)}{wanted}")
    return 0


@feedback.command("add")
def add_feedback(
    prompt: Annotated[str, typer.Option(help="what was asked")],
    answer: Annotated[str, typer.Option(help="what was answered")],
    better: Annotated[str | None, typer.Option(help="what should have been answered", show_default=False)] = None,
    good: Annotated[bool, typer.Option("--good/--bad", help="without --better: a thumb")] = True,
    as_json: Json = False,
) -> int:
    """Say what an answer was worth, or what it should have been; the next `device learn` uses it.

    Example: homespun device feedback add --prompt "Sign off" --answer "Best" --better "Cheers, Ada"
    """
    from client.feedback_store import FeedbackStore
    from client.owner_cli import open_home

    kind = "edit" if better is not None else "up" if good else "down"
    name = FeedbackStore(open_home()).add(prompt, answer, kind, better)
    print(json.dumps({"id": name}) if as_json else f"{name[:8]}: kept; `homespun device learn` uses it")
    return 0


@feedback.command("remove")
def remove_feedback(beginning: Annotated[str, typer.Argument(metavar="ID")], as_json: Json = False) -> int:
    """Take back what you said, and the pair that came of it.

    Example: homespun device feedback remove 3fa9c21b
    """
    from client.feedback_store import FeedbackStore
    from client.owner_cli import open_home

    FeedbackStore(open_home()).remove(beginning)
    print(json.dumps({"removed": beginning}) if as_json else "taken back")
    return 0


def _answers_of(home: DeviceHome) -> Ask:
    """Who answers: the resident process where the device is up, else a model that is opened here."""
    from client.owner_line import OwnerLine

    line = OwnerLine(home)
    if line.is_up:
        return lambda system, turns, sampling: line.chat(system, turns, sampling)
    import torch

    from client.base_model import SharedBase
    from client.learn_cli import base_of
    from client.personal_model import PersonalModel
    from client.speaker import SMALL_WIDTH, questions_of

    shared = SharedBase(base_of(home))
    torch.set_num_threads(home.policy().threads if shared.width >= SMALL_WIDTH else 1)
    model = PersonalModel(home, shared)

    def ask(system: str, turns: list[tuple[str, str]], sampling: dict[str, Any]) -> Iterator[dict[str, Any]]:
        asked = {"system": system, "turns": turns, "sampling": sampling}
        return questions_of(model, asked, lambda: False)

    return ask


def _collected(pieces: Iterator[dict[str, Any]]) -> tuple[dict[str, Any], str, dict[str, Any]]:
    given, *rest = list(pieces)
    used = given.pop("system")
    return {"used": used["is"], "why": used["why"], **given}, "".join(one["text"] for one in rest), rest[-1]


def _conversation(home: DeviceHome, ask: Ask, system: str, sampling: dict[str, Any]) -> int:
    turns: list[tuple[str, str]] = []
    kept: set[int] = set()
    given: dict[str, Any] = {}
    if sys.stdin.isatty():
        _have_it_ready(home)
        print(f"{system} answers. /help lists what else there is; an empty line leaves.")
    while (said := _line(f"{system}> ")) is not None:
        word, _, rest = said.partition(" ")
        if not said.startswith("/"):
            turns.append(("user", said))
            given, text = {}, ""
            for piece in ask(system, turns, sampling):
                given = given or piece
                text += piece.get("text", "")
                print(piece.get("text", ""), end="", flush=True)
            print()
            turns.append(("assistant", text))
        elif word in ("/base", "/global", "/personal"):
            system = word[1:]
        elif word == "/new":
            turns, kept = [], set()
        elif word == "/why":
            _say_why(given)
        elif word in ("/good", "/bad", "/edit", "/keep"):
            if not turns:
                print("nothing was answered yet")
            else:
                _correct(home, word, rest, turns[-2][1], turns[-1][1])
                kept.add(len(turns))
        elif word == "/quit":
            break
        else:
            print(HELP)
    open_turns = [place for place in range(2, len(turns) + 1, 2) if place not in kept]
    if open_turns and sys.stdin.isatty():
        words = "this answer" if len(open_turns) == 1 else f"these {len(open_turns)} answers"
        if typer.confirm(f"Learn from {words} too?", default=False):
            for place in open_turns:
                _correct(home, "/keep", "", turns[place - 2][1], turns[place - 1][1])
    return 0


def _have_it_ready(home: DeviceHome) -> None:
    """Let the resident process open its model while the first question is being typed."""
    from client.owner_line import OwnerLine

    line = OwnerLine(home)

    def ask() -> None:
        with suppress(HomespunError):  # the first question says it
            line.ask("systems")

    if line.is_up:
        threading.Thread(target=ask, name="model-ready", daemon=True).start()


def _line(shown: str) -> str | None:
    try:
        said = input(shown if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    return said or None


def _correct(home: DeviceHome, word: str, rest: str, asked: str, answered: str) -> None:
    import time

    from client.feedback_store import FeedbackStore
    from client.record_store import NewRecord, RecordStore
    from client.user_data import Record

    try:
        if word == "/keep":
            RecordStore(home).add([NewRecord(Record(asked, answered, time.time(), task="reply"), "chat")])
        else:
            kind = {"/good": "up", "/bad": "down", "/edit": "edit"}[word]
            FeedbackStore(home).add(asked, answered, kind, rest or None)
    except ConfigError as error:
        print(error)
        return
    print("kept; `homespun device learn` uses it")


def _say_why(given: dict[str, Any]) -> None:
    if not given:
        print("nothing was answered yet")
        return
    print(f"answered by {given['system']['is']}" + (f": {given['system']['why']}" if given["system"]["why"] else ""))
    for line in given["profile"]:
        print(f"profile: {line}")
    for record in given["records"]:
        print(
            f"record {record['id'][:8]} ({record['reason']}): {_short(record['prompt'])} {_short(record['response'])}"
        )
    if given["dropped_turns"]:
        print(f"{given['dropped_turns']} earlier turn(s) did not fit")


def _say_where(address: str, key: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"base_url": address, "api_key": key, "models": ["base", "global", "personal"]}), flush=True)
        return
    print(f"base_url  {address}\napi_key   {key}\nmodels    base, global, personal", flush=True)


def _short(text: str | None, most: int = 60) -> str:
    words = " ".join((text or "").split())
    return words if len(words) <= most else f"{words[: most - 1]}…"
