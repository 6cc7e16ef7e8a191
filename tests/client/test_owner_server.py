"""The owner's side as the official OpenAI client, a browser and an attacker meet it."""

from __future__ import annotations

import http.client
import json
import socket
import stat
import threading
from contextlib import contextmanager, suppress

import httpx
import openai
import pytest

from client.base_model import SharedBase
from client.device_home import DeviceHome
from client.model_process import ModelProcess
from client.owner_access import Access
from client.owner_host import owners_side, page_link
from client.owner_line import OwnerLine, owner_socket
from client.owner_server import MOST_BODY, is_loopback
from client.personal_model import PersonalModel
from client.record_store import RecordStore
from client.speaker import questions_of, system_facts
from common.errors import ConfigError, DataError, Refusal

SECRET = "nobody-may-read-this"


class HereProcess(ModelProcess):
    """The model in this process, asked as over the line."""

    def __init__(self, home, folder):
        super().__init__(dict)
        self._model = PersonalModel(home, SharedBase(folder))

    def talk(self, facts):
        if facts["do"] == "systems":
            yield {"systems": {name: system_facts(one) for name, one in self._model.systems().items()}}
            return
        yield from questions_of(self._model, facts, lambda: False)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))
    return DeviceHome.open(create=True)


@pytest.fixture
def side(home, tiny_base_folder):
    process = HereProcess(home, tiny_base_folder)
    with owners_side(home, lambda: process, port=0) as found:
        yield found


@contextmanager
def client_of(side, **options):
    with openai.OpenAI(**({"base_url": side.address, "api_key": side.key, "max_retries": 0} | options)) as client:
        yield client


def asked(**changes):
    return {"model": "base", "messages": [{"role": "user", "content": "w5 w6"}], "max_tokens": 6} | changes


def page(side, session=None):
    headers = {"authorization": f"Bearer {session}"} if session else {}
    return httpx.Client(base_url=f"http://127.0.0.1:{side.port}", headers=headers, timeout=60)


def test_the_official_client_chats_streams_and_lists_models(side):
    with client_of(side) as client:
        assert [model.id for model in client.models.list()] == ["base", "global", "personal"]
        assert client.models.retrieve("personal").id == "personal"
        whole = client.chat.completions.create(**asked())
        assert whole.choices[0].finish_reason in ("stop", "length")
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
        assert 1 <= whole.usage.completion_tokens <= 6
        chunks = list(client.chat.completions.create(**asked(stream=True, stream_options={"include_usage": True})))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content
        assert chunks[-1].usage == whole.usage
        assert len(chunks) > 3
        seeded = asked(temperature=1.5, top_p=0.9, seed=7)
        assert (
            client.chat.completions.create(**seeded).choices[0].message.content
            == client.chat.completions.create(**seeded).choices[0].message.content
        )
        stop = text.split()[1]
        ended = asked(stop=[stop], max_tokens=20, extra_body={"new_field": 1})
        stopped = client.chat.completions.create(**ended).choices[0]
        assert (stopped.finish_reason, stop in stopped.message.content) == ("stop", False)
        with client.chat.completions.stream(**ended) as events:
            assert events.get_final_completion().choices[0].message.content == stopped.message.content


def test_the_official_client_understands_every_refusal(side):
    with client_of(side, api_key="wrong") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.chat.completions.create(**asked())
    with client_of(side) as client:
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(**asked(model="gpt-9"))
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-9")
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(**asked(temperature=7))
        assert bad.value.param == "temperature"
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="base", input="x")


@pytest.mark.parametrize("path", ["/v1/models", "/owner/status", "/owner/profile", "/owner/nothing", "/v1/x"])
def test_nothing_is_told_without_a_key(side, path):
    with page(side) as browser:
        for headers in ({}, {"authorization": f"Bearer {side.key}x"}, {"authorization": f"Basic {side.key}"}):
            answer = browser.get(path, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert browser.post(path, json={}).status_code == 401


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1.evil.example:{port}", "", "localhost."]
)
def test_a_name_that_is_not_this_machines_is_turned_away(side, host):
    for path in ("/", "/v1/models"):
        line = http.client.HTTPConnection("127.0.0.1", side.port)
        line.putrequest("GET", path, skip_host=True)
        line.putheader("Host", host.format(port=side.port))
        line.putheader("Authorization", f"Bearer {side.key}")
        line.endheaders()
        assert line.getresponse().status in (400, 403)
        line.close()


def test_a_page_of_another_origin_is_turned_away_and_told_nothing(side):
    with page(side, side.key) as browser:
        for origin in ("http://evil.example", "null", f"http://localhost:{side.port}", "http://127.0.0.1:1"):
            answer = browser.get("/v1/models", headers={"origin": origin})
            assert answer.status_code == 403
            assert "access-control-allow-origin" not in answer.headers
        own = f"http://127.0.0.1:{side.port}"
        assert browser.get("/v1/models", headers={"origin": own}).status_code == 200
        assert browser.options("/v1/models", headers={"origin": "http://evil.example"}).status_code == 403


