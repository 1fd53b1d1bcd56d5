"""Write layouts.json: SHA-256 of packed matrices, made from the written formulas alone.

Nothing of llama_engine is imported; every byte is placed by the formula for its position (docs/TENSORRT_LLM.md).

    python tests/golden/make_layouts.py
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

P = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
SHAPES = [(64, 32), (64, 96), (128, 64), (192, 160), (576, 192)]


def weight(k: int, n: int) -> int:
    """The int8 at in-row k, column n."""
    return (131 * k + 71 * n + (k * n) % 251 + 7 * (k // 16) * (n // 2)) % 256 - 128


def permuted(k: int, n: int) -> int:
    """Row k after the rows of every 16 were reordered."""
    return weight(16 * (k // 16) + P[k % 16], n)


def biased_and_swapped(data: list[int]) -> list[int]:
    data = [value + 128 for value in data]
    for i in range(0, len(data), 4):
        data[i + 1], data[i + 2] = data[i + 2], data[i + 1]
    return data


def column_major(rows: int, columns: int) -> list[int]:
    return [weight(k, n) for n in range(columns) for k in range(rows)]


def column_major_permuted(rows: int, columns: int) -> list[int]:
    return [permuted(k, n) for n in range(columns) for k in range(rows)]


def column_major_permuted_biased(rows: int, columns: int) -> list[int]:
    return biased_and_swapped(column_major_permuted(rows, columns))


def column_major_interleaved(rows: int, columns: int) -> list[int]:
    data = [0] * (rows * columns)
    for n in range(columns):
        for k in range(rows):
            data[(n // 2) * 2 * rows + (k // 64) * 128 + (n % 2) * 64 + k % 64] = permuted(k, n)
    return biased_and_swapped(data)


if __name__ == "__main__":
    golden = {
        layout.__name__: {
            f"{rows}x{columns}": hashlib.sha256(bytes(v % 256 for v in layout(rows, columns))).hexdigest()
            for rows, columns in SHAPES
        }
        for layout in (
            column_major,
            column_major_permuted,
            column_major_permuted_biased,
            column_major_interleaved,
        )
    }
    Path(__file__).with_name("layouts.json").write_text(json.dumps(golden, indent=2) + "\n")
