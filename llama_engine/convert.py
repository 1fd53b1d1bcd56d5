"""Hugging Face model to TensorRT-LLM unified checkpoint, in bounded memory and on all cores.

Rows stream from the shards through quantization and packing into their final place: a worker holds one range of rows.
"""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from llama_engine import checkpoint
from llama_engine.checkpoint import DTYPES, Target, scale_name
from llama_engine.errors import InputError
from llama_engine.files import (
    TensorFileWriter,
    atomic_dir,
    byte_progress,
    copy_tokenizer,
    parallel,
    row_chunks,
    write_json,
)
from llama_engine.hf import HFModel, model_identity
from llama_engine.quantization import Layout, check_packable, layout_for, pack, quantize


@dataclass(frozen=True)
class ConvertOptions:
    """What the checkpoint shall hold. ``int8`` without ``quantize_at_build`` packs for ``target_arch``."""

    dtype: str = "float16"
    int8: bool = False
    target_arch: str = "sm80"
    trtllm_version: str = "0.15.0"
    quantize_at_build: bool = False
    tp_size: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"--dtype {self.dtype!r} is not supported: {' or '.join(DTYPES)}")
        if self.quantize_at_build and not self.int8:
            raise InputError("--quantize_at_build needs --use_weight_only --weight_only_precision int8")
        layout_for(self.target_arch, self.trtllm_version)

    @property
    def layout(self) -> Layout | None:
        packed = self.int8 and not self.quantize_at_build
        return layout_for(self.target_arch, self.trtllm_version) if packed else None


@dataclass(frozen=True)
class _Job:
    rank: int
    target: Target
    start: int  # first row in the target
    source: str
    rows: tuple[int, int]
    columns: tuple[int, int] | None


def convert(
    model_dir: Path, output_dir: Path, options: ConvertOptions, *, force: bool = False, progress: bool = True
) -> None:
    """Write the checkpoint. Raises :class:`InputError` for bad input; a failed or killed run leaves no output."""
    model = HFModel(model_dir)
    config, dtype, layout = model.config, DTYPES[options.dtype], options.layout
    checkpoint.check_tp(config, options.tp_size)
    ranks = [list(checkpoint.targets(config, rank, options.tp_size)) for rank in range(options.tp_size)]
    specs = [_specs(targets, dtype, layout) for targets in ranks]
    jobs = [job for rank, targets in enumerate(ranks) for job in _jobs(rank, targets)]

    with atomic_dir(output_dir, force=force) as out:
        record = {
            "layout": layout.name if layout else None,
            "target_arch": options.target_arch if layout else None,
            "trtllm_version": options.trtllm_version,
            "source_sha256": model_identity(model_dir)["sha256"],
            "model": config.to_dict(),
        }
        metadata = {"llama_engine": json.dumps(record)}
        with ExitStack() as stack:
            writers = [
                stack.enter_context(TensorFileWriter(out / f"rank{rank}.safetensors", spec, metadata))
                for rank, spec in enumerate(specs)
            ]
            total = sum(_job_elements(job) for job in jobs)
            advance = stack.enter_context(byte_progress("converting", 2 * total, progress))

            def run(job: _Job) -> None:
                _write(job, model, writers[job.rank], dtype, layout)
                advance(2 * _job_elements(job))

            parallel(run, jobs)
        quant_algo = "W8A16" if options.int8 else None
        settings = checkpoint.config_json(config, dtype=options.dtype, quant_algo=quant_algo, tp=options.tp_size)
        write_json(out / "config.json", settings)
        copy_tokenizer(model.dir, out)


def _specs(
    targets: list[Target], dtype: torch.dtype, layout: Layout | None
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for target in targets:
        if target.linear and layout:
            n, k = target.shape
            check_packable(n, k, layout, target.name)
            specs[target.name] = (torch.int8, (k, n))
            specs[scale_name(target.name)] = (dtype, (n,))
        else:
            specs[target.name] = (dtype, target.shape)
    return specs


def _jobs(rank: int, targets: list[Target]) -> list[_Job]:
    jobs = []
    for target in targets:
        width = target.shape[1] if len(target.shape) > 1 else 1
        for piece in target.pieces:
            first, last = piece.rows
            for start, stop in row_chunks(last - first, width):
                rows = (first + start, first + stop)
                jobs.append(_Job(rank, target, piece.start + start, piece.source, rows, piece.columns))
    return jobs


def _job_elements(job: _Job) -> int:
    return (job.rows[1] - job.rows[0]) * math.prod(job.target.shape[1:])


def _write(job: _Job, model: HFModel, writer: TensorFileWriter, dtype: torch.dtype, layout: Layout | None) -> None:
    data = model.read(job.source, job.rows, dtype, job.columns)
    if not (job.target.linear and layout):
        writer.write(job.target.name, job.start, data)
        return
    q, scale = quantize(data)
    # The file reports (k, n) but its bytes are n-major, so a position in it counts bytes.
    writer.write_bytes(job.target.name, job.start * job.target.shape[1], pack(q, layout))
    writer.write(scale_name(job.target.name), job.start, scale.to(dtype))
