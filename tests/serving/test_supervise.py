"""A server that is kept running: what its supervisor does when it dies, with a stand-in for it."""

import os
import runpy
import signal
import threading

import pytest

from llama_engine.errors import RunError
from llama_engine.serving import server as server_module
from tests.conftest import ROOT


class FakeServer:
    """Stands in for one that dies when it has been asked whether it lives: so often after each start."""

    host, http_url, grpc_url, metrics_port, log = "h", "h:1", "h:2", 3, "triton.log"

    def __init__(self, *lives):
        self.lives, self.left, self.starts, self.stopped = iter(lives), 0, 0, False

    def start(self):
        self.starts += 1
        self.left = next(self.lives, 0)
        if isinstance(self.left, Exception):
            self.left, error = 0, self.left
            raise error

    @property
    def alive(self):
        self.left -= 1
        return self.left >= 0

    def kill(self):
        pass

    def stop(self):
        self.stopped = True


@pytest.fixture
def serve_native(kept_handlers, monkeypatch):
    monkeypatch.setattr(server_module, "RESTART_AFTER_S", (0, 0, 0, 0, 0), raising=False)
    return runpy.run_path(str(ROOT / "scripts/serve_triton.py"))["serve_native"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serving_ends_in_order_at_ctrl_c_and_term(serve_native, number):
    server = FakeServer(100)
    threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
    serve_native(server)
    assert (server.starts, server.stopped) == (1, True)


def test_a_server_that_dies_is_started_again_five_times(serve_native):
    server = FakeServer()
    with pytest.raises(RunError, match="ended 6 times in a row"):
        serve_native(server)
    assert (server.starts, server.stopped) == (6, True)


def test_a_fifth_restart_that_works_goes_on_serving(serve_native):
    server = FakeServer(0, 0, 0, 0, 0, 100)
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    serve_native(server)
    assert (server.starts, server.stopped) == (6, True)
    assert server.left > 90


def test_a_restart_that_fails_is_tried_again(serve_native):
    server = FakeServer(0, RunError("not now"), RunError("not now"), 100)
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    serve_native(server)
    assert server.starts == 4


def test_pauses_grow_and_a_server_that_served_a_while_starts_anew(monkeypatch):
    waited, ended = [], threading.Event()
    monkeypatch.setattr(ended, "wait", waited.append)
    monkeypatch.setattr(server_module, "RESTART_AFTER_S", (0, 1, 4))
    with pytest.raises(RunError, match="ended 4 times in a row"):
        server_module.supervise(FakeServer(), lambda said: None, ended)
    assert waited == [0, 1, 4]
    monkeypatch.setattr(server_module, "STEADY_S", -1)
    waited.clear()
    monkeypatch.setattr(ended, "wait", lambda pause: waited.append(pause) or len(waited) == 9)
    server_module.supervise(FakeServer(), lambda said: None, ended)
    assert waited == [0] * 9
