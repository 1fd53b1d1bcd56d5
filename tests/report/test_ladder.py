"""The precision ladder and the ablation, from small result files."""

import json

import matplotlib.pyplot as plt
import pytest

from llama_engine.measure.compare import unlike
from llama_engine.measure.result import write_result
from llama_engine.report import plots
from llama_engine.report.ladder import rungs
from llama_engine.report.render import render
from llama_engine.report.story import Story, waterfall_steps
from tests.results import measurement

FIGURES = {"tokens": 20_000, "perplexity_ratio": 1.2, "kl_mean": 0.2, "kl_max": 1.0, "top1_agreement": 0.7}


@pytest.fixture
def ladder(folder):
    """Beside the folder's own INT8: a 16-bit engine that passes, and INT4, which is faster and fails."""
    for scheme, seconds, status, figures in (
        ("fp16", 0.8, "PASSED", FIGURES | {"perplexity_ratio": 1.0, "kl_mean": 0.0}),
        ("int4", 0.25, "FAILED", FIGURES),
    ):
        fast = measurement("optimized", "native", [seconds] * 5, engine={"weights_sha256": "d" * 64, "kernels": "k"})
        fast["levels"] = [{"concurrency": n, "summary": fast["summary"]} for n in (4, 8)]
        write_result(folder / f"ladder-{scheme}.json", fast)
        gate = {"status": status, "reasons": [] if status == "PASSED" else ["kl_mean 0.2 is above 0.01"]}
        accuracy = measurement("accuracy", "native", [1.0] * 5, gate=gate)
        write_result(folder / f"ladder-{scheme}-accuracy.json", accuracy | {"summary": figures})
    return folder


def drawn(folder):
    """Whether the results allow a picture of the ladder."""
    figure = plots.ladder(Story.load(folder))
    plt.close(figure)
    return figure is not None


def test_a_scheme_that_failed_the_gate_makes_no_claim(ladder):
    found = {rung.file: rung for rung in rungs(Story.load(ladder))}
    assert list(found) == ["base", "ladder-fp16", "engine", "ladder-int4"]
    assert [rung.passed for rung in found.values()] == [True, True, True, False]
    assert found["ladder-int4"].shown == "INT4 (no claim)"
    assert (found["ladder-int4"].level, found["ladder-int4"].users) == ("ladder-int4.levels.1", 8)
    text, sources = render(Story.load(ladder))
    table = text[text.index("## The precision ladder") :]
    assert "| TTFT of a long prompt, ms |" in table  # the header stands although none was measured
    row = next(line for line in table.splitlines() if line.startswith("| INT4"))
    assert [cell.strip() for cell in row.split("|")[2:6]] == ["0.010", "32.0", "32", "8"]
    assert "1.20000 | 0.20000 | 70.00% | not measured | FAILED" in row
    cited = json.loads(sources)["The precision ladder"]
    assert cited["ladder-int4-accuracy.json:gate.status"] == "FAILED"
    summary = text[: text.index("## Set-up")]
    assert "32.0" not in summary  # INT4's speed is in no headline
    assert drawn(ladder)


def test_accuracy_without_real_weights_is_no_pass(ladder, edit_json):
    edit_json(ladder / "ladder-fp16-accuracy.json", {"summary": {"logit_error_rms": 0.001}})
    assert not rungs(Story.load(ladder))[1].passed
    assert "not on real weights" in render(Story.load(ladder))[0]


def lines_of(text):
    """The sentences on which scheme to choose."""
    return [line for line in text.splitlines() if line.startswith("* **") and ": choose" in line.replace(":** ", ": ")]


def put(path, **more):
    """Keys into the sections of a result file."""
    data = json.loads(path.read_text())
    for section, values in more.items():
        data[section] |= values
    path.write_text(json.dumps(data))


