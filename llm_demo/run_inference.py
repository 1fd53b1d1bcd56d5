"""Run inference from Python, with either engine: the directory says whether it is a native or a TensorRT one.

python llm_demo/run_inference.py engines/smollm2-135m-instruct "What is the capital of France? Answer briefly."
"""

import itertools
import sys

import torch

from llama_engine.errors import InputError, run_cli
from llama_engine.runner import ModelRunner
from llama_engine.tokenizer import ChatTokenizer


def main() -> None:
    if len(sys.argv) != 3:
        raise InputError("give an engine directory and a question; see the first lines of this script")
    tokenizer = ChatTokenizer(sys.argv[1])
    runner = ModelRunner.from_dir(sys.argv[1])
    prompt = torch.tensor(tokenizer.encode_chat([{"role": "user", "content": sys.argv[2]}]), dtype=torch.int32)
    stops = tokenizer.eos_token_ids or (-1,)  # -1 never comes
    words = [[[token] for token in stops[1:]]]  # for each prompt, words of one token
    output_ids = runner.generate(
        [prompt], max_new_tokens=128, end_id=stops[0], pad_id=stops[0], stop_words_list=words
    )  # (batch, beams, length)
    answer = itertools.takewhile(lambda token: token not in stops, output_ids[0, 0, len(prompt) :].tolist())
    print(tokenizer.decode([*answer]))


if __name__ == "__main__":
    run_cli(main)
