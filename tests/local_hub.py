"""A stand-in for the Hugging Face Hub on this machine, so that tests really push models and pull them back.

What a push uploads, and whether that is enough to load the model elsewhere, shows only with the real client against a
server that keeps what it is sent. This one speaks as much of the Hub's HTTP interface as `push_to_hub`, `Trainer`,
`from_pretrained` and `snapshot_download` use, for model repositories, and keeps them in memory.

The client reads `HF_ENDPOINT` when it is imported, so tests push and pull in processes of their own:

    with LocalHub() as hub:
        subprocess.run([sys.executable, "push.py"], env=hub.env(tmp_path / "pusher"), check=True)
        assert "config.json" in hub.files("tester/model")
"""

import hashlib
import json
import os
import re
import secrets
import threading
from base64 import b64decode
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit


USER = "tester"
TOKEN = "hf_tester"
Files = dict[str, bytes]


@dataclass
class Repo:
    """A model repository: the files of every commit, and the commits of every branch, oldest first."""

    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, list[str]] = field(default_factory=lambda: {"main": []})

    def commit(self, branch: str, files: Files) -> str:
        commit = secrets.token_hex(20)
        self.commits[commit] = files
        self.branches[branch].append(commit)
        return commit

    def resolve(self, revision: str) -> str:
        """The commit that a branch, a pull request (`refs/pr/1`) or a commit's own id stands for."""
        if revision in self.branches:
            return self.branches[revision][-1]
        if revision in self.commits:
            return revision
        raise _Refusal(404, "RevisionNotFound")


