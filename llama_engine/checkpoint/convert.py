"""Hugging Face model to TensorRT-LLM unified checkpoint, in bounded memory and on all cores.

Rows stream from the shards through quantization and packing into their final place: a worker holds one range of rows.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from llama_engine.checkpoint.awq import Scaling, search
from llama_engine.checkpoint.calibration import TEXT, text_ids
from llama_engine.checkpoint.hf import HFModel, model_identity
from llama_engine.checkpoint.packing import Layout, layout_for, pack, quantize, quantize_fp8, quantize_int4
from llama_engine.checkpoint.reader import own_names
from llama_engine.checkpoint.unified import (
    DTYPES,
    FP8_CLAMP,
    Piece,
    Target,
    check_tp,
    config_json,
    packed_bits,
    plain_matrices,
    scale_name,
    targets,
    tensor_specs,
)
from llama_engine.errors import InputError
from llama_engine.files import atomic_dir, copy_tokenizer, write_json
from llama_engine.model.schemes import FP8, FP8_ALL, FP8_ROWWISE, INT4_CHANNEL, INT4_GROUPS, default_group, pack_int4
from llama_engine.tensor_files import TensorFileWriter, parallel, row_chunks

FP8_RECIPES = {"nvidia": FP8_ROWWISE, "all": FP8_ALL}
INT4_FORMS = {"channel": INT4_CHANNEL, "group": INT4_GROUPS}
Job = tuple[TensorFileWriter, Target, Piece, tuple[int, int]]  # some of a piece's rows, to write into a rank's file


@dataclass(frozen=True)
class ConvertOptions:
    """What the checkpoint shall hold. ``int8`` without ``quantize_at_build`` packs for ``target_arch``.

    ``fp8``: the name in :data:`FP8_RECIPES` of a choice of matrices to hold in e4m3. ``int4``: the name in
    :data:`INT4_FORMS`: "channel" packs as ``int8`` does, "group" has scales of ``group_size`` inputs (default: the
    largest that fits) and is scaled for the activations of ``calibration``, a text (default: a few lines of many kinds;
    "" rounds as it is). ``kv_cache``: in what an engine is to hold keys and values, fp16 or fp8 (e4m3).
    """

    dtype: str = "float16"
    int8: bool = False
    target_arch: str = "sm80"
    trtllm_version: str = "0.15.0"
    quantize_at_build: bool = False
    tp_size: int = 1
    fp8: str | None = None
    int4: str | None = None
    group_size: int | None = None
    calibration: str = TEXT
    kv_cache: str = "fp16"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"--dtype {self.dtype!r} is not supported: {' or '.join(DTYPES)}")
        if self.quantize_at_build and not self.int8:
            raise InputError("--quantize_at_build needs --use_weight_only --weight_only_precision int8")
        if self.fp8 and (self.int8 or self.int4):
            raise InputError("--use_fp8_rowwise and --use_weight_only are two quantizations: give one")
        if self.int4 == "group" and self.tp_size > 1:
            raise InputError("--group_size is a form of the native engine, which splits no INT4: give --tp_size 1")
        if self.fp8 not in (None, *FP8_RECIPES):
            raise InputError(f"--fp8_recipe {self.fp8!r} is not supported: {' or '.join(FP8_RECIPES)}")
        layout_for(self.target_arch, self.trtllm_version)

    @property
    def quant_algo(self) -> str | None:
        """The name in the checkpoint's config.json."""
        if self.int4:
            return INT4_FORMS[self.int4]
        return FP8_RECIPES[self.fp8] if self.fp8 else "W8A16" if self.int8 else None

    @property
    def layout(self) -> Layout | None:
        """The byte order of INT8 weights and of INT4 ones with a scale a row; None where the order is plain."""
        packed = (self.int8 and not self.quantize_at_build) or self.int4 == "channel"
        return layout_for(self.target_arch, self.trtllm_version) if packed else None


