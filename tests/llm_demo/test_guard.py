"""What the gateway refuses before it reads a body, over real connections, and the shape of every refusal."""

import contextlib
import json
import socket
import threading
import time

import httpx
import pytest
import uvicorn

from llama_engine.serving.server import free_port
from llm_demo import guard
from llm_demo.app import create_app
from llm_demo.gateway import Gateway

KEY = {"Authorization": "Bearer sesame"}
JSON = {"Content-Type": "application/json"}


@contextlib.contextmanager
def serve(app):
    """The app on a port of its own: its URL."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        web = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=web.run, kwargs={"sockets": [door]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{door.getsockname()[1]}"
        finally:
            web.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def behind(smollm2_engine):
    """With no Triton behind it."""
    return Gateway(smollm2_engine, f"127.0.0.1:{free_port()}", model_dir=None, device="cpu")


@pytest.fixture(scope="module")
def app(behind):
    """With a key, on this machine only."""
    return create_app(behind, api_key="sesame", local_only=True)


@pytest.fixture(scope="module")
def url(app):
    with serve(app) as url:
        yield url


@pytest.fixture
def talk(url):
    """Send raw bytes and return the status and the error of what comes back; the connection stays open for more."""
    where = httpx.URL(url)
    with socket.create_connection((where.host, where.port), timeout=10) as raw:

        def send(head, body=b"", key=KEY):
            lines = ["POST /v1/chat/completions HTTP/1.1", f"Host: {where.host}:{where.port}", *head]
            lines += [f"{name}: {value}" for name, value in (JSON | key).items()]
            raw.sendall("\r\n".join([*lines, "", ""]).encode() + body)
            answer = raw.makefile("rb")
            status = int(answer.readline().split()[1])
            headers = dict(line.decode().lower().rstrip().split(": ", 1) for line in iter(answer.readline, b"\r\n"))
            return status, json.loads(answer.read(int(headers["content-length"])))["error"]

        yield send


def test_a_large_body_is_refused_before_it_is_sent(talk):
    status, error = talk(["Content-Length: 300000000"])
    assert (status, error["code"]) == (413, "request_too_large")
    assert "4 MiB" in error["message"]


def test_a_large_body_of_unknown_length_is_refused_while_it_comes(talk, app):
    chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    status, error = talk(["Transfer-Encoding: chunked"], chunk * 5)
    assert (status, error["type"]) == (413, "invalid_request_error")
    assert app.held == 0


def test_the_key_is_asked_for_before_the_body(talk):
    status, error = talk(["Content-Length: 1000"], key={"Authorization": "Bearer wrong"})
    assert (status, error["code"], error["type"]) == (401, "invalid_api_key", "authentication_error")


def test_a_slow_body_is_given_up(talk, app, monkeypatch):
    monkeypatch.setattr(guard, "BODY_S", 0.3)
    status, error = talk(["Content-Length: 1000"], b'{"model": ')
    assert status == 408
    assert "did not arrive within 0.3 s" in error["message"]
    assert app.held == 0


def test_bodies_share_a_bounded_memory(url, talk, app, monkeypatch):
    monkeypatch.setattr(guard, "MAX_BODIES_BYTES", 1000)
    where = httpx.URL(url)
    with socket.create_connection((where.host, where.port)) as slow:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {where.host}\r\nAuthorization: {KEY['Authorization']}\r\n"
        slow.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 999\r\n\r\n".encode() + b" " * 900)
        deadline = time.monotonic() + 10
        while app.held != 900:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        status, error = talk(["Content-Length: 200"], b" " * 200)
        assert (status, error["code"]) == (429, "bodies_full")
    while app.held:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_client_that_sends_it_all_can_read_the_refusal(url):
    for content in (b" " * 20_000_000, iter([b" " * 1_000_000] * 20)):
        refused = httpx.post(f"{url}/v1/completions", content=content, headers=JSON | KEY, timeout=60)
        assert refused.status_code == 413
        assert refused.headers["connection"] == "close"


def test_a_body_of_the_largest_text_is_read(url):
    body = {"model": "none", "prompt": "\u20ac" * (1 << 20)}
    content = json.dumps(body, ensure_ascii=False).encode()
    assert 3 << 20 < len(content) < guard.MAX_BODY_BYTES
    answer = httpx.post(f"{url}/v1/completions", content=content, headers=JSON | KEY, timeout=60)
    assert answer.json()["error"]["code"] == "model_not_found"


def changing_routes(app):
    routes = getattr(app, "app", app).routes
    found = [(method, route.path) for route in routes for method in getattr(route, "methods", None) or ()]
    return [(method, path) for method, path in found if method not in ("GET", "HEAD")]


def test_every_route_that_changes_something_refuses_foreign_pages_and_forms(url, app):
    routes = changing_routes(app)
    assert {path for _, path in routes} == {"/baseline", "/v1/chat/completions", "/v1/completions"}
    port = httpx.URL(url).port
    foreign = [
        "https://evil.example",
        "null",
        f"http://127.0.0.1:{port + 1}",
        f"http://127.0.0.1.evil.example:{port}",
        "",
    ]
    for method, path in routes:
        for origin in foreign:
            refused = httpx.request(method, url + path, json={}, headers=KEY | {"Origin": origin})
            assert refused.status_code == 403, (path, origin)
            assert refused.json()["error"]["code"] == "foreign_origin"
        for kind in (
            "text/plain",
            "application/x-www-form-urlencoded",
            "multipart/form-data",
            "text/plain; application/json",
        ):
            refused = httpx.request(method, url + path, content="{}", headers=KEY | {"Content-Type": kind})
            assert refused.status_code == 415, (path, kind)
            assert "application/json" in refused.json()["error"]["message"]
        assert httpx.request(method, url + path, headers=KEY).status_code == 415
        for own in ({"Origin": url}, {"Origin": url.upper()}, {}):
            passed = httpx.request(method, url + path, json={"model": "none"}, headers=KEY | own)
            assert passed.status_code in (400, 404), (path, own)


def test_everything_but_the_page_needs_the_key(url):
    for path in ("/v1/models", "/v1/none", "/baseline", "/docs", "//v1/models", "/static"):
        assert httpx.get(url + path).status_code == 401, path
    for path in ("/", "/static/app.js", "/metrics"):
        assert httpx.get(url + path).status_code == 200, path
    assert httpx.post(url, json={}).status_code == 401


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "[::1", ""])
def test_a_foreign_host_is_refused_in_openai_s_shape(url, host):
    refused = httpx.get(url, headers={"Host": host})
    assert refused.status_code == 400
    assert "this machine only" in refused.json()["error"]["message"]
    assert refused.headers["x-content-type-options"] == "nosniff"


def test_a_fault_of_the_gateway_is_in_openai_s_shape_too(url, behind, monkeypatch):
    async def broken():
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(behind.client, "ready", broken)
    failed = httpx.get(f"{url}/health")
    assert failed.status_code == 500
    assert failed.json()["error"]["type"] == "server_error"
    assert "secret" not in failed.text
    assert failed.headers["x-content-type-options"] == "nosniff"
