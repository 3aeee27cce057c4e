# SPDX-License-Identifier: MIT
"""What the tests of this folder share: where a CUDA toolkit is, and refresh-api as a module."""

import importlib.machinery
import importlib.util
import os
import re
import sys
from pathlib import Path

sys.dont_write_bytecode = True
ROOT = Path(__file__).resolve().parent.parent.parent
SKIPPED = 77


def load_refresh():
    loader = importlib.machinery.SourceFileLoader("refresh_api", str(ROOT / "scripts/refresh-api"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("refresh_api", loader))
    loader.exec_module(module)
    return module


refresh = load_refresh()
api = refresh.api


def headers():
    """Every cuda.h to compare with: those of $BENNU_CUDA_H (split at `:`), else the installed toolkit's."""
    named = os.environ.get("BENNU_CUDA_H")
    if named:
        found = [Path(p) for p in named.split(":")]
        for path in found:
            if not path.is_file():
                sys.exit(f"BENNU_CUDA_H: {path} does not exist")
        return found
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and (Path(home) / "include/cuda.h").is_file():
            return [Path(home) / "include/cuda.h"]
    print("no CUDA toolkit here (set CUDA_HOME or BENNU_CUDA_H to compare with one): skipped")
    sys.exit(SKIPPED)


def version(header):
    return refresh.version_of(header)


def write_stubs(folder):
    """Stand-ins for the graphics libraries' headers that the side headers include."""
    for name, text in refresh.STUBS.items():
        path = Path(folder) / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#pragma once\n{text}\n", encoding="utf-8")


def side_includes(header):
    """#include lines for a cuda.h and the headers next to it that the table covers."""
    lines = ["#include <vdpau/vdpau.h>", "#include <cuda.h>"]
    lines += [f"#include <{n}>" for n in refresh.SIDE_HEADERS if (header.parent / n).exists()]
    return "\n".join(lines) + "\n"


def without_comments(text):
    return re.sub(r"//[^\n]*", " ", re.sub(r"/\*.*?\*/", " ", text, flags=re.S))
