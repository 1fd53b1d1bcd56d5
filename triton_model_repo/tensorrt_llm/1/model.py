"""Triton's Python backend over one native engine: every request joins the same running batch.

``execute`` only checks and queues; the engine's thread makes tokens; one sender thread answers. A sender that falls
behind merges what piled up for a request into its next response, so streaming never slows the engine.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

# The backend's stub ignores PYTHONPATH; without a virtual environment the package is found only through it.
sys.path += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]

import numpy as np
import torch
import triton_python_backend_utils as pb_utils

from llama_engine.device import use_own_gpu
from llama_engine.engine.engine import FinishReason, Output
from llama_engine.engine.loop import EngineLoop
from llama_engine.errors import ErrorCode, InputError, RunError, with_code
from llama_engine.grammar import Grammar, Grammars
from llama_engine.native import load_engine
from llama_engine.sampling import Logprobs
from llama_engine.serving.request import GenerationRequest, parse, scalar

# Triton's own code of each kind of error; a gRPC stream loses it, so that the message starts with ours.
TRITON_CODES = {
    ErrorCode.INVALID: "INVALID_ARG",
    ErrorCode.CONTEXT_LENGTH: "INVALID_ARG",
    ErrorCode.QUEUE_FULL: "UNAVAILABLE",
    ErrorCode.SHUTTING_DOWN: "UNAVAILABLE",
    ErrorCode.TIMEOUT: "CANCELLED",
    ErrorCode.CANCELLED: "CANCELLED",
}
FINAL = 1  # TRITONSERVER_RESPONSE_COMPLETE_FINAL: the stub adds its own names only after this import
GAUGES = {
    "requests": "requests running or waiting",
    "running": "requests in the running batch",
    "waiting": "queue depth",
    "kv_blocks_used": "KV cache blocks in use",
    "kv_blocks_total": "KV cache blocks that can be used",
    "step_nbytes": "weight bytes one decode step reads on a GPU",
    "kv_nbytes_per_token": "KV cache bytes a token holds on a GPU",
    "tp_size": "GPUs that one step runs on",
    "tokens_per_s": "tokens made in the last second",
}
COUNTERS = {
    "tokens_generated": "tokens made since start",
    "prefix_cache_query_tokens": "prompt tokens looked up in the prefix cache",
    "prefix_cache_hit_tokens": "prompt tokens found there",
    "preemptions": "requests put back for want of KV blocks",
    "steps": "engine steps since start",
}


class Live:
    """A :class:`GenerationRequest` between ``execute`` and its final response, with what Triton answers it through and
    what has come of it. ``ids`` only grows; ``sent`` of them are answered. ``logprobs``, if the request asks for them,
    are those of the ids after the first ``prompted``, and are there before their ids.

    ``lock`` guards ``sender``: Triton frees what ``is_cancelled`` reads when the final response is sent.
    """

    def __init__(self, request: GenerationRequest, sender: Any, name: str) -> None:
        self.request, self.sender, self.name = request, sender, name
        self.lock = threading.Lock()
        self.id = -1
        self.ids: list[int] = [] if request.streaming or request.exclude_input else request.prompt + request.output
        self.prompted = len(self.ids)
        self.logprobs: list[Logprobs] = []
        self.prompt_logprobs: list[Logprobs] | None = None  # until sent
        self.cached_tokens = 0
        self.told = False  # how many they are
        self.sent = 0
        self.due = 0  # ids that the outbox has been told of
        self.total_logprob = 0.0  # of what is sent
        self.reason: FinishReason | RunError | None = None


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        options = {key: value["string_value"] for key, value in config["parameters"].items()}
        self.decoupled = pb_utils.using_decoupled_model_transaction_policy(config)
        self.timeout_s = float(options["request_timeout_s"]) or None
        self.drain_s = float(options["drain_s"])
        self.stream_interval = int(options["stream_interval"])
        self.exclude_input = options["exclude_input_in_output"] == "true"
        reuse = options["enable_kv_cache_reuse"] == "true"
        self.instances = config["instance_group"][0]["count"]
        self.labels = {"model": args["model_name"]}
        if self.instances > 1:  # of which each is a process
            self.labels["instance"] = args["model_instance_name"]
            use_own_gpu(int(args["model_instance_name"].rpartition("_")[2]))
        engine = load_engine(
            options["engine_dir"], device=options["device"], kernels=options["kernels"], enable_prefix_cache=reuse
        )
        pb_utils.Logger.log_info(f"engine {options['engine_dir']}: kernels {engine.executor.kernels}")
        self.grammars, self.engine_dir, self.vocab_size = {}, options["engine_dir"], engine.model_config.vocab_size
        self.labels["kernels"] = engine.executor.kernels
        self.sizes = {key: getattr(engine.executor, key) for key in ("step_nbytes", "kv_nbytes_per_token")}
        self.sizes["tp_size"] = engine.config.tp_size
        self.loop = EngineLoop(engine, max_queue=int(options["max_queue_size"]))
        self.live: dict[int, Live] = {}
        self.outbox: queue.SimpleQueue[Live | None] = queue.SimpleQueue()
        self.closing = threading.Event()
        self.threads = [threading.Thread(target=run, daemon=True) for run in (self._send_all, self._watch)]
        for thread in self.threads:
            thread.start()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._accept(request, sender)
            except (InputError, RunError) as error:
                _refuse(sender, error)
            except Exception as error:  # one request's failure must not take the others down
                _refuse(sender, RunError(f"{type(error).__name__}: {error}"))

    def finalize(self) -> None:
        self.loop.shutdown(self.drain_s)
        self.closing.set()
        self.outbox.put(None)
        for thread in self.threads:
            thread.join(timeout=10)

    def _accept(self, request: Any, sender: Any) -> None:
        arrays = {tensor.name(): _array(tensor) for tensor in request.inputs()}
        name = request.request_id()
        if scalar(arrays, "stop", False):
            if self.instances > 1:  # Triton chose this one, which need not be the one that answers the request
                raise InputError(f"stop reaches one of {self.instances} instances: leave the stream to cancel")
            for live in [live for live in self.live.values() if name and live.name == name]:
                self.loop.cancel(live.id)
            sender.send(_response([]), flags=FINAL)
            return
        wanted = parse(arrays, exclude_input_default=self.exclude_input)
        if wanted.streaming and not self.decoupled:
            raise InputError("streaming=true needs the decoupled model: serve without --no-decoupled")
        live = Live(wanted, sender, name)
        timeout_us = request.timeout()

        def on_tokens(output: Output) -> None:
            live.logprobs += output.logprobs or []
            live.prompt_logprobs = output.prompt_logprobs or live.prompt_logprobs
            live.cached_tokens = output.cached_tokens
            live.ids.extend(output.token_ids)
            live.reason = output.reason
            due = self.stream_interval if live.due else 1  # the first token at once
            if output.finished or (wanted.streaming and len(live.ids) - live.due >= due):
                live.due = len(live.ids)
                self.outbox.put(live)

        live.id = self.loop.submit(
            wanted.prompt,
            wanted.max_new_tokens,
            params=wanted.params,
            stop_token_ids=wanted.stop_token_ids,
            min_tokens=wanted.min_tokens,
            output=wanted.output,
            grammar=self._grammar(wanted),
            on_tokens=on_tokens,
            timeout_s=timeout_us / 1e6 if timeout_us else self.timeout_s,
        )
        self.live[live.id] = live
        if live.reason:  # it ended before it was entered
            self.live.pop(live.id, None)

    def _grammar(self, wanted: GenerationRequest) -> Grammar | None:
        """The request's grammar, with the tokens that end it; a tokenizer for them takes a second, once."""
        if wanted.grammar is None:
            return None
        if wanted.stop_token_ids not in self.grammars:
            self.grammars = {wanted.stop_token_ids: Grammars(self.engine_dir, self.vocab_size, wanted.stop_token_ids)}
        return self.grammars[wanted.stop_token_ids].compile(wanted.grammar)

    def _send_all(self) -> None:
        while (live := self.outbox.get()) is not None:
            try:
                if live.sender is not None:
                    self._answer(live)
            except Exception as error:  # the client is gone: its blocks go back
                pb_utils.Logger.log_warn(f"response not delivered: {error}")
                self.loop.cancel(live.id)

    def _answer(self, live: Live) -> None:
        """Send what is new, if anything: the outbox holds a request once a step, and one answer takes all there is."""
        reason = live.reason  # read before the ids: once it is set they are complete
        first, ids = live.sent, live.ids[live.sent :]
        live.sent += len(ids)
        tensors = {}
        if not live.told and (ids or reason):
            tensors["cached_tokens"] = torch.tensor([[live.cached_tokens]], dtype=torch.int32)
            live.told = True
        if live.request.params.logprobs is not None:
            scored = live.logprobs[max(0, first - live.prompted) : live.sent - live.prompted]
            live.total_logprob += sum(entry.token for entry in scored)
            tensors |= _scores("output", scored) | {"cum_log_probs": torch.tensor([[live.total_logprob]])}
            if (ids or reason) and live.prompt_logprobs:
                tensors |= _scores("prompt", live.prompt_logprobs)
                live.prompt_logprobs = None
        if reason is None:
            if ids:
                live.sender.send(_response(ids, tensors))
            return
        with live.lock:
            sender, live.sender = live.sender, None
        self.live.pop(live.id, None)
        if isinstance(reason, RunError):
            _refuse(sender, reason)
        else:
            sender.send(_response(ids, tensors), flags=FINAL)

    def _watch(self) -> None:
        """Cancel what its client gave up, and publish the metrics. Polling costs ~0.1 ms each, so it is paced."""
        kinds = {pb_utils.MetricFamily.GAUGE: GAUGES, pb_utils.MetricFamily.COUNTER: COUNTERS}
        families = [  # a family that is not kept takes its metrics with it
            (name, pb_utils.MetricFamily(name=f"llama_engine_{name}", description=text, kind=kind))
            for kind, names in kinds.items()
            for name, text in names.items()
        ]
        metrics = {name: family.Metric(labels=self.labels) for name, family in families}
        published, next_metrics = dict.fromkeys(metrics, 0.0), 0.0
        while not self.closing.is_set():
            if time.monotonic() >= next_metrics:
                next_metrics = time.monotonic() + 0.25
                for name, value in (self.loop.stats() | self.sizes).items():
                    if value != published[name]:
                        metric, change = metrics[name], value - published[name]
                        metric.set(value) if name in GAUGES else metric.increment(change)
                        published[name] = value
            for live in list(self.live.values()):
                with live.lock:
                    cancelled = live.sender is not None and live.sender.is_cancelled()
                if cancelled:
                    self.loop.cancel(live.id)
                self.closing.wait(0.002)
            self.closing.wait(0.005)


