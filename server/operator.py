"""What the operator's commands do: settings, invites, and copies of the coordinator that may be put back."""

from __future__ import annotations

import io
import json
import re
import secrets
import sqlite3
import tarfile
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

from common.config import RunConfig, load_config, read_config_file
from common.errors import ConfigError, DataError, Refusal
from common.files import make_private_folder, write_private_file
from common.fleet import FORMAT, Asks, Base, Invite
from common.formats import written
from common.keys import SigningKey
from common.ledger import verify
from common.model_files import base_folder, model_digest
from common.places import state_home
from common.secure_sum import SecureSum
from common.traffic import traffic_of
from common.vouched_roster import Grant, federation_of
from common.wire import ReleaseSpec
from server import fleet_runs, run_folder
from server.certificates import Authority
from server.device_calls import base_files
from server.enrolment import Enrolment
from server.server_home import ServerHome, check_address

__all__ = ["backup", "make_invite", "new_run", "read_duration", "restore", "settle_address"]

BACKUP_FORMAT = 1
LEFT_OUT = ("flower", "coordinator.json", "coordinator.lock", "coordinator.log")
WRITER_KEY, ENROLLER = "writer.key", "enroller.key"
_DURATION = re.compile(r"([1-9][0-9]*)([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def read_duration(text: str) -> timedelta:
    """Read `7d`, `12h` or `90s`.

    Raises:
        ConfigError: It is no such time.
    """
    found = _DURATION.fullmatch(text)
    if found is None:
        raise ConfigError(f"{text}: write a time as 90s, 30m, 12h, 7d or 4w")
    return timedelta(seconds=int(found[1]) * _SECONDS[found[2]])


def settle_address(home: ServerHome, address: str | None, listen: str | None) -> None:
    """Settle where devices reach the coordinator, and where it listens for that.

    Raises:
        ConfigError: One of them is not `host:port`, or none was ever given.
        Refusal: The name changed: devices that are enrolled know the coordinator by it.
    """
    kept = home.settings()
    address = address or str(kept.get("address", "127.0.0.1:9443"))
    for one in (address, listen):
        if one is not None:
            check_address(one)
    if kept.get("address", address) != address and Enrolment(home.devices).devices():
        raise Refusal("address", f"enrolled devices know this coordinator as {kept['address']}; keep that name")
    before = kept.get("listen")
    if before is not None and before == _listens_for(str(kept.get("address", address))):
        before = None  # nobody chose it: it follows the address
    home.change_settings(
        address=address,
        listen=listen or before or _listens_for(address),
        name=kept.get("name") or f"federation-{secrets.token_hex(3)}",
    )


def _listens_for(address: str) -> str:
    host, _, port = address.rpartition(":")
    return f"{'127.0.0.1' if host in ('localhost', '127.0.0.1') else '0.0.0.0'}:{port}"  # noqa: S104


def spec_of(config: RunConfig, population: int) -> tuple[ReleaseSpec, Path]:
    """What a run of this configuration would ask of devices, and the folder of its base."""
    model = base_folder(config.model)
    spec, _ = run_folder.prepare_spec(fleet_runs.for_devices(config), population=population, model=model)
    return spec, model


def make_invite(
    home: ServerHome,
    config: RunConfig | None,
    *,
    uses: int,
    lasts: timedelta,
    approves: bool,
    sources: tuple[str, ...],
    version: str,
    now: datetime,
    enroller: Path | None = None,
) -> Invite:
    """Make an invite; what it asks for is that of `config`, or of the invite before.

    The enroller's key signs it; it lies in the coordinator's folder unless `enroller` names another file, which is
    made where it is missing. Every invite of a coordinator is signed with one and the same.

    Raises:
        ConfigError: No configuration was ever given, or it does not fit its base.
        DataError: The coordinator was never started, so that it has no address.
    """
    settings = home.settings()
    if "address" not in settings:
        raise DataError("the coordinator has no address yet; `homespun server up --address HOST:PORT` settles it")
    if config is not None:
        population = config.users or uses
        spec, model = spec_of(config, population)
        digest = model_digest(model)
        size = sum(path.stat().st_size for path in base_files(model)) / 1e6
        settings = home.change_settings(
            bases={**settings.get("bases", {}), digest: str(model.resolve())},
            base={"digest": digest, "name": config.model if "/" not in config.model else model.name, "megabytes": size},
            asks=_asks(spec).model_dump(),
        )
    if "asks" not in settings:
        raise ConfigError("invite: name the configuration of the runs that are planned, with --config")
    authority = Authority.open(home.tls, now=now)
    signer = _enroller(home, home.folder / ENROLLER if enroller is None else enroller)
    federation = federation_of(authority.root.read_text(encoding="ascii"))
    token = Enrolment(home.devices).invite(
        uses=uses,
        now=now,
        expires=now + lasts,
        approves=approves,
        grant=lambda invite, times: Grant.sign(signer, federation, invite, times),
    )
    return Invite(
        format=written(FORMAT),
        name=settings["name"],
        address=settings["address"],
        authority=authority.root.read_text(encoding="ascii"),
        writer=run_folder.signing_key().verify_key.hex,
        token=token,
        expires=now + lasts,
        asks=Asks(**settings["asks"]),
        base=Base(**settings["base"], sources=sources),
        version=version,
        enroller=signer.verify_key.hex,
    )


def _enroller(home: ServerHome, path: Path) -> SigningKey:
    """The key that signs invites.

    Raises:
        Refusal: Devices that are enrolled know another one.
    """
    if not path.exists():
        SigningKey.generate().save(path)
    key = SigningKey.load(path)
    if home.settings().get("enroller", key.verify_key.hex) != key.verify_key.hex:
        raise Refusal("enroller", f"{path}: not the key that signed the invites before; devices would not know it")
    home.change_settings(enroller=key.verify_key.hex)
    return key


def _asks(spec: ReleaseSpec) -> Asks:
    moved = traffic_of(spec)
    sums = SecureSum.of(spec) if spec.noise == "distributed" else None
    return Asks(
        unit=spec.unit,
        noise=spec.noise,
        clip=spec.clip,
        noise_multiplier=spec.noise_multiplier,
        sampling_rate=spec.sampling_rate,
        rounds=spec.rounds,
        population=spec.population,
        epsilon=spec.epsilon,
        delta=spec.delta,
        megabytes_per_round=(moved.down + moved.up) / 1e6,
        coordinator_epsilon=sums.epsilon if sums is not None else "",
        coordinator_noise_multiplier=sums.noise_multiplier if sums is not None else 0.0,
    )


def new_run(home: ServerHome, config_file: Path, name: str | None) -> Path:
    """Prepare a run over everybody who is approved; the coordinator starts it.

    Raises:
        ConfigError: The configuration does not fit, or there is a run of that name.
    """
    config = load_config(read_config_file(config_file))
    enrolment = Enrolment(home.devices)
    subjects = [device.subject for device in enrolment.devices() if device.state == "approved"]
    roster = enrolment.roster(subjects) if config.noise == "distributed" and subjects else None
    base = _name_of(home, config_file.stem) if name is None else name
    if re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]{0,63}", base) is None:
        raise ConfigError(f"{base}: a run's name is letters, digits, dots, dashes and underlines")
    opened = fleet_runs.prepare(home.runs / base, config, subjects, roster)
    opened.ledger.close()
    model = base_folder(config.model)
    bases = {**home.settings().get("bases", {}), opened.spec.model: str(model.resolve())}
    home.change_settings(bases=bases)
    return opened.path


