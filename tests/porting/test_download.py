import dataclasses
import errno
import hashlib
import os
import ssl
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import errors
from safetensors.numpy import save

import porting
from porting import download, release, sources
from res2net_jax import get_variant, provenance

CONTENT = save({"a": np.arange(1_000_000, dtype="float32")})
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0)


@pytest.fixture
def url(server):
    path = f"/v1/model-{DIGEST[:8]}.safetensors"
    server.files[path] = CONTENT
    return server.url + path


def files_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


def test_a_url_is_read_once(url, server, tmp_path, capsys):
    arrays = porting.read(url, cache_dir=tmp_path)
    assert np.array_equal(arrays["a"], np.arange(1_000_000))
    assert "100%" in capsys.readouterr().err
    porting.read(url, cache_dir=tmp_path)
    assert [method for method, *_ in server.requests] == ["GET"]
    assert files_in(tmp_path) == [f"model-{DIGEST[:8]}.safetensors"]


def test_what_is_on_the_hub_goes_where_it_is_asked_to(tmp_path, monkeypatch):
    asked = []

    def fetch(repo, file, **options):
        asked.append(options)
        path = tmp_path / file
        path.write_bytes(CONTENT)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.setattr(download, "require_host", lambda repo: None)
    for cache_dir, place in ((None, None), (tmp_path / "c", tmp_path / "c" / "hub")):
        assert len(porting.read("me/model@v1", cache_dir=cache_dir)["a"]) == 1_000_000
        assert asked.pop() == {"revision": "v1"} | ({"cache_dir": place} if place else {})
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **options: "where timm has put it")
    assert len(porting.read("me/model@v1", cache_dir=tmp_path / "c")["a"]) == 1_000_000
    assert asked == [{"revision": "v1"}]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_connection_is_resumed(url, server, tmp_path, ranges):
    server.cut, server.ranges = 2, ranges
    assert len(porting.read(url, cache_dir=tmp_path)["a"]) == 1_000_000
    spans = [span for _, _, span in server.requests]
    assert spans[0] is None and all(span.startswith("bytes=") for span in spans[1:]) and len(spans) == 3


def test_a_server_that_is_busy_is_asked_again(url, server, tmp_path):
    server.busy = 2
    assert len(porting.read(url, cache_dir=tmp_path)["a"]) == 1_000_000
    assert len(server.requests) == 3


def test_a_connection_that_always_breaks(url, server, tmp_path):
    server.cut = 99
    with pytest.raises(ConnectionError, match="the connection broke after .* give the file as source="):
        porting.read(url, cache_dir=tmp_path)
    assert files_in(tmp_path) == [f"model-{DIGEST[:8]}.safetensors.part"]
    server.cut = 0
    assert len(porting.read(url, cache_dir=tmp_path)["a"]) == 1_000_000


def test_a_wrong_hash_keeps_nothing(url, server, tmp_path):
    server.lie = True
    with pytest.raises(ValueError, match=f"does not begin with {DIGEST[:8]}. Nothing was kept"):
        porting.read(url, cache_dir=tmp_path)
    assert files_in(tmp_path) == []


def test_another_file_of_the_same_name_is_not_mixed_in(server, tmp_path):
    """The server changes the file while the connection is cut, and another address has one of that name."""
    first, second = (save({"a": np.full(1_000_000, value, "float32")}) for value in (1, 2))
    server.files["/a/model.safetensors"] = first
    server.files["/b/model.safetensors"] = second
    server.cut = download.ATTEMPTS
    with pytest.raises(ConnectionError):
        porting.read(server.url + "/a/model.safetensors", cache_dir=tmp_path)
    assert set(porting.read(server.url + "/b/model.safetensors", cache_dir=tmp_path)["a"]) == {2}
    server.cut, server.change = 1, {"/a/model.safetensors": second}
    assert set(porting.read(server.url + "/a/model.safetensors", cache_dir=tmp_path)["a"]) == {2}


def test_a_stale_part_is_thrown_away(url, server, tmp_path):
    server.cut = 99
    with pytest.raises(ConnectionError):
        porting.read(url, cache_dir=tmp_path)
    (part,) = tmp_path.rglob("*.part")
    part.write_bytes(CONTENT + b"more")
    server.cut = 0
    assert len(porting.read(url, cache_dir=tmp_path)["a"]) == 1_000_000


