"""SHA-256 of release files, and the prefix of it that their names carry (torch.hub's convention)."""

import hashlib
import re
import urllib.parse
from pathlib import Path

_HASH = re.compile(r"-([0-9a-f]{8,64})\.\w+$")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def published_prefix(name: str) -> str | None:
    """The prefix in a file's name or URL: ``res2net50_14w_8s-6527dddc.pth`` -> ``6527dddc``."""
    match = _HASH.search(urllib.parse.urlsplit(name).path if "://" in name else name)
    return match and match[1]


def require(path: Path, prefix: str | None) -> str:
    """The SHA-256 of ``path``; ValueError if it does not begin with ``prefix``."""
    digest = sha256(path)
    if prefix and not digest.startswith(prefix):
        raise ValueError(
            f"{path} is not the release that its name says: its SHA-256 begins with {digest[: len(prefix)]}, not "
            f"{prefix}. It is damaged or altered: fetch it again, or, if it is yours, pass check_hash=False "
            "(--no-check-hash)"
        )
    return digest