def test_a_request_that_is_too_large_is_refused_said_or_not(side):
    with page(side, side.key) as browser:
        assert browser.post("/v1/chat/completions", content=b"x" * (MOST_BODY + 1)).status_code == 413

        def pieces():
            for _ in range(40):
                yield b"x" * (MOST_BODY // 20)

        assert browser.post("/v1/chat/completions", content=pieces()).status_code == 413
        assert browser.get("/v1/models").status_code == 200


def test_the_page_is_shut_tight_and_holds_no_data(side, home):
    with page(side) as browser:
        answer = browser.get("/")
        other = browser.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert policy != other.headers["content-security-policy"]  # a nonce is used once
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-store"
    assert "set-cookie" not in answer.headers
    assert side.key not in answer.text
    assert "http" not in answer.text.replace("http-equiv", "")


def test_a_link_opens_a_session_once(side, home):
    address, _, ticket = page_link(home).partition("#")
    assert address == f"http://127.0.0.1:{side.port}/"
    with page(side) as browser:
        session = browser.post("/session", json={"ticket": ticket}).json()["session"]
        assert browser.post("/session", json={"ticket": ticket}).status_code == 401
    with page(side, session) as browser:
        assert browser.get("/owner/status").json()["state"] == "alone"


def test_the_owner_reads_and_corrects_over_the_socket(side, home):
    line = OwnerLine(home)
    assert line.is_up
    assert stat.S_IMODE(owner_socket(home).stat().st_mode) == 0o600
    assert line.ask("profile", {"line": 1, "text": "My dog is called Rufus."})["lines"][0]["kind"] == "own words"
    with pytest.raises(ConfigError, match="line"):
        line.ask("profile", {"line": 9, "text": "x"})
    assert line.ask("delete-line", {"line": 1})["lines"] == []
    given, *pieces = list(line.chat("personal", [("user", "w5 w6")], {"max_tokens": 5}))
    assert given["system"]["why"] == "nothing was learned from your records yet"
    assert pieces[-1]["done"]
    with pytest.raises((DataError, Refusal)):
        list(line.chat("nobody", [("user", "w5")], {}))
    answer = "".join(piece["text"] for piece in pieces)
    assert len(RecordStore(home)) == 0  # a chat is kept by nobody
    found = line.ask("feedback", {"prompt": "w5 w6", "answer": answer, "kind": "edit", "edited": "w9"})
    assert found["pairs"] == 1
    assert line.ask("feedback")["feedback"][0]["edited"] == "w9"
    assert line.ask("remove-feedback", {"id": found["id"]})["feedback"] == []
    assert line.ask("keep", {"prompt": "w5", "response": "w6"})["records"] == 1
    assert line.ask("use", {"system": "retrieval"})["use"] == "retrieval"
    assert line.ask("systems")["personal"]["is"] == "retrieval"
    assert not next(
        one for one in line.ask("level", {"name": "retrieval", "on": False})["levels"] if one["name"] == "retrieval"
    )["on"]
    with pytest.raises(Refusal, match="paused"):
        line.ask("pause", {"paused": True})
    with pytest.raises(DataError):
        line.ask("nothing-of-the-kind")


@pytest.mark.parametrize(
    ("what", "values"),
    [
        ("pause", {}),
        ("pause", {"paused": "yes"}),
        ("level", {"name": "profile"}),
        ("level", {"name": "profile", "on": 0}),
    ],
)
def test_a_change_that_does_not_say_which_way_changes_nothing(side, what, values):
    with page(side, side.key) as browser:
        before = browser.get("/owner/levels").json()
        answer = browser.post(f"/owner/{what}", json=values)
        assert answer.status_code == 400
        assert "true or false" in answer.json()["error"]["message"]
        assert browser.get("/owner/levels").json() == before


def test_a_change_that_ends_in_the_middle_changes_nothing(side, monkeypatch):
    changed = []
    monkeypatch.setattr("client.owner_desk.OwnersDesk.pause", lambda self, *, paused: changed.append(paused) or {})
    lines = ("POST /owner/pause HTTP/1.1", "host: 127.0.0.1", f"authorization: Bearer {side.key}", "content-length: 99")
    with socket.create_connection(("127.0.0.1", side.port)) as line:
        line.sendall("\r\n".join([*lines, "", '{"paused": tr']).encode())
    with page(side, side.key) as browser:
        assert browser.get("/owner/levels").status_code == 200
    assert changed == []


def test_what_was_sent_and_spent_is_said_with_its_unit(make_fleet, monkeypatch, tiny_base_folder):
    fleet = make_fleet("local")
    monkeypatch.setenv("HOMESPUN_HOME", str(fleet.home))
    home = DeviceHome.open(fleet.devices[0])
    process = HereProcess(home, tiny_base_folder)
    with owners_side(home, lambda: process, port=0):
        line = OwnerLine(home)
        sent, budget = line.ask("sent"), line.ask("budget")
    assert sent["releases"] == len(sent["newest"]) > 0
    assert sent["bytes"] == sum(one["bytes"] for one in sent["newest"])
    assert sent["words"].endswith("of numbers, no text")
    assert "delta" in budget["sentence"]
    assert budget["unit"] == "user"
    assert 0 < budget["released"] <= budget["reserved"] <= budget["limit"]
    assert budget["releases"] == sent["releases"]


def test_another_one_on_the_same_address_is_told_so_and_a_port_is_kept(home, tiny_base_folder):
    process = HereProcess(home, tiny_base_folder)
    with owners_side(home, lambda: process) as first:
        port = first.port
        with pytest.raises(ConfigError, match="cannot be listened on"), owners_side(home, lambda: process, port=port):
            pass
    with owners_side(home, lambda: process) as again:
        assert again.port == port


def test_a_line_whose_answer_is_under_way_is_closed_at_the_end(home, tiny_base_folder):
    ends, began = threading.Event(), threading.Event()

    class Slow(HereProcess):
        def talk(self, facts):
            began.set()
            ends.wait(60)
            yield from super().talk(facts)

    process = Slow(home, tiny_base_folder)
    with owners_side(home, lambda: process, port=0) as side:
        body = json.dumps(asked(stream=True)).encode()
        line = socket.create_connection(("127.0.0.1", side.port))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {side.key}\r\n"
        line.sendall(head.encode() + f"content-length: {len(body)}\r\n\r\n".encode() + body)
        assert began.wait(60)
    line.settimeout(60)
    with line, suppress(ConnectionResetError):
        assert line.recv(100) == b""
    ends.set()


def test_only_the_endpoint_answers_on_another_address(home, tiny_base_folder):
    process = HereProcess(home, tiny_base_folder)
    with owners_side(home, lambda: process, host="127.0.0.1", port=0) as side:
        assert is_loopback("127.0.0.1")
        with page(side, side.key) as browser:
            assert browser.get("/owner/levels").status_code == 200
    assert not is_loopback("0.0.0.0")  # noqa: S104
    assert not is_loopback("192.168.1.5")
    assert not is_loopback("example.org")


def test_no_text_is_in_an_error_or_a_log(side, home, caplog, capfd):
    caplog.set_level(0)
    with page(side, side.key) as browser:
        for body in (SECRET.encode(), json.dumps({"model": SECRET, "messages": SECRET}).encode()):
            for path in ("/v1/chat/completions", "/owner/profile", "/session"):
                assert SECRET not in browser.post(path, content=body).text
        wrong = {"messages": [{"role": "user", "content": SECRET}], "model": "base", "temperature": SECRET}
        assert SECRET not in browser.post("/v1/chat/completions", json=wrong).text
    assert SECRET not in caplog.text
    out = capfd.readouterr()
    assert SECRET not in out.out + out.err


def test_many_ask_at_once(side):
    texts, lock = [], threading.Lock()

    def ask():
        with client_of(side) as client:
            found = client.chat.completions.create(**asked(max_tokens=10)).choices[0].message.content
        with lock:
            texts.append(found)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 8
    assert len(set(texts)) == 1
    assert Access  # the key is checked for each


def test_half_a_character_is_answered_and_never_a_fault_of_the_server(side, home):
    headers = {"authorization": f"Bearer {side.key}", "content-type": "application/json"}
    half = '{"model": "base", "max_tokens": 2, "messages": [{"role": "user", "content": "w5 \\ud83d"}]}'
    said = '{"prompt": "w1 \\ud83d", "answer": "w2", "kind": "up"}'
    with httpx.Client(base_url=f"http://127.0.0.1:{side.port}", headers=headers, timeout=60) as client:
        for path, body, status in [
            ("/v1/chat/completions", half, 200),
            ("/v1/chat/completions", half.replace('"base"', '"\\ud800"'), 404),
            ("/v1/chat/completions", half.replace('"user"', '"\\ud800"'), 400),
            ("/owner/chat", half, 200),
            ("/owner/feedback", said, 200),
            ("/owner/keep", '{"prompt": "w3", "response": "w4 \\ude42"}', 200),
            ("/owner/profile", '{"line": 1, "text": "\\ud83d"}', 400),
            ("/owner/level", '{"name": "\\ud83d", "on": true}', 400),
        ]:
            assert client.post(path, content=body).status_code == status, (path, body)
        assert client.get("/owner/feedback").json()["feedback"][0]["prompt"] == "w1 \ufffd"
    assert [one.record.response for one in RecordStore(home).records()] == ["w2", "w4 \ufffd"]
