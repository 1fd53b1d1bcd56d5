"""The command line of every script: a flag may be written with hyphens or underscores.

Flags that NVIDIA's ``convert_checkpoint.py`` and ``trtllm-build`` have too are declared with its underscores, ours with
hyphens.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any


class Parser(argparse.ArgumentParser):
    """A script's parser; ``doc`` is the script's docstring, shown as it is written."""

    def __init__(self, doc: str | None) -> None:
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[Any, list[str]]:
        declared = {_hyphened(option): option for option in self._option_string_actions if option.startswith("--")}
        given = list(sys.argv[1:] if args is None else args)
        end = given.index("--") if "--" in given else len(given)
        for i, word in enumerate(given[:end]):
            name, equals, value = word.partition("=")
            if name.startswith("--"):
                given[i] = declared.get(_hyphened(name), name) + equals + value
        return super().parse_known_args(given, namespace)


def _hyphened(option: str) -> str:
    return option.replace("_", "-")
