"""A base model on its way to a device: cut lines, bad servers, sticks, and another model than was named."""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import json
import re
import ssl
import subprocess
import sys
import threading
import time
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from client import base_fetch
from client.base_fetch import fetch_base
from common.errors import DataError, Refusal
from common.fleet import Base
from common.model_files import digest_of_files, model_digest

CONTENT = bytes(range(256)) * 400
SUM = "2" * 64
NAMES = ("config.json", "model.safetensors", "tokenizer.json")


class Server:
    """A web server on loopback that hands a folder over, as badly as it is told to."""

    def __init__(self, folder, certificate=None):
        self.folder, self.asked, self.cut_after, self.ranges = folder, [], None, True
        self.hold_after, self.goes_on = None, threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                name = self.path.partition("?")[0].removeprefix("/")
                start = int(re.findall("[0-9]+", self.headers.get("range", "bytes=0-"))[0])
                outer.asked.append((name, start))
                path = outer.folder / name
                if not path.is_file():
                    self.send_error(404)
                    return
                content = path.read_bytes()
                start = start if outer.ranges else 0
                if start >= len(content) > 0:
                    self.send_response(416)
                    self.send_header("content-length", "0")
                    self.end_headers()
                    return
                self.send_response(206 if start else 200)
                self.send_header("content-length", str(len(content) - start))
                self.end_headers()
                rest = content[start:]
                if outer.cut_after is not None and name.endswith("safetensors"):
                    self.wfile.write(rest[: outer.cut_after])
                    self.wfile.flush()
                    self.connection.shutdown(2)
                    self.close_connection = True
                    return
                if outer.hold_after is not None:
                    self.wfile.write(rest[: outer.hold_after])
                    rest = rest[outer.hold_after :]
                    self.wfile.flush()
                    outer.goes_on.wait(240)
                self.wfile.write(rest)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.scheme = "http"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
            self.scheme = "https"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    @property
    def address(self):
        return f"{self.scheme}://127.0.0.1:{self.server.server_address[1]}/"

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class Coordinator:
    """The other end of a device's line, as far as base models go."""

    def __init__(self, folder, files=None):
        self.folder, self.asked, self.listed = folder, [], files

    def base_files(self, digest):  # noqa: ARG002
        if self.listed is not None:
            return self.listed
        return [{"name": path.name, "bytes": path.stat().st_size} for path in sorted(self.folder.iterdir())]

    def base_part(self, digest, name, offset):  # noqa: ARG002
        self.asked.append((name, offset))
        yield (self.folder / name).read_bytes()[offset:]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(base_fetch, "WAIT_SECONDS", 0.0)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(CONTENT)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "files.json").write_text(json.dumps(["config.json", "model.safetensors", "tokenizer.json"]))
    return folder


@pytest.fixture
def serve():
    """A function that makes servers."""
    made = []

    def make(folder, certificate=None):
        made.append(Server(folder, certificate))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def fetch(tmp_path, model):
    """A function that fetches `model` from sources, and what was counted."""

    def run(*sources, link=None, allowed=100.0, digest=None):
        base = Base(digest=digest or model_digest(model), name="it", megabytes=0.1, sources=sources)
        return fetch_base(
            base,
            tmp_path / "models",
            link,
            allowed_megabytes=allowed,
            say=lambda text: None,
            count=run.counted.append,
        )

    run.counted = []
    return run


def test_a_web_server_gives_the_model_and_every_byte_is_counted(fetch, serve, model):
    server = serve(model)
    place = fetch(server.address)
    assert model_digest(place) == model_digest(model)
    assert sum(fetch.counted) == sum(
        (model / name).stat().st_size for name in ("config.json", "model.safetensors", "tokenizer.json")
    )
    fetch(server.address)
    assert len(server.asked) == 4  # the list and three files; the second time it is here


def test_https_is_taken_where_the_certificate_is_known_and_nowhere_else(fetch, serve, model, tmp_path, monkeypatch):
    server = serve(model, self_signed(tmp_path))
    with pytest.raises(DataError, match="cannot be fetched"):
        fetch(server.address)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))
    assert model_digest(fetch(server.address)) == model_digest(model)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_line_that_is_cut_again_and_again_gives_the_model_and_no_byte_twice(fetch, serve, model, ranges):
    server = serve(model)
    server.cut_after, server.ranges = 30_000, ranges
    if not ranges:  # such a server begins anew each time; what was here is passed over
        server.cut_after = 70_000
        with pytest.raises(DataError, match="does not go on"):
            fetch(server.address)
        server.cut_after = None
    assert model_digest(fetch(server.address)) == model_digest(model)
    starts = [start for name, start in server.asked if name == "model.safetensors"]
    assert len(starts) > 1
    assert starts == sorted(starts)
    if ranges:
        assert sum(fetch.counted) <= len(CONTENT) + 100


