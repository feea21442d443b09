"""The stand-in Hub keeps what it is sent, every revision of it, and refuses what the Hub refuses."""

import hashlib
import json
import subprocess
import sys
import urllib.error
import urllib.request

from local_hub import TOKEN, LocalHub
from processes import HANG_LIMIT


CLIENT = """
import sys
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

def refused(error, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except error:
        return True

folder = Path("folder")
(folder / "deep").mkdir(parents=True)
(folder / "deep" / "odd name#1?.txt").write_text("one")
(folder / "empty.txt").touch()
(folder / "weights.bin").write_bytes(bytes(range(256)) * 4096)
api, name = HfApi(), "tester/model"
assert refused(RepositoryNotFoundError, api.upload_folder, repo_id=name, folder_path=folder)
api.create_repo(name)
api.create_repo(name, exist_ok=True)
assert refused(HfHubHTTPError, api.create_repo, name)

first = api.upload_folder(repo_id=name, folder_path=folder).oid
assert api.upload_folder(repo_id=name, folder_path=folder).oid == first  # nothing changed, nothing committed
(folder / "weights.bin").write_bytes(b"\\0second")
(folder / "empty.txt").unlink()
second = api.upload_folder(repo_id=name, folder_path=folder, delete_patterns="empty*").oid
api.create_branch(name, branch="work/1")
api.upload_file(repo_id=name, path_in_repo="branch.txt", path_or_fileobj=b"branch", revision="work/1")
pull = api.upload_file(repo_id=name, path_in_repo="pull.txt", path_or_fileobj=b"pull", create_pr=True)
assert pull.pr_revision == "refs/pr/1"

for revision in ("main", first, "work/1", "refs/pr/1"):
    copy = Path(snapshot_download(name, revision=revision))
    paths = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    assert paths == set(api.list_repo_files(name, revision=revision)), revision
assert len(Path(hf_hub_download(name, "weights.bin", revision=first)).read_bytes()) == 256 * 4096
assert {entry.path for entry in api.list_repo_tree(name, "deep", revision=first)} == {"deep/odd name#1?.txt"}
assert refused(EntryNotFoundError, hf_hub_download, name, "missing.txt")
assert refused(RevisionNotFoundError, hf_hub_download, name, "weights.bin", revision="missing")
assert refused(HfHubHTTPError, api.upload_file, repo_id=name, path_in_repo="a", path_or_fileobj=b"a", token=False)
print(first, second)
"""


def test_the_client_pushes_and_pulls_every_revision(tmp_path):
    with LocalHub() as hub:
        command = [sys.executable, "-c", CLIENT]
        options = dict(capture_output=True, text=True, timeout=HANG_LIMIT)
        done = subprocess.run(command, env=hub.env(tmp_path), cwd=tmp_path, **options)
        assert done.returncode == 0, done.stderr[-3000:]
        first, second = done.stdout.split()
        assert hub.repos["tester/model"].branches["main"][1:] == [first, second]  # after the empty one
        assert set(hub.files("tester/model", first)) == {"deep/odd name#1?.txt", "empty.txt", "weights.bin"}
        assert hub.files("tester/model") == {"deep/odd name#1?.txt": b"one", "weights.bin": b"\0second"}
        assert hub.files("tester/model", "work/1")["branch.txt"] == b"branch"
        assert hub.files("tester/model", "refs/pr/1")["pull.txt"] == b"pull"


def send(hub: LocalHub, method: str, path: str, body: bytes) -> str:
    """What the server says to a request that the client would not make: "ok" or why it refuses."""
    request = urllib.request.Request(hub.endpoint + path, body, {"Authorization": f"Bearer {TOKEN}"}, method=method)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request):
            return "ok"
    except urllib.error.HTTPError as error:
        return error.headers["X-Error-Code"]


def test_a_commit_needs_the_whole_upload():
    content = b"\0weights"
    oid = hashlib.sha256(content).hexdigest()

    def commit(size):
        value = {"path": "weights.bin", "algo": "sha256", "oid": oid, "size": size}
        body = json.dumps({"key": "lfsFile", "value": value}).encode()
        return send(hub, "POST", "/api/models/tester/model/commit/main", body)

    with LocalHub() as hub:
        assert send(hub, "POST", "/api/repos/create", b'{"name": "model"}') == "ok"
        assert commit(len(content)) == "NotUploaded"
        assert send(hub, "PUT", f"/uploads/{oid}", content[:-1]) == "WrongChecksum"
        assert send(hub, "PUT", f"/uploads/{oid}", content) == "ok"
        assert commit(len(content) + 1) == "NotUploaded"
        assert hub.files("tester/model") == {}
        assert commit(len(content)) == "ok"
        assert hub.files("tester/model") == {"weights.bin": content}
