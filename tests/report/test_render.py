"""The report from result files: nothing is shown that should not be, nothing is missing, every figure has a source."""

import json
import re
import shutil

import pytest

from llama_engine.errors import InputError
from llama_engine.measure.result import new_result, write_result
from llama_engine.report import plots, render
from llama_engine.report.story import Story, best_load
from tests.results import ENVIRONMENT


def page(folder):
    return render.render(Story.load(folder))[0]


def test_a_complete_report(folder):
    text = page(folder)
    assert "**2.00x** [2.00, 2.00] faster" in text
    assert "No speed-up" not in text
    assert "Gate: **PASSED**" in text
    assert "Scaling from 1 to 2 requests: 1.00x, 50% of linear" in text
    assert "| through Triton | 75.000 | +12.50 |" in text
    assert text == page(folder)


def test_every_source_leads_to_a_value_and_gave_figures_of_its_section(folder):
    story = Story.load(folder)
    text, sources = render.render(story)
    sections = dict(part.split("\n", 1) for part in text.split("## "))
    found = [(title, *item) for title, part in json.loads(sources).items() for item in part.items()]
    assert len(found) > 40
    for title, source, figures in found:
        file, _, path = source.partition(":")
        assert story.get(file, path) is not None, source
        assert all(figure in sections[title] for figure in figures.split("; ")), source
    assert ("Summary", "comparison.json:speedup.latency", "**2.00x** [2.00, 2.00] faster") in found
    assert ("Summary", "optimized-native.json:summary.tpot_ms.p50", "50.00") in found


def test_sources_of_a_headline_lead_to_each_machine_from_above(folder):
    story = Story.load(folder)
    _, sources = render.render(story, headline=True, others=[story])
    assert json.loads(sources)["Other machines"]["box/baseline.json:summary.ttft_ms.p50"] == "30.0"
    assert all(source.startswith("box/") for part in json.loads(sources).values() for source in part)


def test_lines_and_tables_without_a_figure_are_left_out(folder, edit_json):
    text = page(folder)
    assert "| GPU | none |" in text
    assert "driver not measured" not in text
    assert "| top kernels |" not in text
    assert "Sampled 25 times" not in text
    assert "not measured" not in re.sub("(?s)## Cost.*?## ", "", text).replace("prefill: not measured", "")
    assert "| through Triton, 1 at once | 75,000 | not measured |" in text  # one figure of two
    edit_json(folder / "optimized-native.json", {"validity": {"status": "INVALID", "reasons": ["x"]}})
    edit_json(folder / "triton-native.json", {"validity": {"status": "INVALID", "reasons": ["x"]}})
    assert "## From baseline to server" not in page(folder)


def test_no_speedup_without_the_accuracy_gate(folder, edit_json):
    edit_json(folder / "accuracy-native.json", {"gate": {"status": "FAILED", "reasons": ["kl_mean 0.5 is above 0.01"]}})
    assert "2.00x" not in page(folder)
    assert "the accuracy gate failed: kl_mean 0.5" in page(folder)
    edit_json(
        folder / "accuracy-native.json",
        {"engine": {"weights_sha256": "f" * 64}, "gate": {"status": "PASSED", "reasons": []}},
    )
    text = page(folder)
    assert "run on another engine" in text
    assert "    ./scripts/run_all.sh --device cpu --model-dir DIR --name box\n" in text
    (folder / "accuracy-native.json").unlink()
    assert "2.00x" not in page(folder)
    assert "gate was not run" in page(folder)


def test_invalid_runs_give_no_ratio(folder, edit_json):
    invalid = {"status": "INVALID", "reasons": ["1 requests failed"]}
    for name in ("comparison", "triton-native"):
        edit_json(folder / f"{name}.json", {"validity": invalid})
    levels = json.loads((folder / "triton-native.json").read_text())["levels"]
    edit_json(folder / "triton-native.json", {"levels": [level | {"validity": invalid} for level in levels]})
    text = page(folder)
    assert "2.00x" not in text
    assert "of linear" not in text
    assert "through Triton, 1 at once (INVALID)" in text
    assert "> **INVALID** triton-native.json: 1 requests failed" in text


def test_scaling_ends_at_the_largest_load_that_counts(folder, edit_json):
    assert "Scaling from 1 to 2 requests" in page(folder)
    levels = json.loads((folder / "triton-native.json").read_text())["levels"]
    bad = levels[1] | {"concurrency": 4, "validity": {"status": "INVALID", "reasons": ["GPU clocks were throttled"]}}
    edit_json(folder / "triton-native.json", {"levels": [*levels, bad]})
    assert "Scaling from 1 to 2 requests" in page(folder)