def test_a_line_that_gives_nothing_any_more_is_given_up(fetch, serve, model):
    server = serve(model)
    server.cut_after = 0
    with pytest.raises(DataError, match="ends after 0 bytes"):
        fetch(server.address)


def test_a_process_that_is_killed_leaves_a_part_that_is_completed(serve, model, tmp_path, fetch):
    server = serve(model)
    server.hold_after = 50_000
    code = (
        "import sys; from pathlib import Path\n"
        "from client.base_fetch import fetch_base; from common.fleet import Base\n"
        "base = Base(digest=sys.argv[1], name='it', sources=(sys.argv[2],))\n"
        "fetch_base(base, Path(sys.argv[3]), None, allowed_megabytes=9, say=print, count=print)\n"
    )
    words = [model_digest(model), server.address, str(tmp_path / "models")]
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", code, *words], cwd=root, stdout=subprocess.DEVNULL)
    part = tmp_path / "models" / f"{words[0][:16]}.part" / "model.safetensors.part"
    while not (part.exists() and part.stat().st_size > 8192):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    have = part.stat().st_size
    assert have < len(CONTENT)
    server.hold_after, server.asked = None, []
    server.goes_on.set()
    assert model_digest(fetch(server.address)) == model_digest(model)
    assert ("model.safetensors", have) in server.asked
    assert sum(fetch.counted) == len(CONTENT) - have + len('{"a": 1}')


def test_the_days_megabytes_end_a_fetch_and_the_next_day_goes_on(fetch, serve, model):
    server = serve(model)
    for day in range(1, 4):
        with pytest.raises(Refusal, match="tomorrow") as refused:
            fetch(server.address, allowed=0.03)
        assert refused.value.code == "megabytes"
        assert sum(fetch.counted) == day * 30_000
    assert model_digest(fetch(server.address, allowed=0.03)) == model_digest(model)
    with pytest.raises(Refusal):
        fetch(server.address, allowed=0.0, digest="0" * 64)


