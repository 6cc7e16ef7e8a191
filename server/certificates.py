"""The coordinator's own certificate authority: a root that invites carry, and a leaf that is renewed without devices.

Devices trust this root and no other, so a certificate that a public authority gave to somebody else does not help
them. The leaf changes under the same root; no device has to be touched.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import StoreError
from common.files import make_private_folder, read_private_file, write_private_file

__all__ = ["Authority"]

ROOT_DAYS = 3650
LEAF_DAYS = 397
"""What browsers take at most; the leaf within is Flower's own, on loopback, and lasts as long as the root."""

WARN_DAYS = 30


@dataclass(frozen=True)
class Authority:
    """The certificates of one coordinator: `ca.pem`, `ca.key`, and pairs named `leaf` and `inner`."""

    folder: Path

    @classmethod
    def open(cls, folder: Path, *, now: datetime.datetime) -> Authority:
        """Open the authority in `folder`; one is made where there is none.

        Raises:
            StoreError: Only a part of it is there.
        """
        authority = cls(folder)
        present = [path.exists() for path in (authority.root, authority.folder / "ca.key")]
        if any(present) and not all(present):
            raise StoreError(f"{folder}: only a part of the authority is here; restore it, devices trust no other")
        if not any(present):
            make_private_folder(folder)
            key = ec.generate_private_key(ec.SECP256R1())
            name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Homespun coordinator")])
            builder = _builder(name, name, key.public_key(), now, ROOT_DAYS)
            builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
            # The key first: a crash in between leaves no root that somebody could have been told of.
            write_private_file(folder / "ca.key", _key_bytes(key), replace=True)
            write_private_file(authority.root, _certificate_bytes(builder.sign(key, hashes.SHA256())))
        return authority

    @property
    def root(self) -> Path:
        """The root, which invites carry."""
        return self.folder / "ca.pem"

    def pair(self, name: str) -> tuple[Path, Path]:
        """Paths of a leaf's certificate and key."""
        return self.folder / f"{name}.pem", self.folder / f"{name}.key"

    def issue(self, name: str, hosts: Sequence[str], *, now: datetime.datetime, days: int = LEAF_DAYS) -> None:
        """Make a leaf for `hosts`, names or addresses, in place of the one that was there."""
        root = x509.load_pem_x509_certificate(self.root.read_bytes())
        root_key = serialization.load_pem_private_key(read_private_file(self.folder / "ca.key"), None)
        if not isinstance(root_key, ec.EllipticCurvePrivateKey):
            raise StoreError(f"{self.folder / 'ca.key'}: not a key of this authority")
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Homespun coordinator leaf")])
        days = min(days, (root.not_valid_after_utc - now).days)
        builder = _builder(subject, root.subject, key.public_key(), now, days)
        names = [_general_name(host) for host in dict.fromkeys(hosts)]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        builder = builder.add_extension(usage, critical=False)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key())
        builder = builder.add_extension(issuer, critical=False)
        certificate, key_file = self.pair(name)
        # One file would be atomic; whoever loads between the two finds that they do not match, and tries again.
        write_private_file(key_file, _key_bytes(key), replace=True)
        write_private_file(certificate, _certificate_bytes(builder.sign(root_key, hashes.SHA256())), replace=True)

    def days_left(self, name: str, *, now: datetime.datetime) -> int:
        """Whole days for which a leaf is still good; negative where it is not."""
        certificate = x509.load_pem_x509_certificate(self.pair(name)[0].read_bytes())
        return (certificate.not_valid_after_utc - now).days

    def warning(self, *, now: datetime.datetime) -> str | None:
        """Say so when the leaf that devices see ends soon."""
        left = self.days_left("leaf", now=now)
        if left > WARN_DAYS:
            return None
        return f"the certificate ends in {left} days; `homespun server renew` makes a new one, devices need nothing"


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime.datetime, days: int
) -> x509.CertificateBuilder:
    identifier = x509.SubjectKeyIdentifier.from_public_key(key)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number()).add_extension(identifier, critical=False)
    # An hour back: the clock of a device may be behind.
    begins = now - datetime.timedelta(hours=1)
    return builder.not_valid_before(begins).not_valid_after(now + datetime.timedelta(days=days))


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _key_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(pem, pkcs8, serialization.NoEncryption())


def _certificate_bytes(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