def test_missing_parts_are_said_to_be_missing(folder, coarse_pictures):
    for name in ("triton-native", "accuracy-native", "comparison", "optimized-native"):
        (folder / f"{name}.json").unlink()
        text = page(folder)
        if name in ("accuracy-native", "optimized-native"):
            assert plots.draw_all(Story.load(folder), folder)
    assert "Triton Inference Server was not measured" in text
    assert "No profile was taken" in text
    assert "no paired comparison was run" in text
    (folder / "baseline.json").unlink()
    with pytest.raises(InputError, match="holds no result files"):
        Story.load(folder)


def test_synthetic_weights_are_stamped(folder, edit_json):
    for path in folder.glob("*.json"):
        edit_json(path, {"model": {"name": "m", "source": "synthetic", "sha256": "a" * 64}})
    edit_json(
        folder / "accuracy-native.json", {"summary": {"tokens": 9, "logit_error_rms": 0.001, "logit_error_max": 0.002}}
    )
    text = page(folder)
    assert "    ./scripts/run_all.sh --device cpu --synthetic m --name box\n" in text
    assert "**Synthetic weights.**" in text
    assert "perplexity, 16-bit" not in text
    assert "1.00e-03" in text
    assert "**synthetic weights**" in render.readme_block([Story.load(folder)])


def test_a_bad_load_is_marked_and_leaves_the_speed_up_standing(folder, edit_json):
    triton = json.loads((folder / "triton-native.json").read_text())
    triton["levels"][1]["validity"] = {"status": "INVALID", "reasons": ["GPU clocks were throttled"]}
    edit_json(folder / "triton-native.json", {"levels": triton["levels"]})
    text = page(folder)
    assert "through Triton, 2 at once (INVALID)" in text
    assert "through Triton, 1 at once (INVALID)" not in text
    assert "**INVALID** triton-native.json at 2: GPU clocks were throttled." in text
    assert "**2.00x** [2.00, 2.00] faster" in text
    assert re.search(r"\d at 1, [\d,]+ at 2\*\.", text)
    loads = Story.load(folder).throughput("triton")
    assert [mark for *_, mark in loads] == ["", "*"]
    assert best_load(loads) == loads[0]
    assert best_load(loads[1:]) == loads[1]


def test_noise_is_named_beside_the_ratio(folder, edit_json):
    caution = {"status": "VALID", "reasons": [], "cautions": ["latency spread (p75 - p25) / p50 is 30%"]}
    edit_json(folder / "baseline.json", {"validity": caution})
    text = page(folder)
    assert "**Caution** baseline.json: latency spread (p75 - p25) / p50 is 30%." in text
    assert "**2.00x** [2.00, 2.00] faster" in text


def contest(by_hand):
    """A tournament of two, other 5.5 and 1,234 tokens/s at 1 and 8 at once, the third cell INVALID."""
    traffic = {"name": "short", "input_tokens": "4", "output_tokens": "8"}
    traffic |= {"prefix_cache_can_help": False, "shared_prompt_share": 0.0}
    valid, hot = {"status": "VALID", "reasons": []}, {"status": "INVALID", "reasons": ["too hot"]}
    figures = [("other", 1, 5.5, valid), ("other", 8, 1234, valid), ("ours", 1, 11.0, valid), ("ours", 8, 2000, hot)]
    levels = [
        {"contestant": name, "concurrency": n, "workload": {"traffic": traffic}, "validity": verdict,
         "summary": {"output_tokens_per_s": {"p50": rate}, "ttft_ms": {"p50": 7.0}}}
        for name, n, rate, verdict in figures
    ]  # fmt: skip
    ratio = {"ratio": 2.0, "ci95": [1.9, 2.1], "verdict": "faster", "metric": "output_tokens_per_s"}
    ratio |= {"contestant": "ours", "over": "other", "workload": "short", "concurrency": 1}
    more = {"by_hand": True, "note": "Another run."} if by_hand else {"method": "in turn"}
    model = {"name": "m", "source": "pretrained", "sha256": None}
    who = [{"name": name, "kind": "vllm", "memory": "shared"} for name in ("other", "ours")]
    result = new_result("tournament", "several", model=model, workload={}, environment=ENVIRONMENT, **more)
    return result | {"levels": levels, "ratios": [ratio], "contestants": who, "validity": valid}