def test_another_model_is_thrown_away_and_the_next_source_asked(fetch, serve, model, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    for path in model.iterdir():
        (bad / path.name).write_bytes(path.read_bytes())
    (bad / "model.safetensors").write_bytes(CONTENT[::-1])
    server, good = serve(bad), serve(model)
    with pytest.raises(Refusal, match="thrown away") as refused:
        fetch(server.address)
    assert refused.value.code == "model-mismatch"
    assert not [path for path in (tmp_path / "models").rglob("*") if path.is_file()]
    assert model_digest(fetch(server.address, str(bad), good.address)) == model_digest(model)


def test_a_list_with_digests_is_found_out_before_a_byte_of_a_file_comes(fetch, serve, model):
    (model / "files.json").write_text(json.dumps([{"name": name, "bytes": 10, "sha256": SUM} for name in NAMES]))
    server = serve(model)
    with pytest.raises(Refusal, match="another model"):
        fetch(server.address)
    assert [name for name, _ in server.asked] == ["files.json"]


def test_a_file_that_is_another_than_was_listed_is_thrown_away_alone(fetch, serve, model, tmp_path):
    names = ("config.json", "model.safetensors", "tokenizer.json")

    listed = [
        {
            "name": name,
            "bytes": (model / name).stat().st_size,
            "sha256": hashlib.sha256((model / name).read_bytes()).hexdigest(),
        }
        for name in names
    ]
    assert digest_of_files({one["name"]: one["sha256"] for one in listed}) == model_digest(model)
    (model / "files.json").write_text(json.dumps(listed))
    digest, server = model_digest(model), serve(model)
    (model / "model.safetensors").write_bytes(CONTENT[::-1])
    with pytest.raises(Refusal, match="another file"):
        fetch(server.address, digest=digest)
    kept = {path.name for path in (tmp_path / "models").rglob("*") if path.is_file()}
    assert kept == {"config.json"}


@pytest.mark.parametrize(
    "listed",
    [
        [],
        {},
        "config.json",
        [{"name": "../x.json"}],
        [{"name": "/etc/passwd"}],
        [{"bytes": 3}],
        [3],
        [{"name": "config.json", "bytes": -1}],
        [{"name": "config.json", "bytes": "many"}],
        [{"name": "config.json", "sha256": "x"}],
        ["config.json"] * 1000,
    ],
)
def test_a_list_that_is_none_is_refused(fetch, model, listed, tmp_path):
    with pytest.raises(DataError, match="its list"):
        fetch("coordinator", link=Coordinator(model, listed))
    assert not [path for path in (tmp_path / "models").rglob("*") if path.is_file()]


def test_a_coordinator_that_sends_more_than_it_listed_fills_no_disk(fetch, model, tmp_path):
    listed = [{"name": path.name, "bytes": min(path.stat().st_size, 1000)} for path in model.iterdir()]
    with pytest.raises(Refusal, match="another model"):
        fetch("coordinator", link=Coordinator(model, listed))
    assert sum(fetch.counted) <= 2000


def test_what_no_digest_names_is_not_fetched(fetch, model):
    (model / "modeling.py").write_text("raise SystemExit")
    (model / "generation_config.json").write_text("{}")
    link = Coordinator(model)
    place = fetch("coordinator", link=link)
    assert {path.name for path in place.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}


def test_a_folder_is_used_where_it_lies_and_copied_from_a_stick(fetch, model, monkeypatch, tmp_path):
    assert fetch(str(model)) == model
    monkeypatch.setattr(base_fetch, "_may_go_away", lambda found, folder: True)
    place = fetch(str(model))
    assert place != model
    assert model_digest(place) == model_digest(model)
    assert sum(fetch.counted) == 0  # a stick is no traffic
    for path in model.iterdir():
        path.unlink()
    assert fetch(str(model), digest=model_digest(place)) == place


@pytest.mark.parametrize("allowed", [0.0, 0.03])
def test_a_stick_is_copied_also_when_the_days_megabytes_are_used_up(fetch, model, monkeypatch, allowed):
    monkeypatch.setattr(base_fetch, "_may_go_away", lambda found, folder: True)
    assert model_digest(fetch(str(model), allowed=allowed)) == model_digest(model)


def test_a_folder_on_another_file_system_may_go_away(tmp_path):
    other = Path("/dev/shm")  # noqa: S108
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("one file system only")
    assert base_fetch._may_go_away(other, tmp_path / "models")
    assert not base_fetch._may_go_away(tmp_path, tmp_path / "models")


def test_the_hub_is_asked_for_the_digested_files_of_a_repository(fetch, serve, model, tmp_path, monkeypatch):
    from huggingface_hub import constants

    root = tmp_path / "hub"
    (root / "api/models/us/it/revision").mkdir(parents=True)
    entries = [{"rfilename": path.name, "size": path.stat().st_size} for path in sorted(model.iterdir())]
    entries += [{"rfilename": "onnx/model.onnx", "size": 10**9}, {"rfilename": "pytorch_model.bin", "size": 10**9}]
    (root / "api/models/us/it/revision/main").write_text(json.dumps({"siblings": entries}))
    (root / "us/it/resolve").mkdir(parents=True)
    (root / "us/it/resolve/main").symlink_to(model)
    server = serve(root)
    server.cut_after = 50_000
    monkeypatch.setattr(constants, "ENDPOINT", server.address.rstrip("/"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    assert model_digest(fetch("hub:us/it")) == model_digest(model)
    assert all("onnx" not in name and ".bin" not in name for name, _ in server.asked)


def test_the_hub_is_not_asked_where_that_was_forbidden(fetch, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="HF_HUB_OFFLINE"):
        fetch("hub:us/it")


def test_a_model_that_nobody_has_is_said_with_every_source(fetch, serve, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError) as missing:
        fetch(serve(empty).address, str(tmp_path / "no-stick"))
    assert "cannot be fetched" in str(missing.value)
    assert "no-stick" in str(missing.value)


def self_signed(folder):
    """A certificate of 127.0.0.1 and its key, in one file."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a web server")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(address, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "certificate.pem").write_bytes(made.public_bytes(pem))
    (folder / "both.pem").write_bytes(made.public_bytes(pem) + secret)
    return folder / "both.pem"


class EndlessList(Server):
    """A web server whose list of files does not end."""

    def __init__(self):
        super().__init__(Path("nowhere"))
        handler, self.sent = self.server.RequestHandlerClass, 0

        def do_GET(request):
            request.send_response(200)
            request.end_headers()
            request.close_connection = True
            try:
                while self.sent < 1 << 26:
                    request.wfile.write(b" " * 65536)
                    self.sent += 65536
            except OSError:
                pass

        handler.do_GET = do_GET


def test_a_list_that_does_not_end_is_not_read_to_its_end(fetch):
    server = EndlessList()
    with closing(server), pytest.raises(DataError, match="no list of files"):
        fetch(server.address)
    assert server.sent < 1 << 25
