"""Mutual TLS between the Rays of a cluster's hosts: an authority on the head, and a certificate for each node.

Ray's ports accept a few bytes before its token is checked, and some of those bytes crash Ray; with TLS, nobody without
a certificate gets that far. Ray reads the files named in ``RAY_TLS_*`` (https://docs.ray.io, "TLS authentication"). The
authority's key stays on the head, 0600. Certificates cover gRPC only: the dashboard and Ray's agents speak HTTP.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from raylaunch.cluster.ports import LOOPBACK
from raylaunch.paths import ClusterPaths, make_private_dir, storage_errors, write_private

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

VALID = timedelta(days=3653)
RENEW = timedelta(days=90)
"""A certificate that expires sooner is replaced when Ray is started."""
_EARLIER = timedelta(days=7)
"""Certificates are valid from a week ago, because clocks of hosts differ."""


class NodeCertificate(BaseModel):
    """What a node needs to communicate with the others, as PEM texts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    authority: str
    certificate: str
    key: str = Field(repr=False)


def ray_variables(authority: Path | str, certificate: Path | str, key: Path | str) -> dict[str, str]:
    """Return the variables that make a Ray process use TLS; the arguments are paths of PEM files. Pure."""
    return {
        "RAY_USE_TLS": "1",
        "RAY_TLS_CA_CERT": str(authority),
        "RAY_TLS_SERVER_CERT": str(certificate),
        "RAY_TLS_SERVER_KEY": str(key),
    }


def variables_of(paths: ClusterPaths, *, client: bool = False) -> dict[str, str]:
    """Return the variables for the files of this machine's Ray, or of Ray's tools on a client; empty without files."""
    files = _files(paths, client=client)
    return ray_variables(*files) if files[-1].exists() else {}


def has_authority(paths: ClusterPaths, certificate: NodeCertificate) -> bool:
    """Return whether this node's certificate and `certificate` are from the same authority."""
    try:
        return _files(paths)[0].read_text(encoding="ascii") == certificate.authority
    except OSError:
        return False


def keep(paths: ClusterPaths, certificate: NodeCertificate, *, client: bool = False) -> float:
    """Write the files, each 0600; return when the certificate expires, in seconds since the epoch.

    A client's files are separate from a node's: a cluster may be brought up from its own head.

    Raises:
        StorageError: they cannot be written.
    """
    from cryptography import x509  # noqa: PLC0415 -- as in `issue`

    make_private_dir(paths.tls)
    texts = (certificate.authority, certificate.certificate, certificate.key)
    for path, text in zip(_files(paths, client=client), texts, strict=True):
        write_private(path, text)
    loaded = [x509.load_pem_x509_certificate(text.encode()) for text in texts[:2]]
    return min(one.not_valid_after_utc for one in loaded).timestamp()


def issue(paths: ClusterPaths, name: str, addresses: Iterable[str]) -> NodeCertificate:
    """Issue a certificate with the authority of this head, which is created on first use.

    Args:
        paths: of the cluster on its head.
        name: of the node, to be shown.
        addresses: IP addresses of the node; 127.0.0.1 is added.

    Raises:
        StorageError: the authority's files cannot be read or written.
    """
    from cryptography import x509  # noqa: PLC0415 -- only the start of a cluster needs it, and it takes a while to load
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415 -- as above
    from cryptography.x509.oid import ExtendedKeyUsageOID  # noqa: PLC0415 -- as above

    authority, authority_key = _authority(paths)
    key = ec.generate_private_key(ec.SECP256R1())
    found = {str(ipaddress.ip_address(one)): None for one in (*addresses, LOOPBACK)}
    names: list[x509.GeneralName] = [x509.IPAddress(ipaddress.ip_address(one)) for one in found]
    names.append(x509.DNSName("localhost"))
    builder = _builder(f"raylaunch node {name}", authority.subject, key)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    return NodeCertificate(
        authority=_pem(authority), certificate=_pem(_signed(builder, authority_key)), key=_key_pem(key)
    )


def _files(paths: ClusterPaths, *, client: bool = False) -> tuple[Path, Path, Path]:
    name = "client" if client else "node"
    return paths.tls / f"{name}-ca.crt", paths.tls / f"{name}.crt", paths.tls / f"{name}.key"


def _authority(paths: ClusterPaths) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    from cryptography import x509  # noqa: PLC0415 -- as in `issue`
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415 -- as in `issue`
    from cryptography.hazmat.primitives.serialization import load_pem_private_key  # noqa: PLC0415 -- as in `issue`

    make_private_dir(paths.tls)
    file, key_file = paths.tls / "authority.crt", paths.tls / "authority.key"
    with storage_errors(file):
        if file.exists() and key_file.exists():
            certificate = x509.load_pem_x509_certificate(file.read_bytes())
            loaded = load_pem_private_key(key_file.read_bytes(), password=None)
            lasts = certificate.not_valid_after_utc - datetime.now(timezone.utc) > RENEW
            if lasts and isinstance(loaded, ec.EllipticCurvePrivateKey):
                return certificate, loaded
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"raylaunch cluster {paths.name}")])
    builder = _builder(f"raylaunch cluster {paths.name}", name, key)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    certificate = _signed(builder, key)
    write_private(key_file, _key_pem(key))
    write_private(file, _pem(certificate))
    return certificate, key


def _builder(name: str, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    from cryptography import x509  # noqa: PLC0415 -- as in `issue`

    now = datetime.now(timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name[:64])]))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + VALID)
    )


def _signed(builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    from cryptography.hazmat.primitives import hashes  # noqa: PLC0415 -- as in `issue`

    return builder.sign(key, hashes.SHA256())


def _pem(certificate: x509.Certificate) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding  # noqa: PLC0415 -- as in `issue`

    return certificate.public_bytes(Encoding.PEM).decode()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415 -- as in `issue`

    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()).decode()