def test_schemes_are_chosen_by_figures_of_those_that_passed(ladder):
    for name, prefill, nbytes in (
        *(("baseline", 400.0, 2e7), ("optimized-native", 300.0, 1e7)),
        *(("ladder-fp16", 310.0, 1.99e7), ("ladder-int4", 100.0, 5e6)),
    ):
        put(
            ladder / f"{name}.json",
            summary={"prefill_ttft_ms": {"p50": prefill, "input_tokens": 1024}},
            cost={"weight_nbytes": nbytes, "kv_nbytes_per_token": 1000},
        )
    data = json.loads((ladder / "optimized-native.json").read_text())
    many = {"summary": data["summary"] | {"output_tokens_per_s": {"p50": 77.0}}, "workload": data["workload"]}
    level = many | {"concurrency": 16}
    (ladder / "optimized-native.json").write_text(json.dumps(data | {"levels": [level]}))
    text, sources = render(Story.load(ladder))
    assert lines_of(text) == [  # INT4 is best at all of it, and failed the gate
        "* **One request at a time:** choose INT8, 16.0 tokens/s.",
        "* **Many at once:** choose INT8, 77 tokens/s at 16.",
        "* **Long prompts:** choose INT8, which answers 1,024 tokens after 300.0 ms.",
        "* **Little memory:** choose INT8, whose weights and 100,000 tokens of KV cache take 0.11 GB.",
    ]
    cited = json.loads(sources)["The precision ladder"]
    assert {"optimized-native.json:cost.weight_nbytes", "optimized-native.json:cost.kv_nbytes_per_token"} <= set(cited)
    put(ladder / "ladder-fp16.json", summary={"prefill_ttft_ms": {"p50": 305.0, "input_tokens": 1024}})
    prompts = lines_of(render(Story.load(ladder))[0])[2]
    assert prompts.endswith("after 300.0 ms (native, 16-bit 305.0: no difference to choose by).")


def test_no_sentence_without_its_figure(ladder):
    lines = lines_of(render(Story.load(ladder))[0])  # no long prompts, and no loads of several at once but for fp16
    assert [line.partition(":")[0] for line in lines] == ["* **One request at a time", "* **Little memory"]


def test_a_scheme_whose_accuracy_alone_was_measured(ladder):
    (ladder / "ladder-int4.json").unlink()
    rung = rungs(Story.load(ladder))[-1]
    assert (rung.name, rung.measured, rung.passed) == ("INT4", False, False)
    put(ladder / "ladder-int4-accuracy.json", gate={"status": "PASSED", "reasons": [], "quick": True})
    assert rungs(Story.load(ladder))[-1].passed
    text, _ = render(Story.load(ladder))
    row = next(line for line in text.splitlines() if line.startswith("| INT4 |"))
    assert [cell.strip() for cell in row.split("|")[2:7]] == ["not measured"] * 3 + ["", "not measured"]
    assert "PASSED, quick |" in row
    assert "its accuracy alone was measured" in text
    assert not any("INT4" in line for line in lines_of(text))
    assert drawn(ladder)


def test_the_accuracy_of_another_scheme_is_no_pass(ladder):
    for name, cache in (("ladder-fp16", "fp8"), ("ladder-fp16-accuracy", "fp16")):
        data = json.loads((ladder / f"{name}.json").read_text())
        data["engine"] = {
            "weights_sha256": "d" * 64,
            "kernels": "k",
            "quantization": "16-bit",
            "config": {"kv_cache": cache},
        }
        (ladder / f"{name}.json").write_text(json.dumps(data))
    assert not rungs(Story.load(ladder))[1].passed
    put(ladder / "ladder-fp16-accuracy.json", engine={"config": {"kv_cache": "fp8"}})
    assert rungs(Story.load(ladder))[1].passed


def test_no_ladder_of_one_scheme(folder):
    assert rungs(Story.load(folder)) == []
    assert plots.ladder(Story.load(folder)) is None
    text, _ = render(Story.load(folder))
    assert "ladder" not in text


def test_the_waterfall_takes_each_measured_step_between_baseline_and_engine(ladder):
    compiled = measurement("baseline", "transformers", [0.9] * 5)
    write_result(ladder / "ablation-compiled.json", compiled)
    story = Story.load(ladder)
    assert [step.file for step in waterfall_steps(story)] == [
        *("base", "ablation-compiled", "ladder-fp16", "engine", "triton"),
    ]
    changes = [round(step.change.value, 6) for step in waterfall_steps(story)[1:]]
    assert changes == [-12.5, -12.5, -37.5, 12.5]
    longer = json.loads((ladder / "ladder-fp16.json").read_text())
    longer["workload"]["output_tokens"] = 9
    (ladder / "ladder-fp16.json").write_text(json.dumps(longer))
    assert "ladder-fp16" not in [step.file for step in waterfall_steps(Story.load(ladder))]


def test_engines_of_other_schemes_are_not_compared_in_silence():
    old, new = (measurement("optimized", "native", [1.0] * 5, engine={"kernels": "k"}) for _ in range(2))
    assert list(unlike(old, new)) == []  # older results do not say
    new["engine"]["quantization"] = "W4A16_GROUPWISE"
    assert list(unlike(old, new)) == ["the engines are quantized otherwise: W8A16 and W4A16_GROUPWISE"]
