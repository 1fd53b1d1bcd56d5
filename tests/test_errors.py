import pytest

from llama_engine.errors import InputError, RunError, run_cli


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("bad flag"), 2),
        (RunError("server died"), 1),
        (OSError(28, "No space left on device"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_user_caused_errors_are_one_line_and_an_exit_code(error, code, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        run_cli(main)
    assert stop.value.code == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")


def test_success_and_own_exit_codes_pass_through():
    for result, code in ((None, 0), (3, 3)):
        with pytest.raises(SystemExit) as stop:
            run_cli(lambda result=result: result)
        assert stop.value.code == code


def test_a_bug_keeps_its_traceback():
    def main():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_cli(main)