def test_a_tournament_stands_on_the_page_of_the_machine_it_was_held_on(folder):
    write_result(folder / "tournaments/t.json", contest(by_hand=False))
    story = Story.load(folder)
    text, sources = render.render(story, headline=True)
    assert "|  | other | ours |\n" in text
    assert "| short, 1 at once, tokens/s | 5.5 | 11.0, **2.00x** [1.90, 2.10] |" in text
    assert "| short, 8 at once, tokens/s | 1,234 | 2,000* |" in text
    assert "| short, 1 at once, TTFT p50, ms | 7.0 | 7.0 |" in text
    assert "\\* INVALID, ours, short at 8: too hot." in text
    assert "Ratios over other, in turn. other: GPU memory shared" in text
    cited = json.loads(sources)["Other engines on the same machine"]
    assert cited["box/tournaments/t.json:levels.1.summary.output_tokens_per_s.p50"] == "1,234"
    readme = render.readme_block([story])
    assert "| short, 8 at once, tokens/s | 1,234 | 2,000* |" in readme
    assert "short, 1 at once" not in readme


def test_figures_entered_by_hand_stand_beside_this_engine_and_not_in_the_readme(folder, edit_json):
    write_result(folder / "tournaments/hand.json", contest(by_hand=True))
    text, _ = render.render(Story.load(folder), headline=True)
    assert "|  | other | ours | **this engine**, INT8 weight-only |" in text
    assert "| short, 1 at once, tokens/s | 5.5 | 11.0, **2.00x** [1.90, 2.10] | 16.0 |" in text
    assert "\nAnother run.\n" in text
    assert "Another run" not in render.readme_block([Story.load(folder)])
    edit_json(folder / "optimized-native.json", {"validity": {"status": "INVALID", "reasons": ["too hot"]}})
    text, _ = render.render(Story.load(folder), headline=True)
    assert "| 16.0* |" in text
    assert "\n\\* INVALID in this engine's run: too hot.\n" in text


def test_what_was_measured_takes_the_place_of_figures_entered_by_hand(folder):
    write_result(folder / "tournaments/by-hand.json", contest(by_hand=True))
    write_result(folder / "tournaments/main.json", contest(by_hand=False))
    text, sources = render.render(Story.load(folder), headline=True)
    assert "Another run." not in text
    assert "by-hand.json" not in sources
    assert text.count("| short, 8 at once, tokens/s | 1,234 |") == 1


def test_the_readme_shows_tournaments_of_every_machine(folder, tmp_path):
    other = tmp_path / "big"
    shutil.copytree(folder, other)
    write_result(other / "tournaments/main.json", contest(by_hand=False))
    readme = render.readme_block([Story.load(folder), Story.load(other)])
    assert (
        "Other engines on big, output tokens/s of each workload at its highest load:\n\n|  | other | ours |" in readme
    )
    assert readme.count("Other engines on") == 1


def test_the_readme_sends_to_the_page_for_what_made_a_load_invalid(folder):
    result = contest(by_hand=False)
    result["levels"][0]["validity"] = {"status": "INVALID", "reasons": ["a reason"], "cautions": []}
    write_result(folder / "tournaments/main.json", result)
    readme, text = render.readme_block([Story.load(folder)]), page(folder)
    assert "INVALID, for reasons that stand on the machine's page." in readme
    assert "a reason" in text
    assert "a reason" not in readme


@pytest.mark.parametrize("name", ["ours", "other"])
def test_a_contestant_that_failed_the_gate_has_no_ratio(folder, edit_json, name):
    engine = json.loads((folder / "optimized-native.json").read_text())["engine"]
    result = contest(by_hand=False)
    next(x for x in result["contestants"] if x["name"] == name)["about"] = engine
    write_result(folder / "tournaments/main.json", result)
    assert "11.0, **2.00x** [1.90, 2.10]" in page(folder)
    gate = json.loads((folder / "accuracy-native.json").read_text())["gate"]
    edit_json(folder / "accuracy-native.json", {"gate": gate | {"status": "FAILED", "reasons": ["far off"]}})
    text = page(folder)
    assert f"{name} †" in text
    assert "| short, 1 at once, tokens/s | 5.5 | 11.0 |" in text
    assert "† fails the accuracy gate" in text
    edit_json(folder / "optimized-native.json", {"engine": engine | {"weights_sha256": "of another"}})
    assert "†" not in page(folder)


def test_what_company_changes_stands_beside_tokens_per_second(folder):
    text = page(folder)
    assert "\n| 8 at once | auto | 1.6% [0.3%, 8.3%] | 64 | 99 |\n" in text
    assert "\n| kernels auto over streaming, 1 at once | 1.100x [1.100, 1.100] faster |\n" in text
    (folder / "determinism-native.json").unlink()
    assert "company" not in page(folder)
