"""A small Hugging Face hub: the endpoints that its real client calls to make, fill and read a repository of models."""

import base64
import dataclasses
import hashlib
import http.server
import json
import re
import threading
import urllib.parse

import pytest

LARGE = 10_000  # bytes; larger files go through LFS
TOKEN = "hf_right"
OWNER = "me"


@dataclasses.dataclass
class Hub:
    """``repos[name][branch]`` is a list of commits, each a dict of files; ``main`` begins with an empty one.

    ``fail`` answers the requests whose path matches a pattern with a status instead.
    """

    url: str
    repos: dict[str, dict[str, list[dict[str, bytes]]]] = dataclasses.field(default_factory=dict)
    private: set[str] = dataclasses.field(default_factory=set)
    uploaded: dict[str, bytes] = dataclasses.field(default_factory=dict)
    fail: dict[str, int] = dataclasses.field(default_factory=dict)
    requests: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def commits(self, repo, branch="main"):
        """The commits that somebody made."""
        return self.repos.get(repo, {}).get(branch, [{}])[1:]

    def find(self, repo, revision):
        """(SHA, files) of a branch or a commit; None if there is none."""
        for branch, commits in self.repos[repo].items():
            for number, commit in enumerate(commits):
                sha = commit_sha(repo, branch, number)
                if revision == sha or (revision == branch and number == len(commits) - 1):
                    return sha, commit
        return None


def commit_sha(repo, branch, number):
    return hashlib.sha1(f"{repo} {branch} {number}".encode()).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def handle_request(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            self.body = b"".join(iter(self.read_chunk, b""))
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        for pattern, status in self.hub.fail.items():
            if re.search(pattern, path):
                return self.send(status, {"error": "out of order"})
        for method, pattern, answer in ROUTES:
            if (self.command in method) and (match := re.fullmatch(pattern, path)):
                return answer(self, **match.groupdict())
        return self.send(404, {"error": f"{self.command} {path}: no such endpoint"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def read_chunk(self):
        chunk = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return chunk

    def send(self, status, content=b"", **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def may_write(self, repo):
        token = self.headers.get("Authorization")
        if token != f"Bearer {TOKEN}":
            self.send(401, {"error": "Invalid username or password."})
        elif repo.split("/")[0] != OWNER:
            self.send(403, {"error": f"you may not write {repo}"})
        else:
            return True
        return False

    def found(self, repo, revision="main"):
        """(SHA, files) for somebody who may read; else None, answered."""
        hidden = repo in self.hub.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        if repo not in self.hub.repos or hidden:
            self.send(401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        elif self.hub.find(repo, revision) is None:
            self.send(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")
        else:
            return self.hub.find(repo, revision)
        return None

    def create(self):
        wanted = json.loads(self.body)
        repo = f"{wanted['organization']}/{wanted['name']}"
        if not self.may_write(repo):
            return
        if repo in self.hub.repos:
            return self.send(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo}"})
        self.hub.repos[repo] = {"main": [{}]}
        if wanted.get("visibility") == "private" or wanted.get("private"):
            self.hub.private.add(repo)
        self.send(200, {"url": f"{self.hub.url}/{repo}", "id": repo})

    def branch(self, repo, branch):
        if self.may_write(repo):
            exists = branch in self.hub.repos[repo]
            self.hub.repos[repo].setdefault(branch, [self.hub.repos[repo]["main"][-1]])
            self.send(409 if exists else 201, {})

    def info(self, repo, revision="main"):
        if found := self.found(repo, revision):
            siblings = [{"rfilename": path} for path in found[1]]
            self.send(200, {"id": repo, "sha": found[0], "siblings": siblings, "private": repo in self.hub.private})

    def tree(self, repo, revision):
        if found := self.found(repo, revision):
            self.send(200, [self.entry(path, content) for path, content in found[1].items()])

    def entry(self, path, content):
        entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if len(content) > LARGE:
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry

    def preupload(self, repo, revision):
        if self.may_write(repo) and self.found(repo, revision):
            files = json.loads(self.body)["files"]
            modes = {True: "lfs", False: "regular"}
            answer = [
                {"path": file["path"], "uploadMode": modes[file["size"] > LARGE], "shouldIgnore": False}
                for file in files
            ]
            self.send(200, {"files": answer})

    def batch(self, repo):
        if self.may_write(repo):
            objects = json.loads(self.body)["objects"]
            for wanted in objects:
                if wanted["oid"] not in self.hub.uploaded:
                    wanted["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
            self.send(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.send(400, {"error": "wrong hash"})
        self.hub.uploaded[oid] = self.body
        self.send(200)

    def commit(self, repo, revision):
        if not (self.may_write(repo) and self.found(repo, revision)):
            return
        commits = self.hub.repos[repo][revision]
        files = dict(commits[-1])
        for line in self.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.uploaded[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        commits.append(files)
        sha = commit_sha(repo, revision, len(commits) - 1)
        self.send(200, {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})

    def resolve(self, repo, revision, file):
        if found := self.found(repo, revision):
            sha, files = found
            if file not in files:
                return self.send(404, {"error": "no such file"}, X_Error_Code="EntryNotFound")
            content = files[file]
            digest = (hashlib.sha256 if len(content) > LARGE else hashlib.sha1)(content).hexdigest()
            headers = {"ETag": f'"{digest}"', "X_Repo_Commit": sha}
            if len(content) > LARGE:
                headers |= {"X_Linked_ETag": f'"{digest}"', "X_Linked_Size": str(len(content))}
            self.send(200, content, **headers)


_REPO, _REVISION = r"(?P<repo>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)"
ROUTES = [
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", lambda self: self.send(200, {})),
    ("POST", f"/api/models/{_REPO}/branch/(?P<branch>[^/]+)", Handler.branch),
    ("POST", f"/api/models/{_REPO}/preupload/{_REVISION}", Handler.preupload),
    ("POST", f"/{_REPO}.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", Handler.upload),
    ("POST", f"/api/models/{_REPO}/commit/{_REVISION}", Handler.commit),
    ("GET", f"/api/models/{_REPO}", Handler.info),
    ("GET", f"/api/models/{_REPO}/revision/{_REVISION}", Handler.info),
    ("GET", f"/api/models/{_REPO}/tree/{_REVISION}", Handler.tree),
    ("GETHEAD", f"/{_REPO}/resolve/{_REVISION}/(?P<file>.+)", Handler.resolve),
]


@pytest.fixture
def hub_server(monkeypatch, tmp_path):
    """A :class:`Hub` that the client in this process takes for the real one, with nobody logged in."""
    from huggingface_hub import constants

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {}))
    hub = httpd.RequestHandlerClass.hub = Hub(f"http://127.0.0.1:{httpd.server_port}")
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    yield hub
    httpd.shutdown()
    httpd.server_close()
