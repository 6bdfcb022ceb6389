"""So much of the Hub's HTTP API as publishing and loading a model take, with repositories in memory."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_" + "Stand1nToken" * 3
USER = "tester"
LICENSES = ("apache-2.0", "mit", "cc-by-sa-4.0", "other")


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return next(reversed(self.commits), "0" * 40)

    def commit(self, lines, objects) -> str:
        files = dict(self.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.files = files
        text = repr(sorted(files.items())) + str(len(self.commits))
        self.commits[hashlib.sha1(text.encode()).hexdigest()] = files
        return self.sha


class Hub:
    """``large`` names the files that go by LFS."""

    def __init__(self, large: str = r"nothing") -> None:
        self.large = large
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.url = ""
        self.writes = 0

    def describe(self, name: str) -> dict:
        held = self.repositories[name]
        config = json.loads(held.files.get("config.json", b"null"))
        described = None if config is None else {"model_type": config["model_type"]}
        return {"id": name, "sha": held.sha, "private": held.private, "config": described, "tags": [], "siblings": []}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def answer(self, status, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def handle_any(self):
        path, body = unquote(urlsplit(self.path).path), self.body()
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        for method, pattern, action, public in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method.split():
                if not public and not known:
                    return self.answer(401, {"error": "Invalid user token."})
                return action(self, body, known, *found.groups())
        return self.answer(404, {"error": f"no {self.command} {path} here"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def create(self, body, known):
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != USER:
            return self.answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        if name in self.hub.repositories:
            return self.answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        self.hub.repositories[name] = Repository(asked.get("visibility") == "private" or bool(asked.get("private")))
        return self.answer(200, {"url": f"{self.hub.url}/{name}"})

    def info(self, body, known, name):
        held = self.hub.repositories.get(name)
        if held is None or (held.private and not known):
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return self.answer(200, self.hub.describe(name))

    def tree(self, body, known, name):
        files = self.hub.repositories[name].files.items()
        return self.answer(200, [{"type": "file", "path": p, "size": len(c), "oid": oid(c)} for p, c in files])

    def validate(self, body, known):
        card = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.S)
        held = yaml.safe_load(card[1]) if card else {}
        if held.get("license") not in LICENSES:
            return self.answer(400, {"errors": [{"message": '"license" must be one of ...'}], "warnings": []})
        return self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, body, known, name):
        held = self.hub.repositories[name].files
        return self.answer(200, {"files": [
            {
                "path": (path := file["path"]),
                "uploadMode": "lfs" if re.search(self.hub.large, path) else "regular",
                "shouldIgnore": False,
                "oid": oid(held[path]) if path in held else None,
            }
            for file in json.loads(body)["files"]
        ]})  # fmt: skip

    def batch(self, body, known, name):
        def upload(asked):
            return {"upload": {"href": f"{self.hub.url}/objects/{asked['oid']}"}}

        objects = [{**asked, "actions": upload(asked)} for asked in json.loads(body)["objects"]]
        return self.answer(200, {"transfer": "basic", "objects": objects})

    def put(self, body, known, name):
        assert hashlib.sha256(body).hexdigest() == name
        self.hub.objects[name] = body
        return self.answer(200)

    def commit(self, body, known, name):
        self.hub.writes += 1
        sha = self.hub.repositories[name].commit(map(json.loads, body.splitlines()), self.hub.objects)
        return self.answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})

    def resolve(self, body, known, name, revision, path):
        held = self.hub.repositories.get(name)
        if held is None or (held.private and not known):
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        sha = held.sha if revision == "main" else revision
        content = held.commits[sha].get(path)
        if content is None:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        return self.answer(200, content, X_Repo_Commit=sha, ETag=f'"{oid(content)}"')


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [  # methods, path, what answers, whether without a token too
    ("POST", "/api/repos/create", Handler.create, False),
    ("POST", "/api/validate-yaml", Handler.validate, True),
    ("GET", f"/api/models/{NAME}(?:/revision/main)?", Handler.info, True),
    ("GET", f"/api/models/{NAME}/tree/main", Handler.tree, False),
    ("POST", f"/api/models/{NAME}/preupload/main", Handler.preupload, False),
    ("POST", f"/{NAME}.git/info/lfs/objects/batch", Handler.batch, False),
    ("PUT", r"/objects/(\w+)", Handler.put, True),
    ("POST", f"/api/models/{NAME}/commit/main", Handler.commit, False),
    ("GET HEAD", f"/{NAME}/resolve/(\\w+)/(.+)", Handler.resolve, True),
]


def oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def hub_running(large: str = "nothing"):
    """A Hub at ``hub.url`` as long as the context is open."""
    hub = Hub(large)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
