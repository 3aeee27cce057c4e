#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""gpu/cuda_types.h against a toolkit: every constant, size, alignment and offset. Skips (77) without a toolkit.

Our header and cuda.h cannot be included together, so the same questions are compiled twice, once with each, and the
two programs' answers compared.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from toolkit import ROOT, headers, refresh, side_includes, version, without_comments, write_stubs

OURS = ROOT / "src/gpu/cuda_types.h"
CC = os.environ.get("CC", "cc").split()
# Names that are newer than CUDA 13.0, which has all others, and structures whose members are.
SINCE = {
    "CU_PROCESS_STATE_CHECKPOINTING": 13040,
    "CU_PROCESS_STATE_RESTORING": 13040,
    "CUcheckpointCustomStorageInfo": 13040,
    "CUcheckpointCustomStoragePerDeviceData": 13040,
    "CUcheckpointOperationHandle": 13040,
    "CUlogicalEndpointId": 13030,
}
MEMBERS_SINCE = {"CUcheckpointCheckpointArgs": 13040, "CUcheckpointRestoreArgs": 13040}


def members(body):
    """[(path, ...)] of the members in the body of a structure, nested ones as `a.b`."""
    found, position = [], 0
    while position < len(body):
        nested = re.compile(r"\s*(?:struct|union)\s*\{").match(body, position)
        if nested:
            depth, end = 1, nested.end()
            while depth:
                depth += {"{": 1, "}": -1}.get(body[end], 0)
                end += 1
            name = re.compile(r"\s*(\w+)\s*;").match(body, end)
            found.append(name.group(1))
            found += [f"{name.group(1)}.{m}" for m in members(body[nested.end() : end - 1])]
            position = name.end()
            continue
        plain = re.compile(r"\s*[^;{}]*?(\w+)\s*(?:\[[^;]*\])?\s*;").match(body, position)
        if not plain:
            break
        found.append(plain.group(1))
        position = plain.end()
    return found


def structures(text):
    """{type name: [member path]} of every structure that the header defines."""
    found = {}
    for match in re.finditer(r"typedef struct \w+ \{", text):
        depth, end = 1, match.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        name = re.compile(r"\s*(\w+)\s*;").match(text, end).group(1)
        found[name] = members(text[match.end() : end - 1])
    return found


def questions():
    """[(key, C expression, name it hangs on)]"""
    text = without_comments(OURS.read_text(encoding="utf-8"))
    asked = []
    constants = re.findall(r"\b(CU[A-Z0-9_]*_\w+)\s*=\s", text)
    constants += re.findall(r"^#define\s+(CU_\w+)\s", text, re.M)
    asked += [(name, f"(long long)({name})", name) for name in constants]
    structs = structures(text)
    incomplete = set(re.findall(r"typedef struct \w+ (\w+);", text))
    types = (refresh.api.header_types(OURS) | set(structs)) - incomplete
    for name in sorted(types):
        asked.append((f"sizeof {name}", f"(long long)sizeof({name})", name))
        asked.append((f"alignof {name}", f"(long long)_Alignof({name})", name))
    for name, paths in structs.items():
        for path in paths:
            asked.append((f"offset {name}.{path}", f"(long long)offsetof({name}, {path})", name))
            asked.append((f"size {name}.{path}", f"(long long)sizeof((({name} *)0)->{path})", name))
    return asked


def answers(folder, includes, flags, asked):
    source = Path(folder) / "ask.c"
    lines = [f'    printf("%s=%lld\\n", "{key}", {expression});' for key, expression, _ in asked]
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n" + includes + "int main(void)\n{\n" + "\n".join(lines) + "\n}\n",
        encoding="utf-8",
    )
    program = Path(folder) / "ask"
    done = subprocess.run(
        CC + ["-std=gnu17", "-w", *flags, str(source), "-o", str(program)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(done.stderr[:4000])
    out = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    return dict(line.rsplit("=", 1) for line in out.splitlines())


def compare(header, asked):
    known = without_comments("".join((header.parent / n).read_text(encoding="utf-8", errors="replace")
                                     for n in ("cuda.h", "cudaEGL.h") if (header.parent / n).exists()))
    words = set(re.findall(r"\w+", known))
    unknown = sorted({name for _, _, name in asked if name not in words})
    wanted = [name for name in unknown if version(header) >= SINCE.get(name, 13000)]
    if wanted:
        print(f"{header}: has no {', '.join(wanted)}")
        return 1

    def known_there(question):
        key, _, name = question
        member = key.startswith(("offset ", "size "))
        return name in words and not (member and version(header) < MEMBERS_SINCE.get(name, 0))

    kept = [q for q in asked if known_there(q)]
    with tempfile.TemporaryDirectory() as folder:
        write_stubs(folder)
        ours = answers(folder, '#include "gpu/cuda_types.h"\n', [f"-I{ROOT / 'src'}"], kept)
        flags = ["-D__CUDA_API_VERSION_INTERNAL", f"-I{header.parent}", f"-I{folder}"]
        theirs = answers(folder, side_includes(header), flags, kept)
    wrong = [f"{key}: {ours[key]} here, {theirs[key]} in {header}" for key in ours if ours[key] != theirs[key]]
    print("\n".join(wrong + [f"{header}: {len(kept)} compared, {len(wrong)} differ, {len(unknown)} not in it"]))
    return 1 if wrong else 0


def main():
    asked = questions()
    kinds = [sum(key.startswith(k) for key, _, _ in asked) for k in ("CU", "sizeof", "offset")]
    # Were the reading of our header broken, there would be nothing to compare.
    if kinds[0] < 250 or kinds[1] < 60 or kinds[2] < 80:
        sys.exit(f"only {kinds} constants, types and members found in {OURS}")
    return max(compare(header, asked) for header in headers())


if __name__ == "__main__":
    sys.exit(main())
