"""Write oracle.json: digests of what the converter makes of 68 small matrices.

The code that makes them gave, byte for byte, what NVIDIA's own gives: 48 cases (dtype x GPU x shape, quantized and
packed) against the compiled preprocessor of TensorRT-LLM 0.15's last development snapshot, 20 (GPU x shape, packed)
against the Python one of 1.x. Written again only for a change that was compared with NVIDIA's code anew.

    python -m tests.golden.make_oracle
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from llama_engine.checkpoint.packing import TARGET_ARCHES, layout_for, pack, quantize

FILE = Path(__file__).with_name("oracle.json")
SHAPES = ((64, 32), (64, 64), (128, 96), (192, 160), (256, 64), (576, 192))  # in x out


def weight(k: int, n: int) -> torch.Tensor:
    """float32 ``[n, k]`` by formula, exact in float16 and bfloat16; a channel of zeros, one of halves of its scale."""
    i, j = torch.arange(n)[:, None], torch.arange(k)[None]
    values = (131 * j + 71 * i + (i * j) % 251 + 7 * (i // 2) * (j // 16)) % 255 - 127.0
    values[3] = 0
    values[5] = torch.where(j[0] == 0, 128.0, (j[0] % 127) + 0.5) / 64
    return values / 256


def digest(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(tensor.view(torch.int8).numpy().tobytes() for tensor in tensors)).hexdigest()[:32]


def cases() -> Iterator[tuple[str, str]]:
    """Name and digest of each."""
    for dtype in (torch.float16, torch.bfloat16):
        for arch in TARGET_ARCHES:
            for k, n in SHAPES:
                q, scale = quantize(weight(k, n).to(dtype))
                packed = pack(q, layout_for(arch, "0.15.0"))
                yield f"0.15.0 {arch} {str(dtype)[6:]} {k}x{n}", digest(packed, scale.to(dtype))
    for arch in TARGET_ARCHES:
        for k, n in SHAPES[1:]:
            q = (256 * weight(k, n)).clamp(-128, 127).to(torch.int8)
            yield f"1.2.1 {arch} int8 {k}x{n}", digest(pack(q, layout_for(arch, "1.2.1")))


if __name__ == "__main__":
    FILE.write_text(json.dumps(dict(cases()), indent=1) + "\n", encoding="utf-8")
