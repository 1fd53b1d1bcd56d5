"""Hyphens and underscores in flags are the same; values are left alone."""

import pytest

from llama_engine.flags import Parser


@pytest.fixture
def parser():
    parser = Parser("what it does")
    parser.add_argument("--max_batch_size", type=int)
    parser.add_argument("--engine-dir")
    parser.add_argument("--lm_head-file")
    parser.add_argument("--no-cache", action="store_true")
    parser.add_argument("names", nargs="*")
    parser.add_argument_group("more").add_argument("--gemm_plugin")
    return parser


@pytest.mark.parametrize("swap", [("_", "-"), ("-", "_"), ("", "")])
@pytest.mark.parametrize("equals", [False, True])
def test_both_spellings_name_a_flag(parser, swap, equals):
    values = {"max_batch_size": "4", "engine-dir": "a_b-c", "lm_head-file": "x", "gemm_plugin": "auto"}
    words = [("--" + name.replace(*swap), value) for name, value in values.items()]
    args = parser.parse_args(
        ["=".join(pair) for pair in words] if equals else [word for pair in words for word in pair]
    )
    assert (args.max_batch_size, args.engine_dir, args.lm_head_file, args.gemm_plugin) == (4, "a_b-c", "x", "auto")
    assert parser.parse_args(["--" + "no-cache".replace(*swap)]).no_cache


def test_positional_words_stay_as_they_are(parser):
    assert parser.parse_args(["a_b", "--", "--engine_dir"]).names == ["a_b", "--engine_dir"]


def test_an_unknown_flag_is_refused_as_it_was_written(parser, capsys):
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(["--min_batch-size", "3"])
    assert stopped.value.code == 2
    assert "--min_batch-size" in capsys.readouterr().err


SCRIPTS = {
    "scripts/convert_checkpoint.sh": ("--model_dir", "--output_dir"),
    "scripts/build_engine.sh": ("--checkpoint_dir", "--output_dir"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_scripts_flags_may_have_hyphens(run_script, tmp_path, script):
    source, output = (flag.replace("_", "-") for flag in SCRIPTS[script])
    done = run_script(script, source, tmp_path / "nowhere", output, tmp_path / "out")
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    assert "required" not in done.stderr


@pytest.mark.parametrize("flag", ["--engine-dir", "--engine_dir"])
def test_shell_flags_have_both_spellings_too(run_script, tmp_path, flag):
    output = ("--output", tmp_path / "profile.json")  # a run may have left one in the usual place
    done = run_script(
        "scripts/profile_nsight.sh", flag, tmp_path / "nowhere", "--model_dir", tmp_path / "none", *output
    )
    assert done.returncode == 2
    assert "none does not exist" in done.stderr
