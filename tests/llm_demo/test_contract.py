"""The served OpenAPI document against what the gateway does, fuzzed by schemathesis; no engine behind it."""

import json
import re
import shutil
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings

from llm_demo.api import IGNORED, ChatRequest, CompletionRequest
from llm_demo.app import create_app
from llm_demo.gateway import Gateway
from tests.conftest import ROOT
from tests.llm_demo.test_endings import Fake
from tests.tokenizers_small import SHAPES

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402 - after the check above


@pytest.fixture(scope="module")
def contract(tiny_engine, tmp_path_factory):
    directory = tmp_path_factory.mktemp("fuzzed") / "engine"
    shutil.copytree(tiny_engine, directory)
    SHAPES["llama3"](directory)
    gateway = Gateway(directory, "127.0.0.1:1", model_dir=None, device="cpu")
    gateway.client = gateway.baseline = Fake([400], [500, 300])
    gateway.check_model = lambda name: None  # any model, or a fuzzer that makes names up would get no further
    app = create_app(gateway, api_key=None, local_only=False)
    return schemathesis.openapi.from_asgi("/openapi.json", app).include(path_regex="completions")


def test_the_page_lists_every_field():
    page = (ROOT / "docs/USAGE.md").read_text(encoding="utf-8")
    table = page.split("is the same as leaving a field out.")[1].split("A request to the baseline")[0]
    rows = {what: fields for what, fields in re.findall(r"^\| ([a-z][^|]+) \| (`.*) \|$", table, re.MULTILINE)}
    both, chat, completions, ignored, *neutral = (re.findall(r"`([^`]+)`", fields) for fields in rows.values())
    models = ChatRequest, CompletionRequest
    for model, own in zip(models, (chat, completions)):
        assert sorted([*both, *own]) == sorted(model.model_fields)
    assert sorted(ignored) == sorted(IGNORED)
    for model, own in zip(models, neutral[1:]):
        stated = [f"{name}={json.dumps(v)}" for name, values in model.NEUTRAL.items() for v in values or (None,)]
        assert sorted([*neutral[0], *own]) == sorted(stated)


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_nothing_sent_breaks_the_gateway_and_every_answer_is_as_documented(contract, mode):
    seen = Counter()
    for operation in (result.ok() for result in contract.get_all_operations()):
        kind = schemathesis.GenerationMode[mode]

        @given(operation.as_strategy(generation_mode=kind))
        @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        def check(case):
            # some rules are beyond a schema: a length in tokens, a field that another one needs
            response = case.call_and_validate(
                headers={"Content-Type": "application/json"}, excluded_checks=[positive_data_acceptance]
            )

            seen[response.status_code] += 1

        check()
    assert seen[400]
    assert set(seen) <= {200, 400}
    assert (seen[200] > 0) == (mode == "POSITIVE")
