"""A hub of data sets on this machine, of which the libraries ask what they ask of the real one."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

GATED = "house/gated"


@contextmanager
def hub_of(sets: dict[str, Path], commits: dict[str, str]) -> Iterator[str]:
    """Serve folders as data sets.

    Args:
        sets: folder by id; of ``GATED`` nothing is given.
        commits: of each set, its present one; other revisions than it and "main" are not there.

    Yields:
        The address, for HF_ENDPOINT.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self, status: int, content: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def _json(self, value: Any) -> None:
            self._answer(200, json.dumps(value).encode(), Content_Type="application/json")

        def _missing(self, code: str, status: int = 404) -> None:
            self._answer(status, X_Error_Code=code, X_Error_Message=code)

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            found = re.match(r"(/api)?/datasets/([^/]+/[^/]+)(?:/([a-z-]+)(?:/([^/]+))?(?:/(.+))?)?$", path)
            name = found[2] if found else ""
            if found is None or name not in sets:
                self._missing("RepoNotFound", 401)
            elif name == GATED:
                self._missing("GatedRepo", 403)
            elif found[4] not in (None, "main", commits[name]):
                self._missing("RevisionNotFound")
            elif not found[1]:
                self._file(sets[name] / (found[5] or ""), commits[name])
            elif found[3] == "tree":
                self._tree(sets[name], found[5] or "")
            else:
                names = [{"rfilename": f.relative_to(sets[name]).as_posix()} for f in sets[name].rglob("*") if f.is_file()]
                about = {"id": name, "sha": commits[name], "private": False, "gated": False, "tags": []}
                self._json(about | {"siblings": sorted(names, key=str)})

        def _tree(self, folder: Path, within: str) -> None:
            at = folder / within
            if not at.is_dir():
                self._missing("EntryNotFound")
                return
            places = at.rglob("*") if "recursive=true" in self.path.lower() else at.glob("*")
            self._json([self._entry(place, folder) for place in sorted(places)])

        do_HEAD = do_GET

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            path = unquote(urlsplit(self.path).path)
            name = "/".join(path.split("/")[3:5])
            folder = sets[name]
            wanted = (
                re.findall(r"paths=([^&]+)", body) if "json" not in self.headers["Content-Type"] else json.loads(body)["paths"]
            )
            places = [folder / unquote(each) for each in wanted]
            entries = [self._entry(place, folder) for place in places if place.exists()]
            self._json(entries)

        @staticmethod
        def _entry(place: Path, folder: Path) -> dict[str, Any]:
            name = place.relative_to(folder).as_posix()
            if place.is_dir():
                return {"type": "directory", "path": name, "oid": "0" * 40}
            return {"type": "file", "path": name, "oid": "0" * 40, "size": place.stat().st_size}

        def _file(self, file: Path, commit: str) -> None:
            if not file.is_file():
                self._missing("EntryNotFound")
                return
            content, status = file.read_bytes(), 200
            headers = {"X_Repo_Commit": commit, "ETag": f'"{len(content)}-{file.name}"', "Accept_Ranges": "bytes"}
            if ranged := re.match(r"bytes=(\d+)-(\d+)?", self.headers.get("Range", "")):
                start, end = int(ranged[1]), min(int(ranged[2] or len(content)), len(content) - 1)
                headers["Content_Range"] = f"bytes {start}-{end}/{len(content)}"
                content, status = content[start : end + 1], 206
            self._answer(status, content, **headers)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
