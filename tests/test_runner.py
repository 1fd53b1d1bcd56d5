import pytest
import torch

from llama_engine.errors import InputError
from llama_engine.runner import ModelRunner

NEVER = -1


@pytest.fixture(scope="module")
def runner(tiny_engine):
    return ModelRunner.from_dir(tiny_engine, device="cpu")


def test_output_holds_prompt_and_tokens_padded_with_end_id(runner):
    prompts = [torch.tensor([3, 4, 5], dtype=torch.int32), torch.tensor([7], dtype=torch.int32)]
    out = runner.generate(prompts, max_new_tokens=6, end_id=NEVER, pad_id=0)
    assert (out.dtype, tuple(out.shape)) == (torch.int32, (2, 1, 9))
    assert out[0, 0, :3].tolist() == [3, 4, 5]
    assert out[1, 0, 7:].tolist() == [NEVER, NEVER]
    assert (out[1, 0, :7] >= 0).all()


def test_default_is_one_new_token(runner):
    out = runner.generate([torch.tensor([1, 2])], end_id=NEVER, pad_id=0)
    assert out.shape == (1, 1, 3)


def test_any_stop_word_of_a_prompt_ends_its_answer(runner):
    prompts = [torch.tensor([1, 2]), torch.tensor([3])]
    free = runner.generate(prompts, max_new_tokens=10, end_id=NEVER, pad_id=0)
    a, b = free[0, 0, 2:].tolist(), free[1, 0, 1:].tolist()
    unseen = next(token for token in range(512) if token not in a + b)
    out = runner.generate(
        prompts,
        max_new_tokens=10,
        end_id=unseen,
        pad_id=0,
        stop_words_list=[[[unseen], [a[3]]], [[b[1]]]],
        return_dict=True,
        output_sequence_lengths=True,
    )
    assert out["sequence_lengths"].tolist() == [[2 + a.index(a[3]) + 1], [1 + b.index(b[1]) + 1]]


def test_end_id_stops_and_lengths_tell(runner):
    free = runner.generate([torch.tensor([1, 2])], max_new_tokens=10, end_id=NEVER, pad_id=0)[0, 0, 2:].tolist()
    result = runner.generate(
        [torch.tensor([1, 2])],
        max_new_tokens=10,
        end_id=free[3],
        pad_id=0,
        return_dict=True,
        output_sequence_lengths=True,
    )
    stop = free.index(free[3])
    assert result["sequence_lengths"].tolist() == [[2 + stop + 1]]
    assert result["output_ids"][0, 0, 2 : 2 + stop + 1].tolist() == free[: stop + 1]
    assert (result["output_ids"][0, 0, 2 + stop + 1 :] == free[3]).all()


def test_streaming_grows_to_the_same_answer(runner):
    prompts = [torch.tensor([9, 8, 7]), torch.tensor([1])]
    steps = list(runner.generate(prompts, max_new_tokens=5, end_id=NEVER, pad_id=0, streaming=True))
    counts = [int((step != NEVER).sum()) for step in steps]
    assert counts == sorted(counts)
    assert len(steps) >= 5
    whole = runner.generate(prompts, max_new_tokens=5, end_id=NEVER, pad_id=0)
    assert torch.equal(steps[-1], whole)


def test_leaving_the_stream_early_frees_the_blocks(runner):
    stream = runner.generate([torch.tensor([1, 2, 3])], max_new_tokens=50, end_id=NEVER, pad_id=0, streaming=True)
    next(stream)
    stream.close()
    runner.backend.engine.step()
    assert runner.backend.engine.scheduler.blocks.used == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"end_id": None, "pad_id": 0}, "end_id must be an int"),
        ({"end_id": 1, "pad_id": 2.0}, "pad_id must be an int"),
        ({"end_id": 1, "pad_id": 0, "stop_words_list": [[[1, 2]]]}, "words of one token only"),
        ({"end_id": 1, "pad_id": 0, "stop_words_list": [[], []]}, "words for 2 prompts"),
        ({"end_id": 1, "pad_id": 0, "max_new_tokens": 0}, "max_new_tokens"),
        ({"end_id": 1, "pad_id": 0, "top_p": 2.0}, "top_p"),
    ],
)
def test_bad_arguments_are_named(runner, arguments, message):
    with pytest.raises(InputError, match=message):
        runner.generate([torch.tensor([1])], **arguments)


def test_prompts_must_be_integer_vectors(runner):
    for bad in (torch.ones(2, 2, dtype=torch.int32), torch.ones(3)):
        with pytest.raises(InputError, match="1-D integer"):
            runner.generate([bad], end_id=NEVER, pad_id=0)
    with pytest.raises(InputError, match="empty"):
        runner.generate([], end_id=NEVER, pad_id=0)


def test_each_prompt_is_checked_once_and_before_the_first_step(runner, monkeypatch):
    checked, validate = [], runner.backend.engine.validate
    monkeypatch.setattr(runner.backend.engine, "validate", lambda *args: checked.append(args) or validate(*args))
    options = {"end_id": NEVER, "pad_id": 0, "streaming": True}
    results = runner.generate([torch.tensor([1, 2]), torch.tensor([3])], max_new_tokens=2, **options)
    assert checked == [([1, 2], 2), ([3], 2)]
    assert len(list(results)) >= 2
    assert len(checked) == 2
    with pytest.raises(InputError, match="outside the vocabulary"):
        runner.generate([torch.tensor([1]), torch.tensor([10**6])], **options)
    assert not runner.backend.engine.has_unfinished


@pytest.mark.parametrize("kernels", ["tiled", "triton"])
def test_kernels_that_the_device_does_not_have_are_refused(tiny_engine, kernels):
    with pytest.raises(InputError, match=f"must be one of auto, torch on cpu, got '{kernels}'"):
        ModelRunner.from_dir(tiny_engine, device="cpu", kernels=kernels)