def convert(model_dir: Path, output_dir: Path, options: ConvertOptions, *, force: bool = False) -> None:
    """Write the checkpoint. Raises :class:`InputError` for bad input; a failed or killed run leaves no output.

    ``force`` replaces an earlier checkpoint at ``output_dir``, never anything else.
    """
    model = HFModel(model_dir)
    config, dtype, layout = model.config, DTYPES[options.dtype], options.layout
    check_tp(config, options.tp_size)
    ranks = [list(targets(config, rank, options.tp_size)) for rank in range(options.tp_size)]
    plain, bits = plain_matrices(config, options.quant_algo), packed_bits(options.quant_algo)
    if options.fp8 and not plain:
        raise InputError(
            f"--fp8_recipe nvidia leaves the first and the last layer in 16 bits, and {model_dir} has no other: "
            "give --fp8_recipe all"
        )
    group, scaling = 128, Scaling()
    if options.int4 == "group":
        widths = {target.shape[1] for rank in ranks for target in rank if target.linear}
        group = default_group(widths, options.group_size)
        if options.calibration and (ids := text_ids(model_dir, config, options.calibration)) is not None:
            scaling = search(model, ids, group)
    specs = [tensor_specs(rank, dtype, layout, plain, group, bits, options.kv_cache) for rank in ranks]
    with atomic_dir(output_dir, own_names, inputs=[model_dir], force=force) as out:
        record = {
            "layout": layout.name if layout else None,
            "target_arch": options.target_arch if layout else None,
            "trtllm_version": options.trtllm_version,
            "quant_algo": options.quant_algo,
            "group_size": group,
            "kv_cache": options.kv_cache,
            "source_sha256": model_identity(model_dir)["sha256"],
            "model": config.to_dict(),
        }
        jobs: list[Job] = []
        for rank, spec in enumerate(specs):
            metadata = {"llama_engine": json.dumps(record)}
            writer = TensorFileWriter(out / f"rank{rank}.safetensors", spec, metadata)
            for name in spec:
                if name.endswith("kv_cache_scaling_factor"):  # e4m3 holds keys and values as they are
                    writer.write(name, 0, torch.ones(1))
            for target in ranks[rank]:
                for piece in target.pieces:
                    chunks = row_chunks(piece.rows[1] - piece.rows[0], math.prod(target.shape[1:]))
                    jobs += [(writer, target, piece, rows) for rows in chunks]

        def write(job: Job) -> int:
            writer, target, piece, (start, stop) = job
            first = piece.rows[0]
            data = model.read(piece.source, (first + start, first + stop), dtype, piece.columns)
            if target.name in plain:
                if plain[target.name] is FP8:
                    values, scale = quantize_fp8(data, FP8_CLAMP)
                else:
                    data = scaling.apply(piece.source, data, first + start)
                    values, scale = quantize_int4(data, group, scaling.importance.get(piece.source))
                    values = pack_int4(values, group)
                writer.write(target.name, piece.start + start, values)
                writer.write(scale_name(target.name), piece.start + start, scale)
            elif target.linear and layout:
                q, scale = quantize(data, bits)
                # The file reports (in, out), but its bytes are out-major: rows of the matrix as it is here.
                writer.write(target.name, piece.start + start, pack(q, layout, bits).view(len(q), -1))
                writer.write(scale_name(target.name), piece.start + start, scale.to(dtype))
            else:
                writer.write(
                    target.name, piece.start + start, scaling.apply(piece.source, data, first + start).to(dtype)
                )
            return math.prod(data.shape) * dtype.itemsize

        total = sum(math.prod(target.shape) * dtype.itemsize for rank in ranks for target in rank)
        parallel(write, jobs, "converting", total)
        settings = {"dtype": options.dtype, "quant_algo": options.quant_algo, "version": options.trtllm_version}
        write_json(
            out / "config.json",
            config_json(config, tp=options.tp_size, kv_cache=options.kv_cache, group=group, **settings),
        )
        copy_tokenizer(model.dir, out)