class LocalHub(ThreadingHTTPServer):
    """Serves while its `with` block runs; `repos` holds the repositories by their full names."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.uploads: dict[str, bytes] = {}  # large files by SHA-256; commits only name them
        self.lock = threading.Lock()

    def __enter__(self) -> "LocalHub":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def env(self, home: str | Path) -> dict[str, str]:
        """The environment of a process that uses this Hub and caches under `home`, whatever this process uses."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
        return ours | {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",  # only LFS is spoken here
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def repo(self, name: str) -> Repo:
        if name not in self.repos:
            raise _Refusal(404, "RepoNotFound")
        return self.repos[name]

    def files(self, name: str, revision: str = "main") -> Files:
        """The files of a repository by path."""
        repo = self.repo(name)
        return repo.commits[repo.resolve(revision)]


class _Refusal(Exception):
    """An answer other than 200; the client tells kinds of 404 apart by `code`."""

    def __init__(self, status: int, code: str, **details: str):
        super().__init__(status, code)
        self.status, self.code, self.details = status, code, details


def _is_large(content: bytes) -> bool:
    """Whether a file goes to LFS. As for Git, a zero byte early on makes it binary, which weights are."""
    return b"\0" in content[:512]  # the client sends as much when it asks


def _oid(content: bytes) -> str:
    """What the Hub identifies a file by: LFS by SHA-256, Git by SHA-1 after a header."""
    if _is_large(content):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: LocalHub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet for headers and body: two would wait for each other

    def log_message(self, *_):
        pass

    def _serve(self):
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            # Files go up to addresses that this server hands out, without the token
            if self.command == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise _Refusal(401, "Unauthorized")
            for method, pattern, action in _ROUTES:
                # Decoded after the match: the slashes in `refs%2Fpr%2F1` do not separate
                if method == self.command.replace("HEAD", "GET") and (match := re.fullmatch(pattern, url.path)):
                    action(self, *(unquote(part) for part in match.groups() if part is not None))
                    return
            raise _Refusal(501, "NotImplemented")  # not 404, which clients take for a file that may be missing
        except _Refusal as refusal:
            message = {"error": f"{refusal.code}: {self.command} {url.path}"} | refusal.details
            self._send(message, refusal.status, {"X-Error-Code": refusal.code})

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _send(self, answer: bytes | dict | list, status: int = 200, headers: dict[str, str] | None = None):
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for header, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def whoami(self):
        self._send({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {}})

    def create_repo(self):
        request = json.loads(self.body)
        name = f"{request.get('organization') or USER}/{request['name']}"
        url = f"{self.server.endpoint}/{name}"
        with self.server.lock:
            if name in self.server.repos:
                raise _Refusal(409, "Conflict", url=url)  # a client that allows for this still reads the URL
            self.server.repos[name] = Repo()
            self.server.repos[name].commit("main", {})
        self._send({"url": url, "name": name})

    def create_branch(self, name: str, branch: str):
        start = json.loads(self.body).get("startingPoint", "main")
        with self.server.lock:
            repo = self.server.repo(name)
            if branch in repo.branches:
                raise _Refusal(409, "Conflict")
            repo.branches[branch] = [repo.resolve(start)]
        self._send({})

    def validate_card(self):
        self._send({"errors": [], "warnings": []})

    def choose_upload_modes(self, name: str, revision: str):
        present, answers = self.server.files(name, revision), []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if _is_large(b64decode(file["sample"])) else "regular"
            oid = _oid(present[file["path"]]) if file["path"] in present else None  # the client skips equal files
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send({"files": answers})

    def offer_uploads(self, name: str):
        self.server.repo(name)
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.server.uploads:
                item["actions"] = {"upload": {"href": f"{self.server.endpoint}/uploads/{item['oid']}"}}
        self._send({"transfer": "basic", "objects": objects})

    def upload(self, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refusal(400, "WrongChecksum")
        self.server.uploads[oid] = self.body
        self._send({})

    def commit(self, name: str, revision: str):
        with self.server.lock:
            repo = self.server.repo(name)
            files = dict(self.server.files(name, revision))
            for line in self.body.splitlines():
                key, value = (entry := json.loads(line))["key"], entry["value"]
                if key == "file":
                    files[value["path"]] = b64decode(value["content"])
                elif key == "lfsFile":
                    content = self.server.uploads.get(value["oid"])
                    if content is None or len(content) != value["size"]:
                        raise _Refusal(400, "NotUploaded")
                    files[value["path"]] = content
                elif key == "deletedFile":
                    files.pop(value["path"], None)
                elif key != "header":
                    raise _Refusal(501, "NotImplemented")
            answer = {}
            if "create_pr" in self.query:
                number = 1 + sum(branch.startswith("refs/pr/") for branch in repo.branches)
                answer["pullRequestUrl"] = f"{self.server.endpoint}/{name}/discussions/{number}"
                base, revision = repo.resolve(revision), f"refs/pr/{number}"
                repo.branches[revision] = [base]
            elif revision not in repo.branches:
                raise _Refusal(404, "RevisionNotFound")  # a commit cannot be added to, only a branch
            commit = repo.commit(revision, files)
        self._send(answer | {"commitOid": commit, "commitUrl": f"{self.server.endpoint}/{name}/commit/{commit}"})

    def info(self, name: str, revision: str = "main"):
        commit = self.server.repo(name).resolve(revision)
        siblings = [{"rfilename": path} for path in self.server.files(name, commit)]
        self._send({"id": name, "sha": commit, "private": False, "siblings": siblings})

    def tree(self, name: str, revision: str, folder: str = ""):
        start = f"{folder}/" if folder else ""
        files = {path: file for path, file in self.server.files(name, revision).items() if path.startswith(start)}
        if folder and not files:
            raise _Refusal(404, "EntryNotFound")
        folders = {str(parent) for path in files for parent in PurePosixPath(path).parents} - {"."}
        entries = [{"type": "directory", "path": path, "oid": ""} for path in folders if path.startswith(start)]
        for path, content in files.items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
            if _is_large(content):
                entry["lfs"] = {"oid": _oid(content), "size": len(content), "pointerSize": 0}
            entries.append(entry)
        recursive = self.query.get("recursive") == ["true"]
        self._send([entry for entry in entries if recursive or "/" not in entry["path"].removeprefix(start)])

    def download(self, name: str, revision: str, path: str):
        commit = self.server.repo(name).resolve(revision)
        files = self.server.files(name, commit)
        if path not in files:
            raise _Refusal(404, "EntryNotFound")
        self._send(files[path], headers={"ETag": f'"{_oid(files[path])}"', "X-Repo-Commit": commit})


_REPO, _PART = r"([^/]+/[^/]+)", r"([^/]+)"
_ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create_repo),
    ("POST", "/api/validate-yaml", _Handler.validate_card),
    ("POST", f"/api/models/{_REPO}/branch/{_PART}", _Handler.create_branch),
    ("POST", f"/api/models/{_REPO}/preupload/{_PART}", _Handler.choose_upload_modes),
    ("POST", f"/{_REPO}.git/info/lfs/objects/batch", _Handler.offer_uploads),
    ("PUT", f"/uploads/{_PART}", _Handler.upload),
    ("POST", f"/api/models/{_REPO}/commit/{_PART}", _Handler.commit),
    ("GET", f"/api/models/{_REPO}(?:/revision/{_PART})?", _Handler.info),
    ("GET", f"/api/models/{_REPO}/tree/{_PART}(?:/{_PART})?", _Handler.tree),
    ("GET", f"/{_REPO}/resolve/{_PART}/(.+)", _Handler.download),
]