def test_a_web_page_and_a_missing_file(server, tmp_path):
    server.files["/model.pth"] = b"<html>Sign in</html>"
    with pytest.raises(ValueError, match="is a web page, not weights"):
        porting.read(server.url + "/model.pth", cache_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="the server has no .*/none.pth"):
        porting.read(server.url + "/none.pth", cache_dir=tmp_path)


def test_no_network(tmp_path):
    with pytest.raises(ConnectionError, match="cannot download http://127.0.0.1:9/x.pth .*refused"):
        porting.read("http://127.0.0.1:9/x.pth", cache_dir=tmp_path)


def test_a_network_that_goes_away(url, server, tmp_path, monkeypatch):
    """While the file comes, as when Wi-Fi drops; then the system's error is none of a connection."""
    append, errors = download._append, iter([OSError(errno.EHOSTUNREACH, "No route to host"), ssl.SSLError("eof")])

    def interrupted(response, part):
        if error := next(errors, None):
            with open(part, "ab") as file:
                file.write(response.read(1000))
            raise error
        return append(response, part)

    monkeypatch.setattr(download, "_append", interrupted)
    assert len(porting.read(url, cache_dir=tmp_path)["a"]) == 1_000_000
    assert [span for _, _, span in server.requests] == [None, "bytes=1000-", "bytes=2000-"]


def test_the_secrets_of_an_address_are_not_kept(server, tmp_path):
    server.files["/model.safetensors?signature=secret"] = CONTENT
    public = server.url + "/model.safetensors"
    assert sources.fetch(public + "?signature=secret", cache_dir=tmp_path).origin == public
    assert provenance.without_secrets(public.replace("://", "://me:secret@") + "?signature=secret#secret") == public


def test_no_space(url, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(OSError, match="no space to write"):
        porting.read(url, cache_dir=tmp_path)
    assert files_in(tmp_path) == []


def hub_run(server, tmp_path, code):
    env = os.environ | {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_ETAG_TIMEOUT": "120",
        "HF_HUB_DOWNLOAD_TIMEOUT": "120",
        "RES2NET_JAX_HOME": str(tmp_path / "home"),
    }
    env.pop("HF_HUB_OFFLINE", None)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=env)


def downloads(server):
    """The range asked for by each download from the hub."""
    return [span for method, path, span in server.requests if method == "GET" and "/resolve/" in path]


READ = "import porting, sys; print(float(porting.read('timm/x.in1k')['a'].sum()), 'torch' in sys.modules)"


def test_the_hub(server, tmp_path):
    server.add_to_hub("timm/x.in1k", CONTENT)
    first = hub_run(server, tmp_path, READ)
    assert first.stdout.split() == [str(float(np.arange(1_000_000, dtype="float32").sum())), "False"], first.stderr
    assert len(downloads(server)) == 1
    server.url = "http://127.0.0.1:9"  # nobody there: the cache of the hub's client still has the file
    assert hub_run(server, tmp_path, READ).stdout == first.stdout


def test_the_hub_cuts_the_connection(server, tmp_path):
    server.add_to_hub("timm/x.in1k", CONTENT)
    server.cut = 1
    done = hub_run(server, tmp_path, READ)
    assert done.stdout, done.stderr
    assert len(downloads(server)) == 2


def test_the_hub_sends_something_else(server, tmp_path):
    server.add_to_hub("timm/x.in1k", CONTENT)
    server.lie = True
    done = hub_run(server, tmp_path, READ)
    assert "came damaged from the hub (wrong SHA-256); it was removed" in done.stderr
    server.lie = False
    assert hub_run(server, tmp_path, READ).returncode == 0


@pytest.mark.parametrize("failure", [errors.HTTPError("403 Forbidden by policy"), RuntimeError("of hf_xet")])
def test_the_hub_is_behind_a_proxy_that_refuses(failure, monkeypatch, server, tmp_path):
    """And the release is taken from where the authors put it."""

    def fail(*arguments, **options):
        raise failure

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.setattr(download, "require_host", lambda repo: None)
    with pytest.raises(ConnectionError, match=f"the hub failed to give timm/x.in1k: {failure}"):
        porting.read("timm/x.in1k")
    server.files["/x.pth"] = b"<html>"
    variant = dataclasses.replace(get_variant("res2net50_26w_4s"), url=server.url + "/x.pth")
    assert release._fetch(variant, None, False, tmp_path).origin == variant.url


def test_the_hub_does_not_have_it(server, tmp_path):
    done = hub_run(server, tmp_path, READ)
    assert "FileNotFoundError: the hub has no model.safetensors in timm/x.in1k, revision main" in done.stderr
