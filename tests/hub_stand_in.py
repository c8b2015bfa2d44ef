"""A small server that speaks the part of the Hugging Face hub's protocol that its own client uses
to make a repository, commit to it and read it."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_stand_in"


class Hub(ThreadingHTTPServer):
    """Attributes: repositories, name -> path -> content; asked, the requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def answer(self, status: int, content: Any = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(f"POST {self.path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            status = 409 if name in self.server.repositories else 200
            self.server.repositories.setdefault(name, {})
            return self.answer(status, {"url": f"{self.server.url}/{name}"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        _, _, _, owner, name, what, *_ = self.path.split("/")
        files = self.server.repositories[f"{owner}/{name}"]
        if what == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            return self.answer(200, {"files": [{"path": path} | modes for path in paths]})
        assert what == "commit", self.path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        made = {"commitUrl": f"{self.server.url}/{owner}/{name}/commit/{revision(files)}"}
        return self.answer(200, made | {"commitOid": revision(files), "success": True})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        parts = self.path.strip("/").split("?")[0].split("/")
        if parts == [""]:
            return self.answer(200)
        api = parts[:2] == ["api", "models"]
        owner, name, *rest = parts[2:] if api else parts
        files = self.server.repositories.get(f"{owner}/{name}")
        if files is None:
            return self.answer(404, X_Error_Code="RepoNotFound")
        if api:
            listed = [{"rfilename": path} for path in files]
            facts = {"id": f"{owner}/{name}", "sha": revision(files), "siblings": listed}
            tree = [
                {"type": "file", "path": p, "size": len(x), "oid": "0"} for p, x in files.items()
            ]
            return self.answer(200, tree if rest[:1] == ["tree"] else facts)
        path = "/".join(rest[2:])  # after resolve/REVISION
        found = {"X_Repo_Commit": revision(files)}
        if path not in files:
            return self.answer(404, X_Error_Code="EntryNotFound", **found)
        etag = hashlib.sha256(files[path]).hexdigest()
        return self.answer(200, files[path], ETag=f'"{etag}"', **found)


def revision(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


@contextmanager
def running() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
