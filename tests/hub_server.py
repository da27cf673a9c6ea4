"""A stand-in for the Hugging Face Hub on the loopback, for the real client: repositories in memory, and faults on order.

It speaks what downloads and uploads need: `resolve` with its headers and the redirect of large files to another host,
`api/models` with revisions and trees, `repos/create`, `preupload`, the Git LFS batch with its uploads, `commit` as
NDJSON, and `validate-yaml`. Xet, the Hub's newer storage, is switched off in the client.
"""

import base64
import hashlib
import json
import re
import threading
import time
import types
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

READ, WRITE = "hf_read", "hf_write"  # tokens of the user "me", who is a member of "org"
LARGE = ("*.safetensors", "*.png")


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], message: str = "", branch: str = "main") -> str:
        """Add or replace files on a branch; the name of the commit."""
        tree = {**self.commits.get(self.refs.get(branch, self.refs.get("main", "")), {}), **files}
        sha = hashlib.sha1(repr((sorted(tree.items()), len(self.commits))).encode()).hexdigest()
        self.commits[sha], self.refs[branch] = tree, sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        sha = self.refs.get(revision, revision)
        return sha if sha in self.commits else None

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.refs["main"]]


@dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD path" matches, instead of an answer, or to the answer."""

    pattern: str
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None  # close the connection after so many bytes of the body
    truncate: int | None = None  # say and send only so many bytes
    times: int = 1


class HubServer:
    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}  # Git LFS: sha256 -> content
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, kind)) for kind in (_Hub, _Storage)]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)
        for server in self.servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def add(self, name: str, folder=None, private: bool = False, under: str = "", **files: bytes) -> Repository:
        """Commit the files of a folder to the main branch of a repository, which is made if need be."""
        repository = self.repositories.setdefault(name, Repository(private))
        if folder is not None:
            found = [path for path in folder.rglob("*") if path.is_file()]
            files |= {f"{under}{path.relative_to(folder).as_posix()}": path.read_bytes() for path in found}
        for path, content in files.items():
            if is_large(path):
                self.large[hashlib.sha256(content).hexdigest()] = content
        repository.commit(files)
        return repository

    def fault(self, pattern: str, **what) -> None:
        self.faults.append(Fault(pattern, **what))

    def seen(self, pattern: str) -> list[dict[str, str]]:
        """The headers of the requests so far whose "METHOD path" matches."""
        return [headers for method, path, headers in self.requests if re.search(pattern, f"{method} {path}")]

    def take_fault(self, request: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.pattern, request):
                fault.times -= 1
                return fault
        return None


def is_large(path: str) -> bool:
    return any(fnmatch(path, pattern) for pattern in LARGE)


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _handler(hub: HubServer, kind: type) -> type:
    return type(kind.__name__, (kind,), {"hub": hub})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def do_GET(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        self.route, self.query = unquote(parts.path), parse_qs(parts.query)
        self.hub.requests.append((self.command, self.route, {k.lower(): v for k, v in self.headers.items()}))
        self.active_fault = self.hub.take_fault(f"{self.command} {self.route}")
        if self.active_fault is not None and self.active_fault.status is not None:
            self.answer({"error": "fault"}, self.active_fault.status, self.active_fault.headers)
        else:
            self.serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *args) -> None:
        pass

    def answer(self, content, status: int = 200, headers: dict[str, str] | None = None) -> None:
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})}
        fault = self.active_fault
        if fault is not None and fault.truncate is not None:
            content = content[: fault.truncate]
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is not None and fault.cut is not None:
            content, self.close_connection = content[: fault.cut], True
        self.wfile.write(content)

    def refuse(self, status: int, code: str | None = None, message: str = "refused", **headers: str) -> None:
        said = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer({"error": message}, status, said | {k.replace("_", "-"): v for k, v in headers.items()})

    def send_file(self, content: bytes, headers: dict[str, str]) -> None:
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if start is None:
            return self.answer(content, 200, headers)
        first = int(start[1])
        span = f"bytes {first}-{len(content) - 1}/{len(content)}"
        return self.answer(content[first:], 206, headers | {"Content-Range": span})


class _Storage(_Handler):
    """The other host, where large files lie; its addresses are signed, so it wants no token."""

    def serve(self) -> None:
        oid = self.route.strip("/")
        if self.command == "PUT":
            if hashlib.sha256(self.body).hexdigest() != oid:
                return self.refuse(400, message="content and hash differ")
            self.hub.large[oid] = self.body
            return self.answer(b"")
        if oid not in self.hub.large:
            return self.refuse(404)
        return self.send_file(self.hub.large[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})


