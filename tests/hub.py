"""A local stand-in for the Hugging Face hub: two HTTP servers on 127.0.0.1, with faults that are switched on per file.

It speaks what `huggingface_hub` needs to download a dataset file (checked against the source of 2.4.0): the hub
answers `HEAD` and `GET /datasets/<repo>/resolve/<revision>/<file>` with a redirect that carries commit, length and
checksum; the second server is the content network behind it, which serves ranges of bytes and must never see a token.
"""

import hashlib
import http.server
import os
import socket
import threading
import time
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit

import numpy as np

REPO = "kjj0/fineweb10B-gpt2"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def shard_bytes(tokens: int, seed: int = 0, magic: int = 20240520, version: int = 1, count: int | None = None) -> bytes:
    "A shard with documents of 50 tokens; `magic`, `version` and `count` can lie."
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, tokens if count is None else count
    body = np.random.default_rng(seed).integers(0, 50256, tokens).astype("<u2")
    body[::50] = 50256
    return header.tobytes() + body.tobytes()


@dataclass
class Fault:
    "What goes wrong with one file; the default is nothing."

    cut_at: int | None = None  # close the connection before this byte of the file ...
    cuts: int = 10**9  # ... this many times, then heal
    stall_at: int | None = None  # send nothing from this byte on until the test releases `Hub.resume`
    drop_from: int | None = None  # the file that is served ends here, though `HEAD` announces all of it
    flip: int | None = None  # invert this byte on the way
    status: int | None = None  # answer every request with this status
    ignore_range: bool = False  # always send the whole file
    plain_web: bool = False  # answer `HEAD` like a web server that is no hub


@dataclass
class Seen:
    "One request, as the server saw it."

    server: str  # "hub" or "cdn"
    method: str
    path: str
    name: str  # file name
    range: str | None
    authorization: str | None
    encoding: str | None  # what the client accepts
    sent: int = 0  # bytes of the body that went out


@dataclass
class Hub:
    "`with Hub({name: content}) as hub:` serves the files; `hub.seen` lists the requests."

    files: dict[str, bytes]
    faults: dict[str, Fault] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    resume: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Hub":
        self.servers = {kind: make_server(self, kind) for kind in ("hub", "cdn")}
        for server in self.servers.values():
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exc) -> None:
        self.resume.set()
        for server in self.servers.values():
            server.shutdown()
            server.server_close()

    def address(self, kind: str) -> str:
        return f"http://127.0.0.1:{self.servers[kind].server_address[1]}"

    @property
    def url(self) -> str:
        "What HF_ENDPOINT should be."
        return self.address("hub")

    def env(self, home) -> dict[str, str]:
        "Environment of a process that downloads from here and reads or writes nothing of the user's."
        kept = {k: v for k, v in os.environ.items() if not k.upper().endswith("_PROXY") and not k.startswith("HF_")}
        return kept | {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*",
                       "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": "hf_of_the_test"}

    def gets(self, name: str | None = None) -> list[Seen]:
        "Requests that reached the content network."
        return [seen for seen in self.seen if seen.server == "cdn" and name in (None, seen.name)]


def make_server(hub: Hub, kind: str) -> http.server.ThreadingHTTPServer:
    "One of the two servers, on a free port."

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = urlsplit(self.path)
            name = path.path.rpartition("/")[2]
            self.seen = Seen(kind, self.command, self.path, name, self.headers["Range"], self.headers["Authorization"],
                             self.headers["Accept-Encoding"])
            hub.seen.append(self.seen)
            fault = hub.faults.get(name, Fault())
            if fault.status:
                self.head(fault.status, {})
            elif kind == "cdn":
                self.content(name, fault, parse_qs(path.query))
            elif not path.path.startswith(f"/datasets/{REPO}/resolve/main/"):
                self.head(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."})
            elif name not in hub.files:
                self.head(404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found",
                                "X-Repo-Commit": COMMIT})
            elif fault.plain_web:
                self.head(200, {"Content-Type": "text/html"}, b"<html>Please log in</html>")
            else:
                self.redirect(name)

        def head(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            if "Content-Length" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def redirect(self, name: str) -> None:
            "The hub's answer for a large file; the Xet headers are there to be ignored."
            digest = hashlib.sha256(hub.files[name]).hexdigest()
            self.head(302, {
                "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes", "ETag": f'"{digest}"',
                "X-Linked-Size": str(len(hub.files[name])), "X-Linked-ETag": f'"{digest}"',
                "X-Xet-Hash": digest, "Link": f'<{hub.url}/api/xet-token>; rel="xet-auth"',
                "Location": f"{hub.address('cdn')}/blobs/{name}?signature={digest[:8]}"}, b"Found")

        def content(self, name: str, fault: Fault, query: dict[str, list[str]]) -> None:
            "A range of bytes from the content network, with this file's faults."
            body = hub.files[name][: fault.drop_from]
            if query.get("signature") != [hashlib.sha256(hub.files[name]).hexdigest()[:8]]:
                return self.head(403, {})
            start = 0
            if self.headers["Range"] and not fault.ignore_range:
                start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
                if start >= len(body):
                    return self.head(416, {"Content-Range": f"bytes */{len(body)}"})
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            if fault.flip is not None:
                body = body[: fault.flip] + bytes([body[fault.flip] ^ 0xFF]) + body[fault.flip + 1:]
            self.stream(body, start, fault)

        def stream(self, body: bytes, start: int, fault: Fault) -> None:
            cut = fault.cut_at if fault.cut_at is not None and fault.cuts > 0 else None
            stops = [at for at in (cut, fault.stall_at) if at is not None]
            end = max(start, min([len(body), *stops]))
            try:
                self.wfile.write(body[start:end])
                self.wfile.flush()
                self.seen.sent = end - start
                if stops and end < len(body):
                    fault.cuts -= 1
                    if cut is None:
                        hub.resume.wait()
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                self.close_connection = True  # the client went away, as a killed process does

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    return server


def wait_until(condition, seconds: float = 20) -> None:
    "Poll a condition; fails when it does not come true in time."
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError("waited too long")
        time.sleep(0.02)
