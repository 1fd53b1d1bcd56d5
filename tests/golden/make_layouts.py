"""Write layouts.json: SHA-256 of packed matrices, made from the written formulas alone, of 8 and of 4 bits.

Nothing of llama_engine is imported; every byte is placed by the formula for its position (docs/TENSORRT_LLM.md).

    python tests/golden/make_layouts.py
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

P = {
    8: [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15],
    4: [8 * b + 2 * a + c for a in range(4) for b in range(4) for c in range(2)],  # 0 1 8 9 16 17 24 25 2 3 10 ...
}
SHAPES = [(64, 32), (64, 96), (128, 64), (192, 160), (576, 192)]


def weight(k: int, n: int) -> int:
    """The int8 at in-row k, column n."""
    return (131 * k + 71 * n + (k * n) % 251 + 7 * (k // 16) * (n // 2)) % 256 - 128


def value(k: int, n: int, bits: int) -> int:
    """The integer at in-row k, column n: of 4 bits the upper half of the int8."""
    return weight(k, n) >> (8 - bits)


def permuted(k: int, n: int, bits: int) -> int:
    """Row k after the rows of every 16 (of 4 bits: 32) were reordered."""
    p = P[bits]
    return value(len(p) * (k // len(p)) + p[k % len(p)], n, bits)


def biased_and_swapped(data: list[int], bits: int) -> list[int]:
    """Of every four bytes 0 2 1 3, of every eight nibbles 0 2 4 6 1 3 5 7."""
    word, limit = 32 // bits, 1 << (bits - 1)
    out = []
    for i in range(0, len(data), word):
        out += data[i : i + word : 2] + data[i + 1 : i + word : 2]
    return [v + limit for v in out]


def column_major(rows: int, columns: int, bits: int) -> list[int]:
    return [value(k, n, bits) for n in range(columns) for k in range(rows)]


def column_major_permuted(rows: int, columns: int, bits: int) -> list[int]:
    return [permuted(k, n, bits) for n in range(columns) for k in range(rows)]


def column_major_permuted_biased(rows: int, columns: int, bits: int) -> list[int]:
    return biased_and_swapped(column_major_permuted(rows, columns, bits), bits)


def column_major_interleaved(rows: int, columns: int, bits: int) -> list[int]:
    data, c = [0] * (rows * columns), 16 // bits
    for n in range(columns):
        for k in range(rows):
            data[(n // c) * c * rows + (k // 64) * c * 64 + (n % c) * 64 + k % 64] = permuted(k, n, bits)
    return biased_and_swapped(data, bits)


def as_bytes(data: list[int], bits: int) -> bytes:
    """Nibbles in pairs, the first below."""
    if bits == 8:
        return bytes(v % 256 for v in data)
    return bytes(low % 16 + 16 * (high % 16) for low, high in zip(data[::2], data[1::2]))


if __name__ == "__main__":
    golden = {
        f"{layout.__name__}/{bits}": {
            f"{rows}x{columns}": hashlib.sha256(as_bytes(layout(rows, columns, bits), bits)).hexdigest()
            for rows, columns in SHAPES
        }
        for bits in (8, 4)
        for layout in (
            column_major,
            column_major_permuted,
            column_major_permuted_biased,
            column_major_interleaved,
        )
    }
    Path(__file__).with_name("layouts.json").write_text(json.dumps(golden, indent=2) + "\n")