def _name_of(home: ServerHome, stem: str) -> str:
    number = 1
    while (home.runs / f"{stem}-{number}").exists():
        number += 1
    return f"{stem}-{number}"


def backup(home: ServerHome, target: Path, *, now: datetime) -> int:
    """Write everything that a new machine needs into one file; returns how many files it holds.

    What Flower keeps is left out: it is made again. The file holds the authority's key and the ledgers' key, so it is
    as secret as the coordinator itself.

    Raises:
        DataError: The file is there already.
    """
    if target.exists():
        raise DataError(f"{target}: is there already")
    buffer, count = io.BytesIO(), 0
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        facts = {"format": BACKUP_FORMAT, "made": now.isoformat()}
        _add(archive, "backup.json", json.dumps(facts).encode())
        for path in sorted(home.folder.rglob("*")):
            name = path.relative_to(home.folder)
            if not path.is_file() or name.parts[0] in LEFT_OUT or path.suffix == ".lock":
                continue
            content = _database_bytes(path) if path.suffix == ".sqlite" else path.read_bytes()
            if path.name == run_folder.LEDGER:
                content = content[: content.rfind(b"\n") + 1]
            _add(archive, f"server/{name.as_posix()}", content)
            count += 1
        key = state_home() / "keys" / WRITER_KEY
        if key.exists():
            _add(archive, f"keys/{WRITER_KEY}", key.read_bytes())
    write_private_file(target, buffer.getvalue())
    return count


