"""A small Hub on the loopback address: the parts of the HTTP interface that huggingface_hub uses for models.

It answers model_info, the list of files, downloads with Range, create_repo, branches, preupload, LFS uploads and
commits. Repositories are in memory. A test sees each request in `requests`, and the bytes that arrived in `files`.
"""

import base64
import contextlib
import hashlib
import importlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKENIZER = {
    "version": "1.0",
    "added_tokens": [{"id": 0, "content": "</s>", "special": True, "normalized": False}
                     | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)],
    **dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")),
    "model": {"type": "WordLevel", "vocab": {"</s>": 0, "a": 1}, "unk_token": "a"},
}  # fmt: skip
"""A tokenizer.json that the library can read."""

WRITER, READER = "hf_a-token-that-may-write", "hf_a-token-that-may-read"


def blob_id(content):
    """The name that Git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def pointer(content):
    """The text that Git keeps in place of a file in LFS."""
    lines = ("version https://git-lfs.github.com/spec/v1", f"oid sha256:{digest(content)}", f"size {len(content)}", "")
    return "\n".join(lines).encode()


def digest(content):
    return hashlib.sha256(content).hexdigest()


def in_lfs(path):
    return path.endswith(".safetensors")


@dataclass
class Repository:
    """A model repository: branch → commit → path → content."""

    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, files, branch="main"):
        """Put files on a branch; returns the commit's name of 40 hex digits."""
        hashes = {path: digest(content) for path, content in sorted(files.items())}
        key = json.dumps([branch, len(self.commits), hashes])
        sha = hashlib.sha1(key.encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha

    def files(self, revision="main"):
        """Path → content at a branch or commit; None if there is no such revision."""
        return self.commits.get(self.branches.get(revision, revision))


class FakeHub:
    """The Hub: its repositories, the requests that it got, and the faults that a test asks for."""

    def __init__(self):
        self.repositories, self.objects, self.requests = {}, {}, []
        self.cut = {}
        """Path of a file → after how many bytes its next download is cut off; a list is one cut after another."""
        self.down = None
        """An HTTP status that answers every request, such as 503."""
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def add(self, name, folder, **settings):
        """A repository with the files of a folder; returns its commit."""
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.repositories[name] = Repository(**settings)
        return self.repositories[name].commit(files)

    def asked(self, method, pattern=""):
        """The requests of a method whose path matches, as (path, Range header)."""
        return [(path, span) for verb, path, span in self.requests if verb == method and re.search(pattern, path)]

    @contextlib.contextmanager
    def running(self):
        thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.server.shutdown()
            self.server.server_close()
            thread.join()

    def use(self, monkeypatch, folder, token=WRITER):
        """Point this process, and those that it starts, to this Hub, with an empty cache in a folder."""
        from huggingface_hub import constants

        cache = str(folder / "hub-cache")
        settings = {"HF_ENDPOINT": self.address, "HF_HUB_CACHE": cache, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token}
        for name, value in settings.items():
            monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
        for name in ("HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN", "HF_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_TOKEN_PATH", str(folder / "no-token"))
        for name, value in {
            "ENDPOINT": self.address,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": cache,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
            "HF_TOKEN_PATH": str(folder / "no-token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        # `main` of pipeline/cli.py sets it for a process of its own; here the module may have read it before.
        bars = importlib.import_module("huggingface_hub.utils.tqdm")
        monkeypatch.setattr(bars, "HF_HUB_DISABLE_PROGRESS_BARS", True)


class Refused(Exception):
    """An answer that is an error: its status, the Hub's code for it, and its message."""

    def __init__(self, status, code="", message=""):
        self.status, self.code, self.message = status, code, message


ROUTES = (
    ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", "info"),
    ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)", "tree"),
    ("(GET|HEAD)", r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "file"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/branch/(?P<revision>[^/]+)", "branch"),
    ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "put"),
)


class Handler(BaseHTTPRequestHandler):
    """One request. The answer of each route is a method with its name."""

    protocol_version = "HTTP/1.1"
    hub = None

    def log_message(self, *_):
        pass

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        body = self.body()
        try:
            if self.hub.down:
                raise Refused(self.hub.down, message="down")
            for method, pattern, name in ROUTES:
                found = re.fullmatch(pattern, path)
                if re.fullmatch(method, self.command) and found:
                    parts = {key: value for key, value in found.groupdict().items() if value is not None}
                    return vars(Handler)[name](self, body, **parts)
            raise Refused(404, message="no such address")
        except Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self.send(json.dumps({"error": refused.message}).encode(), refused.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815 - the names of http.server

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def send(self, content, status=200, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **(headers or {})}.items():
            if value != "":
                self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, value, status=200):
        self.send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    # Who may do what

    def token(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def repository(self, name, *, content=False):
        """A repository that this token may see; with `content`, one whose files it may read."""
        if self.token() not in ("", WRITER, READER):
            raise Refused(401, message="Invalid credentials in Authorization header")
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self.token()):
            raise Refused(404 if self.token() else 401, "RepoNotFound", "Repository not found")
        if content and repository.gated and self.token() != WRITER:
            raise Refused(403 if self.token() else 401, "GatedRepo", f"Access to model {name} is restricted")
        return repository

    def files_at(self, name, revision, *, content=False):
        repository = self.repository(name, content=content)
        files = repository.files(revision)
        if files is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, files

    def writable(self, name=None):
        if self.token() != WRITER:
            raise Refused(403, message="You don't have the rights to write here")
        return None if name is None else self.repository(name)

    # The answers

    def info(self, body, name, revision="main"):
        repository, files = self.files_at(name, revision)
        self.send_json(
            {
                "id": name,
                "sha": repository.branches.get(revision, revision),
                "private": repository.private,
                "gated": "manual" if repository.gated else False,
                "siblings": [{"rfilename": path} for path in sorted(files)],
            }
        )

    def tree(self, body, name, revision):
        _, files = self.files_at(name, revision, content=True)
        entries = []
        for path, content in sorted(files.items()):
            entry = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
            if in_lfs(path):
                small = pointer(content)
                entry["lfs"] = {"oid": digest(content), "size": len(content), "pointerSize": len(small)}
                entry["oid"] = blob_id(small)
            entries.append(entry)
        self.send_json(entries)

    def file(self, body, name, revision, path):
        repository, files = self.files_at(name, revision, content=True)
        if path not in files:
            raise Refused(404, "EntryNotFound", "Entry not found")
        content = files[path]
        headers = {
            "ETag": f'"{digest(content) if in_lfs(path) else blob_id(content)}"',
            "X-Repo-Commit": repository.branches.get(revision, revision),
            "Accept-Ranges": "bytes",
        }
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if span is None:
            part, status = content, 200
        else:
            start = int(span[1])
            part, status = content[start : int(span[2]) + 1 if span[2] else None], 206
            headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
        self.send_part(path, part, status, headers)

    def send_part(self, path, part, status, headers):
        cuts = self.hub.cut.get(path)
        if self.command == "HEAD" or not cuts:
            return self.send(part, status, headers)
        stop = cuts.pop(0)
        self.send_response(status)
        for name, value in {"Content-Length": len(part), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(part[:stop])
        self.wfile.flush()
        self.close_connection = True  # before all bytes were sent
        return None

    def create(self, body):
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        self.writable()
        if name in self.hub.repositories:
            raise Refused(409, message="You already created this model repo")
        self.hub.repositories[name] = repository = Repository(private=asked.get("visibility") == "private")
        repository.commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        self.send_json({"url": f"{self.hub.address}/{name}", "id": name, "name": name})

    def validate(self, body):
        head = re.match(r"---\n(.*?)\n---", json.loads(body)["content"], re.DOTALL)
        if head is None:
            self.send_json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        else:
            self.send_json({"errors": [], "warnings": []})

    def branch(self, body, name, revision):
        repository = self.writable(name)
        if revision in repository.branches:
            raise Refused(409, message="Reference already exists")
        repository.branches[revision] = repository.branches["main"]
        self.send_json({})

    def preupload(self, body, name, revision):
        self.writable(name)
        _, files = self.files_at(name, revision)
        answers = []
        for file in json.loads(body)["files"]:
            path, there = file["path"], files.get(file["path"])
            answers.append({"path": path, "uploadMode": "lfs" if in_lfs(path) else "regular", "shouldIgnore": False})
            if there is not None:
                answers[-1]["oid"] = digest(there) if in_lfs(path) else blob_id(there)
        self.send_json({"files": answers})

    def batch(self, body, name):
        self.writable(name)
        objects = []
        for entry in json.loads(body)["objects"]:
            new = entry["oid"] not in self.hub.objects
            actions = {"actions": {"upload": {"href": f"{self.hub.address}/lfs/{entry['oid']}"}}} if new else {}
            objects.append({**entry, **actions})
        self.send_json({"transfer": "basic", "objects": objects})

    def put(self, body, oid):
        if digest(body) != oid:
            raise Refused(400, message="the content is not what was announced")
        self.hub.objects[oid] = body
        self.send(b"")

    def commit(self, body, name, revision):
        repository = self.writable(name)
        files = dict(self.files_at(name, revision)[1])
        for line in body.splitlines():
            kind, value = json.loads(line)["key"], json.loads(line)["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        sha = repository.commit(files, revision)
        self.send_json({"commitUrl": f"{self.hub.address}/{name}/commit/{sha}", "commitOid": sha, "success": True})
