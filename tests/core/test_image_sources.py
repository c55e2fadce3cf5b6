"""Every place a picture can come from: files, links, odd names, arrays, addresses."""

import hashlib
import http.server
import io
import os
import socket
import threading
import time

import pytest

from grounding.core import images
from grounding.core.errors import GroundingError
from grounding.core.images import ImageError, open_image, quote
from tests.support.images import encode, noise, refused
from tests.support.tolerances import SOON

# ---------------------------------------------------------------- files


def test_no_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    for name, message in {
        "missing.png": "'missing.png': there is no such file",
        ".": "'.': Is a directory",
        "/dev/null": "'/dev/null': a device, not a file",
        "loop": "'loop': ",
        "a\0b": "null byte",
        "x" * 5000: r"xx\.\.\.xx.*: ",
        "": "'': ",
    }.items():
        with refused("failed_read", message):
            open_image(name)
    with refused("failed_read", "links form a loop|symbolic links"):
        open_image("loop", root=tmp_path)


def test_a_fifo_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with refused("failed_read", "a FIFO, not a file"):
        open_image(tmp_path / "fifo")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encode(noise()))
    path.chmod(0)
    with refused("failed_read", "permission denied"):
        open_image(path)


def test_permission_denied_in_words(monkeypatch):
    def deny(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", deny)
    with refused("failed_read", "may not be read"):
        open_image("a.png")


@pytest.mark.parametrize("name", ["-rf.png", "a\nb.png", 'it\'s "so".png', "\x1b[31mred.png", "🐶.png", "\udcff.png"])
def test_strange_names(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(encode(noise()))
    assert open_image(str(path)).path == str(path)
    path.write_bytes(b"text")
    with refused("failed_decode", "not an image") as caught:
        open_image(path)
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith(quote(path))


def test_show():
    assert quote("a\n\x1b[0m\u202e'") == '"a\\n\\x1b[0m\\u202e\'"'
    assert len(quote("x" * 10000)) < 250


def test_a_path_must_stay_in_its_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "in"
    root.mkdir()
    data = encode(noise())
    (tmp_path / "out.png").write_bytes(data)
    (tmp_path / "in-also.png").write_bytes(data)
    (root / "a.png").write_bytes(data)
    (root / "to_a.png").symlink_to("a.png")
    (root / "to_out.png").symlink_to("../out.png")
    (root / "folder").symlink_to("..")
    for name in ("a.png", "to_a.png", "folder/in/a.png", root / "a.png"):
        assert open_image(name, root="in").width == 80
    opened = []
    monkeypatch.setattr(os, "open", lambda path, *_: opened.append(path))
    outside = ("../out.png", "to_out.png", "folder/out.png", tmp_path / "out.png", "../in-also.png", "/etc/passwd")
    for name in (*outside, "../../../../../../../../etc/passwd"):
        with refused("failed_input", "is outside of 'in' and is not opened"):
            open_image(name, root="in")
    assert opened == []


def test_other_things():
    for wrong in (None, 3, b"bytes", ["a.png"]):
        with refused("failed_input", f"not {type(wrong).__name__}"):
            open_image(wrong)
    with refused("failed_input", "open it in binary mode"):
        open_image(io.StringIO("text"))
    closed = io.BytesIO()
    closed.close()
    with refused("failed_read", "cannot be read"):
        open_image(closed)
    assert issubclass(ImageError, GroundingError)


def test_a_file_that_is_too_long(monkeypatch, tmp_path):
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    path = tmp_path / "a.png"
    path.write_bytes(encode(noise()))
    for source in (path, io.BytesIO(encode(noise()))):
        with refused("failed_input", "more than 100 bytes"):
            open_image(source)


# ---------------------------------------------------------------- addresses


@pytest.fixture
def address(monkeypatch):
    """A web server of our own: /picture, /endless (drips), and 404 for the rest."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path not in ("/picture", "/endless"):
                return self.send_error(404)
            self.send_response(200)
            self.end_headers()
            try:
                self.wfile.write(encode(noise()))
                while self.path == "/endless":
                    self.wfile.write(b"x")
                    time.sleep(0.02)
            except OSError:
                pass  # the other side had enough
            return None

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_addresses(address, monkeypatch):
    image = open_image(f"{address}/picture", allow_url=True)
    assert image.path == f"{address}/picture"
    assert image.sha256 == hashlib.sha256(encode(noise())).hexdigest()
    with refused("failed_read", "404"):
        open_image(f"{address}/missing", allow_url=True)
    monkeypatch.setattr(images, "MAX_URL_BYTES", 1000)
    with refused("failed_input", "more than 1000 bytes"):
        open_image(f"{address}/picture", allow_url=True)


def test_an_address_that_drips_is_given_up(address, monkeypatch):
    monkeypatch.setattr(images, "URL_SECONDS", 0.3)
    start = time.monotonic()
    with refused("failed_read", r"no whole image within 0\.3 seconds"):
        open_image(f"{address}/endless", allow_url=True)
    assert time.monotonic() - start < SOON


def test_an_address_that_says_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(images, "URL_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server, refused("failed_read", r"within 0\.3 sec|cannot be fetched"):
        open_image(f"http://127.0.0.1:{server.getsockname()[1]}/", allow_url=True)


def test_addresses_that_are_not_fetched(monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(images.urllib.request, "urlopen", forbidden)
    with refused("failed_input", "unless allow_url is set"):
        open_image("http://example.org/a.png")
    for address in ("file:///etc/passwd", "ftp://example.org/a.png", "FILE:///etc/passwd"):
        with refused("failed_input", "only http and https"):
            open_image(address, allow_url=True)


@pytest.mark.parametrize("address", ["http://[x/a", "http://a b/\n", "http://127.0.0.1:1/a"])
def test_addresses_that_lead_nowhere(address):
    with refused("failed_read", "cannot be fetched"):
        open_image(address, allow_url=True)