class _Hub(_Handler):
    ROUTES = (
        (r"GET /api/whoami-v2", "whoami"),
        (r"POST /api/repos/create", "create"),
        (r"POST /api/validate-yaml", "validate"),
        (r"(?:GET|HEAD) /(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+|refs/pr/\d+)/(?P<path>.+)", "resolve"),
        (r"GET /api/models/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)", "tree"),
        (r"GET /api/models/(?P<name>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?", "info"),
        (r"POST /api/models/(?P<name>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        (r"POST /api/models/(?P<name>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        (r"POST /(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        (r"POST /(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/verify", "verify"),
    )
    WRITING = ("preupload", "commit", "batch", "verify")

    def serve(self) -> None:
        for pattern, action in self.ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {self.route}"):
                return self.run(action, **found.groupdict())
        return self.refuse(404, message=f"the stand-in knows no {self.command} {self.route}")

    def run(self, action: str, name: str | None = None, revision: str | None = None, **rest: str) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if token not in (None, READ, WRITE):
            return self.refuse(401, message="Invalid credentials in Authorization header")
        if action in ("whoami", "create", *self.WRITING) and token is None:
            return self.refuse(401, message="Invalid username or password.")
        if action in ("create", *self.WRITING) and token != WRITE:
            return self.refuse(403, message="this token has no right to write")
        if name is None:
            return getattr(self, action)()
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and token is None):
            return self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        sha = repository.resolve(revision or "main")
        if sha is None and action in ("resolve", "tree", "info"):
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return getattr(self, action)(name, repository, sha, **rest)

    # --- reading ---

    def whoami(self) -> None:
        self.answer({"type": "user", "name": "me", "orgs": [{"name": "org"}]})

    def resolve(self, name: str, repository: Repository, sha: str, path: str) -> None:
        content = repository.commits[sha].get(path)
        if content is None:
            return self.refuse(404, "EntryNotFound", "Entry not found", X_Repo_Commit=sha)
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if not is_large(path):
            return self.send_file(content, headers | {"ETag": f'"{git_oid(content)}"'})
        oid = hashlib.sha256(content).hexdigest()
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        where = {"Location": f"{self.hub.storage_url}/{oid}"}
        return self.answer(b"", 302, headers | linked | where)

    def info(self, name: str, repository: Repository, sha: str | None) -> None:
        tree = repository.commits.get(sha, {})
        siblings = [{"rfilename": path} for path in sorted(tree)]
        self.answer({"id": name, "modelId": name, "sha": sha, "private": repository.private, "siblings": siblings})

    def tree(self, name: str, repository: Repository, sha: str) -> None:
        entries = []
        for path, content in sorted(repository.commits[sha].items()):
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
            if is_large(path):
                oid = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 127}
            entries.append(entry)
        self.answer(entries)

    # --- writing ---

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        url = f"{self.hub.url}/{name}"
        if name.split("/")[0] not in ("me", "org"):
            return self.refuse(403, message=f"no right to create repositories in {name.split('/')[0]}")
        if name in self.hub.repositories:
            return self.answer({"error": "You already created this model repo", "url": url, "name": name}, 409)
        self.hub.repositories[name] = Repository(private=asked.get("visibility") == "private")
        self.hub.repositories[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return self.answer({"url": url, "name": name, "id": name})

    def validate(self) -> None:
        content = json.loads(self.body)["content"]
        header = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        values = yaml.safe_load(header[1]) if header else None
        errors = [] if isinstance(values, dict) else [{"message": "no metadata"}]
        for key in ("base_model", "license"):
            if isinstance(values, dict) and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(values.get(key, "none"))):
                errors.append({"message": f"{key} is not valid"})
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, name: str, repository: Repository, sha: str | None) -> None:
        known, files = repository.commits.get(sha, {}), []
        for file in json.loads(self.body)["files"]:
            path, large = file["path"], is_large(file["path"])
            oid = None
            if path in known:
                oid = hashlib.sha256(known[path]).hexdigest() if large else git_oid(known[path])
            mode = "lfs" if large else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": files})

    def batch(self, name: str, repository: Repository, sha: str | None) -> None:
        objects = []
        for asked in json.loads(self.body)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"], "authenticated": True}
            if asked["oid"] not in self.hub.large:
                verify = f"{self.hub.url}/{name}.git/info/lfs/objects/verify"
                upload = f"{self.hub.storage_url}/{asked['oid']}"
                entry["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            objects.append(entry)
        self.answer({"transfer": "basic", "objects": objects}, 200, {"Content-Type": "application/vnd.git-lfs+json"})

    def verify(self, name: str, repository: Repository, sha: str | None) -> None:
        asked = json.loads(self.body)
        fits = len(self.hub.large.get(asked["oid"], b"")) == asked["size"]
        self.answer({}, 200 if fits else 422)

    def commit(self, name: str, repository: Repository, sha: str | None) -> None:
        header, *lines = [json.loads(line) for line in self.body.splitlines()]
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile" and value["oid"] in self.hub.large:
                files[value["path"]] = self.hub.large[value["oid"]]
            else:
                return self.refuse(400, message=f"cannot commit {line}")
        request = "create_pr" in self.query
        made = repository.commit(files, header["value"]["summary"], "refs/pr/1" if request else "main")
        url = f"{self.hub.url}/{name}/discussions/1" if request else None
        commit_url = f"{self.hub.url}/{name}/commit/{made}"
        return self.answer({"success": True, "commitOid": made, "commitUrl": commit_url, "pullRequestUrl": url})


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in Hub that the client takes for the real one, with an empty cache, no stored token and no waiting."""
    import huggingface_hub.file_download
    import huggingface_hub.utils._http as http
    from huggingface_hub import constants, hf_api

    server = HubServer()
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    values = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
        "HF_TOKEN_PATH": str(tmp_path / "no-token"),
    }
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    impatient = types.SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})
    for module in (http, huggingface_hub.file_download):
        monkeypatch.setattr(module, "time", impatient)
    http.close_session()  # its client would use the proxies of before
    yield server
    http.close_session()
    server.close()
