#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The built agent exports every function of the table, every symbol of the toolkit's stub driver where there is one,
and nothing else. Skips (77) where the agent is not built.

usage: test_exports.py LIBBENNU_SO"""

import os
import subprocess
import sys
from pathlib import Path

from toolkit import ROOT, SKIPPED, api, version


def exported(library):
    done = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True)
    return {w[2].split("@")[0] for w in map(str.split, done.stdout.splitlines()) if len(w) == 3}


def stub():
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        path = Path(home or "/nonexistent") / "lib64/stubs/libcuda.so"
        if path.is_file():
            return path
    return None


def main():
    agent = Path(sys.argv[1])
    if not agent.is_file():
        print(f"{agent} is not built: skipped")
        return SKIPPED
    names = exported(agent)
    table = api.load(ROOT / "src/agent/api/functions.tbl")
    expected = set(table.functions) | {"bn_agent_version"}
    # The sanitizers' runtime adds names of its own.
    more = {n for n in names - expected if not n.startswith(("__asan", "__ubsan", "__tsan", "__sanitizer"))}
    failed = False
    for what, which in (("lacks", expected - names), ("should not export", more)):
        if which:
            print(f"{agent} {what} {', '.join(sorted(which))}")
            failed = True
    library = stub()
    if library:
        theirs = exported(library)
        if len(theirs) < 500:
            print(f"{library}: only {len(theirs)} symbols read")
            failed = True
        if theirs - names:
            print(f"{agent} lacks {', '.join(sorted(theirs - names))} of {library}")
            header = library.parent.parent.parent / "include/cuda.h"
            # What a toolkit newer than the table added is looked up through cuGetProcAddress, untouched.
            failed = failed or not header.is_file() or version(header) <= table.toolkit
        print(f"compared with the {len(theirs)} symbols of {library}")
    print(f"{agent}: {len(names)} names exported")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
