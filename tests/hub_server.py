"""A stand-in for the Hugging Face Hub, in memory and on this machine, so that tests can really push and pull.

It speaks the few endpoints of the Hub's HTTP interface that `push_to_hub`, `Trainer` and `from_pretrained` use, and
checks uploads of large files against their SHA-256. Clients read `HF_ENDPOINT` when they are imported, so tests push
and pull in processes of their own, with the environment that `environment` gives.
"""

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class HubServer:
    """`with HubServer() as hub:` serves at `hub.endpoint`; `hub.repos[name]` lists commits, each `{path: bytes}`."""

    def __init__(self):
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.large_files: dict[str, bytes] = {}
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def environment(self, cache: Path) -> dict[str, str]:
        """Environment of a process that uses this server, with a cache of its own."""
        return os.environ | {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": "hf_test",
            "HF_HOME": str(cache),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # this server knows no Xet storage
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

    def files(self, name: str) -> dict[str, bytes]:
        """The files of the newest commit."""
        return self.repos[name][-1]


def _sha(commits: list[dict[str, bytes]]) -> str:
    return hashlib.sha1(f"{id(commits)}-{len(commits)}".encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):  # noqa: N802
        path = unquote(urlsplit(self.path).path)
        if path == "/api/whoami-v2":
            return self._json({"type": "user", "name": "tester", "fullname": "Tester", "orgs": [], "auth": {}})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            commits = self._commits(match[1])
            if commits is not None:
                siblings = [{"rfilename": file} for file in commits[-1]]
                self._json({"_id": "0", "id": match[1], "sha": _sha(commits), "siblings": siblings, "private": False})
            return None
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path):
            commits = self._commits(match[1])
            if commits is not None:
                self._json([self._entry(file, content) for file, content in commits[-1].items()])
            return None
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(*match.groups())
        return self._error(404, "EntryNotFound")

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self):  # noqa: N802
        path, body = unquote(urlsplit(self.path).path), self._body()
        if path == "/api/repos/create":
            request = json.loads(body)
            name = f"{request.get('organization') or 'tester'}/{request['name']}"
            status = 409 if name in self.hub.repos else 200
            self.hub.repos.setdefault(name, [{}])
            return self._json({"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name}, status)
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/[^/]+", path):
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(body)["files"]
            ]
            return self._json({"files": [mode | {"shouldIgnore": False, "oid": None} for mode in modes]})
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for item in objects:
                item["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{item['oid']}"}}
            return self._json({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/[^/]+", path):
            return self._commit(match[1], body)
        return self._error(404, "RepoNotFound")

    def do_PUT(self):  # noqa: N802
        oid, content = self.path.rsplit("/", 1)[1], self._body()
        if hashlib.sha256(content).hexdigest() != oid:
            return self._error(422, "BadChecksum")
        self.hub.large_files[oid] = content
        return self._json({})

    def _commit(self, name, body):
        commits = self._commits(name)
        if commits is None:
            return
        files = dict(commits[-1])
        for line in filter(None, body.splitlines()):
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.large_files[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        commits.append(files)
        url = f"{self.hub.endpoint}/{name}/commit/{_sha(commits)}"
        self._json({"success": True, "commitOid": _sha(commits), "commitUrl": url, "hookOutput": ""})

    def _file(self, name, revision, path):
        commits = self._commits(name)
        if commits is None:
            return
        if path not in commits[-1]:
            self._error(404, "EntryNotFound")
            return
        content = commits[-1][path]
        etag = hashlib.sha256(content).hexdigest()
        self.send_response(200)
        for header, value in {
            "ETag": f'"{etag}"',
            "X-Linked-Etag": f'"{etag}"',
            "X-Linked-Size": len(content),
            "X-Repo-Commit": _sha(commits),
            "Content-Length": len(content),
        }.items():
            self.send_header(header, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _entry(self, path, content):
        oid = hashlib.sha256(content).hexdigest()
        entry = {"type": "file", "path": path, "size": len(content), "oid": oid[:40]}
        return entry | (
            {"lfs": {"oid": oid, "size": len(content), "pointerSize": 134}} if "safetensors" in path else {}
        )

    def _commits(self, name):
        if name not in self.hub.repos:
            self._error(404, "RepoNotFound")
        return self.hub.repos.get(name)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _json(self, answer, status=200, **headers):
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for header, value in headers.items():
            self.send_header(header.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _error(self, status, code):
        self._json({"error": code}, status, X_Error_Code=code)
