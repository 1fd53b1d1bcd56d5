"""Which of a test's parameters the default run takes where kernels run in Triton's interpreter, seconds each."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch


def quick(values: Iterable[Any], *kept: Any) -> list[Any]:
    """``values`` for ``pytest.mark.parametrize``: on a GPU all of them, without one those in ``kept``; the others then
    are ``slow``, since they repeat over more shapes what the kept ones show."""
    values = list(values)
    assert all(value in values for value in kept)
    if torch.cuda.is_available():
        return values
    return [value if value in kept else _slow(value) for value in values]


def _slow(value: Any) -> Any:
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
