"""What a story says of results put together by hand."""

import pytest

from llama_engine.report.story import Story


@pytest.mark.parametrize(
    ("quick", "source", "note"),
    [
        (True, "pretrained", "quick gate: 2,555 tokens scored, a full one takes 20,000"),
        (True, "synthetic", ""),
        (False, "pretrained", ""),
    ],
)
def test_a_quick_gate_is_named(quick, source, note):
    accuracy = {"benchmark": "accuracy", "backend": "native", "model": {"source": source}, "summary": {"tokens": 2555}}
    story = Story("box", {"accuracy-native.json": accuracy | {"gate": {"status": "PASSED", "quick": quick}}}, "")
    assert story.quick_gate == note


def test_an_engine_of_any_backend_has_a_name():
    files = {name: {"benchmark": "optimized", "backend": "other"} for name in ("baseline.json", "optimized-other.json")}
    assert [label for _, label in Story("box", files, "").stacks()][1] == "other engine"
