#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""functions.tbl against a toolkit: every function that cuda.h declares is in it with the same type, as the compiler
sees it. Skips (77) without a toolkit, and where a toolkit that is newer than the table has other functions."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from toolkit import ROOT, SKIPPED, api, headers, refresh, side_includes, version, write_stubs

TABLE = ROOT / "src/agent/api/functions.tbl"
CC = os.environ.get("CC", "cc").split()
# Old versions are declared in the internal view only, plain names of current per-thread functions in the other.
VIEWS = ([], ["__CUDA_API_VERSION_INTERNAL"])


def compiles(folder, text, flags):
    source = Path(folder) / "check.c"
    source.write_text(text, encoding="utf-8")
    command = CC + ["-std=gnu17", "-w", "-fsyntax-only", *flags, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode == 0, done.stderr


def assertion(function):
    args = ", ".join(p.text() for p in function.params) or "void"
    return (
        f"#undef {function.name}\n_Static_assert(__builtin_types_compatible_p(__typeof__({function.name}), "
        f'{function.ret}({args})), "{function.name}");\n'
    )


def declared(header, defines, stubs):
    names = set()
    for name in refresh.SIDE_HEADERS + ("cuda.h",):
        if (header.parent / name).exists():
            text = refresh.preprocess(header.parent / name, defines, stubs, ("vdpau/vdpau.h", "cuda.h"))
            names |= set(refresh.prototypes(text))
    return names - {"cuGetProcAddress_v2_ptsz"}


def check(header, table):
    failed, checked = 0, set()
    with tempfile.TemporaryDirectory() as folder:
        write_stubs(folder)
        flags = [f"-I{header.parent}", f"-I{folder}"]
        top = side_includes(header)
        for defines in VIEWS:
            names = declared(header, defines, folder)
            absent = sorted(names - set(table.functions))
            if absent:
                print(f"{header}: the table lacks {', '.join(absent)}: run scripts/refresh-api {header}")
                failed = 1
            here = sorted(names & set(table.functions))
            checked |= set(here)
            view = flags + [f"-D{d}" for d in defines]
            good, errors = compiles(folder, top + "".join(assertion(table.functions[n]) for n in here), view)
            if not good:
                print(f"{header} {defines}: declares other types:\n{errors[:4000]}")
                failed = 1
        # What stands for a type must have its size.
        words = set(re.findall(r"\w+", refresh.preprocess(header, VIEWS[1], folder, ("vdpau/vdpau.h", "cuda.h"))))
        sizes = [
            f'_Static_assert(sizeof({name}) == sizeof({target}), "{name}");\n'
            for name, target in table.types.items()
            if name in words
        ]
        good, errors = compiles(folder, top + "".join(sizes), flags + [f"-D{d}" for d in VIEWS[1]])
        if not good or len(sizes) < 10:
            print(f"{header}: {len(sizes)} types\n{errors[:4000]}")
            failed = 1
        # The check itself must be able to fail: one wrong parameter, and one function that is not there.
        for line in ("CUresult cuMemAlloc_v2(CUdeviceptr *dptr, unsigned int bytesize)", "CUresult cuNoSuch(int a)"):
            ret, name, params = api.parse_prototype(line)
            good, _ = compiles(folder, top + assertion(api.Function(name, "gate", ret, params)), flags)
            if good:
                print(f"a wrong prototype was not noticed: {line}")
                failed = 1
    print(f"{header}: {len(checked)} functions compared, {'different' if failed else 'all alike'}")
    if len(checked) < 500:
        print("too few: the headers were not read")
        failed = 1
    return failed


def main():
    table = api.load(TABLE)
    newer, failed = False, False
    for header in headers():
        if check(header, table):
            newer = newer or version(header) > table.toolkit
            failed = failed or version(header) <= table.toolkit
    if newer and not failed:
        print(f"a toolkit newer than the table knows ({table.toolkit}): run scripts/refresh-api; skipped")
        return SKIPPED
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
