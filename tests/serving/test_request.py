import numpy as np
import pytest

from llama_engine.errors import InputError
from llama_engine.serving.request import parse


def arrays(**changes):
    base = {"input_ids": np.array([[5, 6, 7, 0]], np.int32), "request_output_len": np.array([4], np.int32)}
    return {k: v for k, v in (base | changes).items() if v is not None}


def one(value, dtype=np.int32):
    return np.array([[value]], dtype)


def test_reads_prompt_and_defaults():
    request = parse(arrays(input_lengths=one(3)))
    assert request.prompt == [5, 6, 7]
    assert request.max_new_tokens == 4
    assert request.params.greedy
    assert request.stop_token_ids == ()
    assert not request.streaming
    assert not request.exclude_input


def test_prompt_without_a_length_is_the_whole_row():
    assert parse(arrays()).prompt == [5, 6, 7, 0]


def test_an_answer_that_goes_on_is_told_from_its_prompt():
    request = parse(arrays(input_lengths=one(3), output_prefix_length=one(2)))
    assert (request.prompt, request.output, request.max_new_tokens) == ([5], [6, 7], 4)
    assert parse(arrays()).output == []


def test_sampling_inputs_ask_for_a_draw():
    request = parse(arrays(runtime_top_k=one(5), runtime_top_p=one(0.5, np.float32), random_seed=one(9, np.uint64)))
    assert not request.params.greedy
    assert (request.params.temperature, request.params.top_k, request.params.seed) == (1.0, 5, 9)
    assert request.params.top_p == pytest.approx(0.5)
    assert parse(arrays(temperature=one(0.0, np.float32))).params.greedy
    assert parse(arrays(runtime_top_p=one(0.0, np.float32))).params.greedy


def test_penalties_and_bad_words():
    words = np.array([[[11, 12, 13, 14, 15, -1], [1, 3, 5, -1, -1, -1]]], np.int32)
    penalties = {"repetition_penalty": 1.5, "presence_penalty": -0.5, "frequency_penalty": 2.0}
    inputs = {name: one(value, np.float32) for name, value in penalties.items()}
    params = parse(arrays(**inputs, bad_words_list=words)).params
    assert params.greedy
    assert {name: getattr(params, name) for name in penalties} == penalties
    assert params.bad_words == ((11,), (12, 13), (14, 15))


def test_log_probabilities():
    asked = {"return_log_probs": one(True, np.bool_)}
    assert parse(arrays()).params.logprobs is None
    assert parse(arrays(**asked)).params.logprobs == 0
    assert parse(arrays(**asked, top_logprobs=one(20))).params.logprobs == 20


def test_end_id_and_one_token_stop_words():
    words = np.array([[[11, 12, -1], [1, 2, -1]]], np.int32)
    assert parse(arrays(end_id=one(2), stop_words_list=words)).stop_token_ids == (2, 11, 12)
    assert parse(arrays(end_id=one(-1))).stop_token_ids == ()


def test_the_fewest_tokens_have_tensorrt_llms_name():
    assert parse(arrays()).min_tokens == 0
    assert parse(arrays(min_length=one(3))).min_tokens == 3


def test_neutral_values_of_missing_features_are_accepted():
    neutral = {
        "beam_width": one(1),
        "repetition_penalty": one(1.0, np.float32),
        "return_log_probs": one(False, np.bool_),
    }
    assert parse(arrays(**neutral, bad_words_list=np.full((1, 2, 1), -1, np.int32))).prompt


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": np.zeros((1, 0), np.int32)}, "empty"),
        ({"input_ids": np.zeros((2, 3), np.int32)}, "batch size 2"),
        ({"input_ids": np.zeros((1, 1, 3), np.int32)}, "shape"),
        ({"input_ids": None}, "empty"),
        ({"input_lengths": one(5)}, "input_lengths is 5"),
        ({"input_lengths": one(0)}, "input_lengths is 0"),
        ({"input_lengths": np.array([[1, 2]], np.int32)}, "one value"),
        ({"output_prefix_length": one(4)}, "output_prefix_length is 4, but there are 4 ids"),
        ({"output_prefix_length": one(-1)}, "output_prefix_length is -1"),
        ({"request_output_len": np.zeros((1, 0), np.int32)}, "one value"),
        ({"beam_width": one(4)}, "beam_width=4"),
        ({"repetition_penalty": one(-1.2, np.float32)}, "repetition_penalty"),
        ({"presence_penalty": one(2.5, np.float32)}, "presence_penalty"),
        ({"frequency_penalty": one(np.nan, np.float32)}, "frequency_penalty"),
        ({"top_logprobs": one(2)}, "top_logprobs=2 needs return_log_probs=true"),
        (
            {"return_log_probs": one(True, np.bool_), "top_logprobs": one(21)},
            r"logprobs must be an integer in \[0, 20\]",
        ),
        ({"temperature": one(np.nan, np.float32)}, "temperature"),
        ({"temperature": one(-1, np.float32)}, "temperature"),
        ({"runtime_top_p": one(1.5, np.float32)}, "top_p"),
        ({"runtime_top_k": one(-3)}, "top_k"),
        ({"stop_words_list": np.array([[[11, 12], [2, -1]]], np.int32)}, "one token only"),
        ({"stop_words_list": np.zeros((1, 3, 2), np.int32)}, "shape"),
        ({"bad_words_list": np.array([[[11, 12], [2, 1]]], np.int32)}, r"bad_words_list ends words at \[2, 1\]"),
        ({"bad_words_list": np.array([[[11, 12], [1, 3]]], np.int32)}, "not pass its 2 ids"),
        ({"bad_words_list": np.array([[[11, -1], [2, -1]]], np.int32)[..., :1]}, "not pass its 1 ids"),
        ({"bad_words_list": np.zeros((1, 3, 2), np.int32)}, "bad_words_list must have shape"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(InputError, match=message):
        parse(arrays(**changes))
