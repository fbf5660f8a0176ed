"""Downloads that survive a cut connection and leave no half file under the final name."""

import errno
import hashlib
import http.client
import os
import re
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from tqdm import tqdm

from porting import hashing
from res2net_jax import files
from res2net_jax.sharing import require_host

ATTEMPTS = 4
TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 20  # bytes
PAUSE = 0.5  # seconds before the second attempt, twice as long before the third, ...
_OF_THE_NETWORK = {errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH}


def from_url(url: str, cache_dir: str | os.PathLike | None = None, *, sha256_prefix: str | None = None) -> Path:
    """Downloads ``url`` to the cache, with a progress bar, and returns the file.

    A broken connection is resumed where it broke. The file gets its name only when it is whole and has
    the hash; one that is there already and has it is not fetched again.

    Raises:
        FileNotFoundError: The server has no such file.
        ValueError: What came does not have the hash.
        OSError: No network, no permission, no space.
    """
    name = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name
    if not name:
        raise ValueError(f"{url} names no file")
    # Two addresses may name their files alike, so each has a folder.
    folder = files.cache_home(cache_dir) / "downloads" / hashlib.sha256(url.encode()).hexdigest()[:12]
    target, part = folder / name, folder / f"{name}.part"
    with files.lock(target), files.writing(target):
        if sha256_prefix and target.is_file() and hashing.sha256(target).startswith(sha256_prefix):
            return target
        if not sha256_prefix:
            part.unlink(missing_ok=True)  # it may be of another version of the file, and nothing would tell
        try:
            _download(url, part)
        except (ConnectionError, FileNotFoundError):
            raise
        except OSError:
            part.unlink(missing_ok=True)
            raise
        if sha256_prefix and not hashing.sha256(part).startswith(sha256_prefix):
            part.unlink()
            raise ValueError(
                f"what came from {url} is not the release that its name says: its SHA-256 does not begin with "
                f"{sha256_prefix}. Nothing was kept; try again, give another source=, or, if it is yours, pass "
                "check_hash=False (--no-check-hash)"
            )
        part.replace(target)
    return target


def from_hub(
    repo: str,
    revision: str | None = None,
    file: str = "model.safetensors",
    *,
    cache_dir: str | os.PathLike | None = None,
) -> Path:
    """``file`` of a Hugging Face repository, from the cache if it is there.

    The cache is the hub's own (``$HF_HOME``), in which timm may have put it already. What is not there is downloaded
    to ``hub`` in ``cache_dir``, if that is given.

    Raises:
        FileNotFoundError: No such repository, revision or file.
        ValueError: The file does not have the hash that the hub promised.
        OSError: No network or no permission.
    """
    import huggingface_hub
    from huggingface_hub import errors

    place = {"revision": revision}
    if cache_dir is not None and not isinstance(huggingface_hub.try_to_load_from_cache(repo, file, **place), str):
        place["cache_dir"] = files.cache_home(cache_dir) / "hub"
    try:
        if huggingface_hub.try_to_load_from_cache(repo, file, **place) is None:
            require_host(repo)
        path = Path(huggingface_hub.hf_hub_download(repo, file, **place))
    except errors.LocalEntryNotFoundError as error:
        raise ConnectionError(f"cannot reach the hub for {repo}, and its cache does not have it") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError) as error:
        raise FileNotFoundError(f"the hub has no {file} in {repo}, revision {revision or 'main'}") from error
    except errors.HfHubHTTPError as error:
        raise ConnectionError(f"the hub refused {repo}: {files.first_line(error)}") from error
    except (errors.HTTPError, RuntimeError) as error:  # of a proxy, of a connection that was cut, and of hf_xet
        raise ConnectionError(f"the hub failed to give {repo}: {files.first_line(error)}") from error
    promised = path.resolve().name  # the hub's cache names a large file by its SHA-256
    if re.fullmatch("[0-9a-f]{64}", promised) and hashing.sha256(path) != promised:
        path.resolve().unlink()
        raise ValueError(f"{repo} came damaged from the hub (wrong SHA-256); it was removed, try again")
    return path


def _download(url, part):
    version = None  # the ETag of what has come so far
    for attempt in range(ATTEMPTS):
        time.sleep(PAUSE * attempt)
        try:
            with _request(url, part, version) as response:
                version = response.headers.get("ETag")
                return _append(response, part)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                raise FileNotFoundError(f"the server has no {url}") from error
            if error.code == 416:  # there is no such range: the part is not of this file
                part.unlink(missing_ok=True)
            elif error.code < 500 and error.code not in (408, 429):  # which are of the moment
                raise ConnectionError(f"the server refused {url}: HTTP {error.code} {error.reason}") from error
            failure = error
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            failure = error
        except OSError as error:
            if error.errno not in _OF_THE_NETWORK:
                raise
            failure = error
    reason = files.first_line(getattr(failure, "reason", failure))
    raise ConnectionError(f"cannot download {url} ({reason}); check the network, or give the file as source=")


def _request(url, part, version):
    """Opens ``url`` from where ``part`` ends, but whole if it is no longer the same ``version``."""
    request = urllib.request.Request(url, headers={"User-Agent": "res2net_jax"})
    if part.exists():
        request.add_header("Range", f"bytes={part.stat().st_size}-")
        if version:
            request.add_header("If-Range", version)
    return urllib.request.urlopen(request, timeout=TIMEOUT)


def _append(response, part):
    """Adds what comes to ``part``; ConnectionError if it is still not whole."""
    # A server that knows no ranges, or has another version by now, sends the whole.
    have = part.stat().st_size if response.status == 206 else 0
    length = response.headers.get("Content-Length")
    total = have + int(length) if length and length.isdecimal() else None
    if total and shutil.disk_usage(part.parent).free < total - have:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    bar = tqdm(desc=part.stem, total=total, initial=have, unit="B", unit_scale=True, unit_divisor=1024, file=sys.stderr)
    with open(part, "ab" if have else "wb") as file, bar:
        while chunk := response.read(CHUNK):
            file.write(chunk)
            have += len(chunk)
            bar.update(len(chunk))
    if total is not None and have != total:
        raise ConnectionError(f"the connection broke after {have} of {total} bytes")
