#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The whole table's generated code builds, with every compiler that is here, and exports just the driver's names."""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from toolkit import ROOT, api

API = ROOT / "src/agent/api"
SAMPLE = ROOT / "test/api/sample"
WARNINGS = "-std=gnu17 -Wall -Wextra -Werror -Wshadow -Wstrict-prototypes -Wmissing-prototypes -fvisibility=hidden"

# What the agent writes by hand, as far as linking needs it.
REST = """\
#include "agent/api/api_table.h"
extern const char bn_agent_version[] __attribute__((visibility("default")));
const char bn_agent_version[] = "test";
int sample_entered, sample_left;
void bn_real_resolve(void)
{
    __atomic_store_n(&bn_real_ready, 1, __ATOMIC_RELEASE);
}
CUresult bn_real_missing(unsigned fn)
{
    return fn < BN_FN_COUNT ? CUDA_ERROR_NOT_FOUND : CUDA_ERROR_UNKNOWN;
}
"""


def generate(table, out):
    command = [sys.executable, str(API / "generate"), "--table", str(table), "--types"]
    command += [str(ROOT / "src/gpu/cuda_types.h"), "--header", str(out / "agent/api/api_table.h")]
    command += ["--source", str(out / "entry.c"), "--map", str(out / "agent.map")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def run(command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr[:4000]}")
    return done.stdout


def wrappers(header):
    """Empty bodies for the hand-written wrappers that the generated header declares."""
    found = re.findall(r"^(CUresult bn_wrap_\w+\([^()]*\)) BN_API_LOCAL;$", header, re.M)
    return "".join(f"{p}\n{{\n    return CUDA_SUCCESS;\n}}\n" for p in found), len(found)


def exported(library):
    lines = [line.split() for line in run(["nm", "-D", "--defined-only", library]).splitlines()]
    return {w[2] for w in lines if len(w) == 3}


def check_build(out, table):
    expected = set(table.functions) | {"bn_agent_version"}
    flags = WARNINGS.split() + ["-Wno-unused-parameter", f"-I{out}", f"-I{SAMPLE}", f"-I{ROOT / 'src'}"]
    for compiler in ("gcc", "clang"):
        if not shutil.which(compiler):
            print(f"{compiler} is not there: not tried")
            continue
        for level in ("-O0", "-O2"):
            library = out / f"{compiler}{level}.so"
            sources = [str(out / "entry.c"), str(out / "rest.c")]
            link = [f"-Wl,--version-script={out / 'agent.map'}", "-Wl,-z,defs"]
            run([compiler, level, "-shared", "-fPIC", *flags, *sources, *link, "-o", str(library)])
            names = exported(library)
            if names != expected:
                sys.exit(f"{library}: exports {sorted(names ^ expected)} too many or too few")
            print(f"{compiler} {level}: exports {len(names)} names")
    if shutil.which("clang"):
        # No C library for that processor is needed to compile and assemble.
        target = ["clang", "--target=aarch64-linux-gnu", "-ffreestanding", "-fPIC", "-O2", "-c"]
        run(target + flags + [str(out / "entry.c"), "-o", str(out / "aarch64.o")])
        print("clang aarch64: assembles")


def check_refusals(out):
    """Lines that must be refused, each with a message that names what is wrong."""
    for line, message in (
        ("gate CUresult cuA(CUnobody what)", "CUnobody"),
        ("gte CUresult cuA(int a)", "unknown class `gte`"),
        ("gate cuA", "must be `opaque`"),
        ("pass int cuA(void)", "returns int"),
        ("gate CUresult cuA(int a)\ngate CUresult cuA(int a)", "listed twice"),
        ("gate CUresult cuA(void (*f)(int))", "not a prototype"),
        ("type CUx", "type NAME"),
    ):
        table = out / "bad.tbl"
        table.write_text(line + "\n", encoding="utf-8")
        header = out / "agent/api/api_table.h"
        header.unlink(missing_ok=True)
        done = generate(table, out)
        if done.returncode != 1 or message not in done.stderr or header.exists():
            sys.exit(f"`{line}` is not refused as it should: {done.returncode} {done.stderr}")


def main():
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        (out / "agent/api").mkdir(parents=True)
        table = api.load(API / "functions.tbl")
        done = generate(API / "functions.tbl", out)
        if done.returncode != 0:
            sys.exit(done.stderr)
        bodies, count = wrappers((out / "agent/api/api_table.h").read_text(encoding="utf-8"))
        if count != len(table.names("wrap")):
            sys.exit(f"{count} wrappers declared, {len(table.names('wrap'))} in the table")
        (out / "rest.c").write_text(REST + bodies, encoding="utf-8")
        check_build(out, table)
        check_refusals(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
