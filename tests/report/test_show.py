"""The table on the terminal."""

from llama_engine.report.show import show


def test_the_gate_says_how_much_it_scored_and_old_levels_need_no_verdict(capsys):
    common = {"backend": "native", "model": {"name": "m", "source": "pretrained"}, "validity": {"reasons": []}}
    level = {"concurrency": 2, "summary": {}, "checks": {"failed_requests": 0}}
    triton = common | {"benchmark": "triton", "samples": {}, "summary": {}, "levels": [level]}
    triton["workload"] = {"streaming": False}
    accuracy = common | {"benchmark": "accuracy", "summary": {"tokens": 2555}}
    show([triton, accuracy | {"gate": {"status": "PASSED", "quick": True}}])
    out = capsys.readouterr().out
    assert "triton, 2 whole" in out
    assert "accuracy (native): gate PASSED, 2,555 tokens scored (--quick)\n" in out
    show([triton, accuracy | {"gate": {"status": "FAILED", "quick": False}}])
    assert "gate FAILED, 2,555 tokens scored\n" in capsys.readouterr().out