def restore(source: Path, folder: Path) -> int:
    """Put a copy back where no coordinator is; returns how many runs it holds.

    What was released after the copy was made is not in it, and is spent all the same. So every run waits for the word
    of an operator, and takes as spent whatever devices can prove.

    Raises:
        DataError: It is no backup of this format, or a coordinator is there already.
    """
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder}: a coordinator is here already; a copy is put back beside nothing else")
    try:
        with tarfile.open(source, mode="r:gz") as archive:
            files = {member.name: _content(archive, member) for member in archive.getmembers()}
        if json.loads(files.pop("backup.json"))["format"] != BACKUP_FORMAT:
            raise DataError(f"{source}: a backup of another format; this version reads {BACKUP_FORMAT}")
    except (tarfile.TarError, OSError, KeyError, ValueError, TypeError):
        raise DataError(f"{source}: not a backup of a coordinator") from None
    make_private_folder(folder)
    for name, content in files.items():
        place, _, rest = name.partition("/")
        parts = Path(rest).parts
        if place not in ("server", "keys") or not parts or ".." in parts or rest.startswith("/"):
            raise DataError(f"{source}: holds a file that is none of a coordinator's")
        path = folder.joinpath(*parts) if place == "server" else state_home() / "keys" / WRITER_KEY
        if place == "keys" and path.exists():
            if SigningKey.load(path).verify_key.hex not in _verify_key(content, path):
                raise DataError(f"{path}: another key signs ledgers here; move it away first")
            continue
        make_private_folder(path.parent)
        write_private_file(path, content, replace=True)
    runs = [path for path in sorted((folder / "runs").glob("*")) if (path / run_folder.CONFIG).is_file()]
    for path in runs:
        last = verify((path / run_folder.LEDGER).read_bytes()).entries[-1].index
        fleet_runs.note_restored(path, last)
    return len(runs)


def _verify_key(content: bytes, beside: Path) -> str:
    """The public part of a key that lies in a backup."""
    temporary = beside.with_name(f".{beside.name}.{secrets.token_hex(8)}")
    write_private_file(temporary, content)
    try:
        return SigningKey.load(temporary).verify_key.hex
    finally:
        temporary.unlink()


def _database_bytes(path: Path) -> bytes:
    """A whole copy of a database that may be in use."""
    with closing(sqlite3.connect(path)) as database:
        return database.serialize()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), 0o600
    member.mtime = int(datetime.now(UTC).timestamp())
    archive.addfile(member, io.BytesIO(content))


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member) if member.isfile() else None
    if file is None:
        raise tarfile.TarError
    return file.read()