def _array(tensor: Any) -> np.ndarray:
    """The tensor's values. Always through DLPack and PyTorch: under NumPy 2 this stub repeats the first element of
    every array it makes, takes those it is given for empty, and NumPy's own DLPack capsules warn at every use."""
    return torch.from_dlpack(tensor.to_dlpack()).numpy()


def _response(ids: list[int], more: Mapping[str, torch.Tensor] = MappingProxyType({})) -> Any:
    """output_ids ``[1, beams=1, seq]``, sequence_length ``[1, 1]`` and ``more``."""
    tensors = {
        "output_ids": torch.tensor(ids, dtype=torch.int32).view(1, 1, -1),
        "sequence_length": torch.tensor([[len(ids)]], dtype=torch.int32),
        **more,
    }
    return pb_utils.InferenceResponse([pb_utils.Tensor.from_dlpack(*item) for item in tensors.items()])


def _scores(what: str, scored: list[Logprobs]) -> dict[str, torch.Tensor]:
    """Log-probabilities of tokens ``[1, 1, tokens]``, and of the most likely if asked for, ``[1, 1, tokens, n]``."""
    tensors = {f"{what}_log_probs": torch.tensor([entry.token for entry in scored]).view(1, 1, -1)}
    if scored and (n := len(scored[0].top)):
        top, shape = [pair for entry in scored for pair in entry.top], (1, 1, len(scored), n)
        tensors[f"{what}_top_ids"] = torch.tensor([token for token, _ in top], dtype=torch.int32).view(shape)
        tensors[f"{what}_top_log_probs"] = torch.tensor([value for _, value in top]).view(shape)
    return tensors


def _refuse(sender: Any, error: InputError | RunError) -> None:
    code = getattr(pb_utils.TritonError, TRITON_CODES.get(error.code, "INTERNAL"))
    sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(with_code(error), code)), flags=FINAL)
