"""A Hub on the loopback interface that the unmodified `huggingface_hub` client can push to and load from.

    python tests/stub_hub.py --port 8000 --token hf_stub --namespace org
    HF_ENDPOINT=http://127.0.0.1:8000 HF_HUB_DISABLE_XET=1 HF_TOKEN=hf_stub python scripts/push_to_hub.py DIR org/name

It speaks the part of the HTTP protocol that pushing and loading use: whoami, create, pre-upload, commit
(newline-delimited JSON with base64 files), resolve, model info, paths info, tree and the check of a card's metadata.
Repositories live in memory. Every upload is answered with `uploadMode: "regular"`, so weights travel inside the commit
and no second storage protocol is needed.
"""

import argparse
import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


def git_blob_id(content: bytes) -> str:
    """The name git gives a file's content; the client skips files whose name it finds unchanged."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    """One model repository: its files at every commit, oldest first."""

    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)  # (sha, {path: content})

    @property
    def sha(self) -> str:
        return self.commits[-1][0]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][1]

    def commit(self, files: dict[str, bytes]) -> str:
        listing = "\n".join(f"{git_blob_id(content)} {path}" for path, content in sorted(files.items()))
        sha = hashlib.sha1(f"{len(self.commits)}\n{listing}".encode()).hexdigest()
        self.commits.append((sha, files))
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


class StubHub(ThreadingHTTPServer):
    """`with StubHub() as hub:` serves at `hub.url` from a thread until the block ends.

    `cut_commits_after_bytes`: for each of the next commits, after how many bytes the server hangs up on it.
    `requests` lists what was asked, as "METHOD path".
    """

    daemon_threads = True

    def __init__(self, token: str = "hf_stub", namespace: str = "org", port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.token = token
        self.namespace = namespace
        self.repositories: dict[str, Repository] = {}
        self.cut_commits_after_bytes: list[int] = []
        self.requests: list[str] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception_info) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        """A client that hangs up is part of what is tested: no traceback on the console."""


class Handler(BaseHTTPRequestHandler):
    server: StubHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test output readable; `StubHub.requests` has the log."""

    # ---- answers -------------------------------------------------------------------------------------------------

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, value: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, message: str, code: str | None = None) -> None:
        headers = {"Content-Type": "application/json", "X-Error-Message": message}
        if code is not None:
            headers["X-Error-Code"] = code
        self.answer(status, json.dumps({"error": message}).encode(), headers)

    def may_write(self, namespace: str | None) -> bool:
        """Refuse and return False where the token is absent, wrong, or of another namespace."""
        authorization = self.headers.get("Authorization")
        if authorization is None:
            self.refuse(401, "Invalid username or password.")
        elif authorization != f"Bearer {self.server.token}":
            self.refuse(401, "Invalid credentials in Authorization header")
        elif namespace is not None and namespace != self.server.namespace:
            self.refuse(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        else:
            return True
        return False

    def repository(self, repo_id: str) -> Repository | None:
        repository = self.server.repositories.get(repo_id)
        if repository is None:
            self.refuse(404, "Repository not found", "RepoNotFound")
        return repository

    def revision(self, repository: Repository, revision: str) -> tuple[str, dict[str, bytes]] | None:
        found = repository.at(unquote(revision))
        if found is None:
            self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    # ---- reading -------------------------------------------------------------------------------------------------

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.server.requests.append(f"{self.command} {url.path}")
        if url.path == "/api/whoami-v2":
            if self.may_write(None):
                organizations = [{"name": self.server.namespace, "type": "org", "roleInOrg": "admin"}]
                self.answer_json({"type": "user", "name": "tester", "orgs": organizations, "auth": {}})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", url.path):
            self.get_model_info(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?", url.path):
            self.get_tree(match[1], match[2], unquote(match[3] or ""), parse_qs(url.query))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", url.path):
            self.get_file(match[1], match[2], unquote(match[3]))
        else:
            self.refuse(404, f"no such page: {url.path}")

    def get_model_info(self, repo_id: str, revision: str) -> None:
        repository = self.repository(repo_id)
        found = repository and self.revision(repository, revision)
        if not found:
            return
        sha, files = found
        card = re.match(r"---\n(.*?)\n---", files.get("README.md", b"").decode(), re.DOTALL)
        metadata = yaml.safe_load(card[1]) if card else {}
        self.answer_json(
            {
                "id": repo_id,
                "modelId": repo_id,
                "sha": sha,
                "private": False,
                "tags": metadata.get("tags", []),
                "pipeline_tag": metadata.get("pipeline_tag"),
                "library_name": metadata.get("library_name"),
                "cardData": json.loads(json.dumps(metadata, default=str)),
                "siblings": [{"rfilename": path} for path in sorted(files)],
            }
        )

    def get_tree(self, repo_id: str, revision: str, folder: str, query: dict[str, list[str]]) -> None:
        repository = self.repository(repo_id)
        found = repository and self.revision(repository, revision)
        if not found:
            return
        _, files = found
        prefix = f"{folder}/" if folder else ""
        recursive = query.get("recursive", ["false"])[0].lower() == "true"
        inside = {path: content for path, content in files.items() if path.startswith(prefix)}
        if folder and not inside:
            self.refuse(404, f"{folder} does not exist", "EntryNotFound")
            return
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": git_blob_id(content)}
            for path, content in sorted(inside.items())
            if recursive or "/" not in path[len(prefix) :]
        ]
        self.answer_json(entries)

    def get_file(self, repo_id: str, revision: str, path: str) -> None:
        repository = self.repository(repo_id)
        found = repository and self.revision(repository, revision)
        if not found:
            return
        sha, files = found
        if path not in files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": sha}
            self.answer(404, b"Entry not found", headers)
            return
        headers = {"ETag": f'"{git_blob_id(files[path])}"', "X-Repo-Commit": sha, "Content-Type": "text/plain"}
        self.answer(200, files[path], headers)

    # ---- writing -------------------------------------------------------------------------------------------------

    def do_POST(self) -> None:
        url = urlsplit(self.path)
        self.server.requests.append(f"POST {url.path}")
        length = int(self.headers.get("Content-Length", 0))
        is_commit = re.fullmatch(r"/api/models/([^/]+)/([^/]+)/commit/([^/]+)", url.path)
        if is_commit and self.server.cut_commits_after_bytes:
            self.rfile.read(min(length, self.server.cut_commits_after_bytes.pop(0)))
            self.close_connection = True
            self.connection.close()
            return
        body = self.rfile.read(length)
        if len(body) < length:  # the client hung up in the middle: nothing of it counts
            self.close_connection = True
            return
        if url.path == "/api/repos/create":
            self.create_repository(json.loads(body))
        elif url.path == "/api/validate-yaml":
            self.validate_card(json.loads(body)["content"])
        elif match := re.fullmatch(r"/api/models/([^/]+)/([^/]+)/preupload/([^/]+)", url.path):
            if self.may_write(match[1]):
                self.pre_upload(f"{match[1]}/{match[2]}", match[3], json.loads(body))
        elif is_commit:
            if self.may_write(is_commit[1]):
                self.commit(f"{is_commit[1]}/{is_commit[2]}", body)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/paths-info/([^/]+)", url.path):
            self.paths_info(match[1], match[2], body)
        else:
            self.refuse(404, f"no such page: {url.path}")

    def create_repository(self, request: dict[str, Any]) -> None:
        namespace = request.get("organization") or "tester"
        if not self.may_write(namespace):
            return
        repo_id = f"{namespace}/{request['name']}"
        with self.server.lock:
            exists = repo_id in self.server.repositories
            if not exists:
                repository = self.server.repositories[repo_id] = Repository()
                repository.commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        if exists:
            url = f"{self.server.url}/{repo_id}"
            self.answer_json({"error": "You already created this model repo", "url": url}, status=409)
            return
        self.answer_json({"url": f"{self.server.url}/{repo_id}", "name": repo_id, "id": repo_id})

    def validate_card(self, content: str) -> None:
        errors = card_errors(content)
        self.answer_json(
            {"errors": [{"message": error} for error in errors], "warnings": []}, status=400 if errors else 200
        )

    def pre_upload(self, repo_id: str, revision: str, request: dict[str, Any]) -> None:
        repository = self.repository(repo_id)
        found = repository and self.revision(repository, revision)
        if not found:
            return
        _, files = found
        answers = []
        for asked in request["files"]:
            answer = {"path": asked["path"], "uploadMode": "regular", "shouldIgnore": False}
            if asked["path"] in files:
                answer["oid"] = git_blob_id(files[asked["path"]])
            answers.append(answer)
        self.answer_json({"files": answers})

    def commit(self, repo_id: str, body: bytes) -> None:
        repository = self.repository(repo_id)
        if repository is None:
            return
        files = dict(repository.files)
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "deletedFile":
                files.pop(value["path"])
            elif operation["key"] == "deletedFolder":
                folder = value["path"].rstrip("/") + "/"
                files = {path: content for path, content in files.items() if not path.startswith(folder)}
            elif operation["key"] != "header":
                self.refuse(400, f"the stub does not know the operation {operation['key']}")
                return
        with self.server.lock:
            sha = repository.commit(files)
        url = f"{self.server.url}/{repo_id}"
        self.answer_json({"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", "hookOutput": ""})

    def paths_info(self, repo_id: str, revision: str, body: bytes) -> None:
        repository = self.repository(repo_id)
        found = repository and self.revision(repository, revision)
        if not found:
            return
        _, files = found
        if self.headers.get("Content-Type", "").startswith("application/json"):
            asked = json.loads(body)["paths"]
        else:
            asked = parse_qs(body.decode()).get("paths", [])
        entries = [
            {"type": "file", "path": path, "size": len(files[path]), "oid": git_blob_id(files[path])}
            for path in asked
            if path in files
        ]
        self.answer_json(entries)


def card_errors(content: str) -> list[str]:
    """What the Hub would refuse in a card's metadata block; an empty list where it is valid.

    Only the fields that this project's cards use are checked.
    """
    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    if match is None:
        return ["no metadata block: the card must begin with a line '---', YAML, and a second '---'"]
    try:
        metadata = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"the metadata is no YAML: {error}"]
    if not isinstance(metadata, dict):
        return ["the metadata must be a mapping"]
    errors = []
    for name in ("license", "library_name", "pipeline_tag"):
        if name in metadata and not isinstance(metadata[name], str):
            errors.append(f'"{name}" must be a string')
    for name in ("tags", "datasets", "metrics"):
        if name in metadata and not all(isinstance(item, str) for item in metadata[name]):
            errors.append(f'"{name}" must be a list of strings')
    for model in metadata.get("model-index", []):
        if not isinstance(model.get("name"), str):
            errors.append('"model-index[].name" must be a string')
        for result in model.get("results", []):
            if not isinstance(result.get("task", {}).get("type"), str):
                errors.append('"model-index[].results[].task.type" must be a string')
            if not {"type", "name"} <= set(result.get("dataset", {})):
                errors.append('"model-index[].results[].dataset" needs "type" and "name"')
            for metric in result.get("metrics", []):
                if not {"type", "value"} <= set(metric):
                    errors.append('"model-index[].results[].metrics[]" needs "type" and "value"')
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="0 (the default) takes any free port")
    parser.add_argument("--token", default="hf_stub", help="the one token that may write")
    parser.add_argument("--namespace", default="org", help="the one namespace that the token may write to")
    args = parser.parse_args()
    hub = StubHub(args.token, args.namespace, args.port)
    print(hub.url, flush=True)
    try:
        hub.serve_forever()
    except KeyboardInterrupt:
        hub.server_close()


if __name__ == "__main__":
    main()
