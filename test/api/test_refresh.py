#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""refresh-api on small headers of our own that use cuda.h's macros the way it does."""

import subprocess
import sys
import tempfile
from pathlib import Path

from toolkit import ROOT, api

TOP = """\
#define CUDA_VERSION {version}
#if defined(__CUDA_API_VERSION_INTERNAL) || defined(CUDA_API_PER_THREAD_DEFAULT_STREAM)
#define __CUDA_API_PER_THREAD_DEFAULT_STREAM
#define __CUDA_API_PTSZ(api) api ## _ptsz
#else
#define __CUDA_API_PTSZ(api) api
#endif
#define CUDAAPI
#define __CUDA_DEPRECATED __attribute__((deprecated))
#define cuAlpha cuAlpha_v2
#define cuBeta __CUDA_API_PTSZ(cuBeta_v2)
typedef int CUresult; typedef int CUdevice; typedef void *CUstream;
typedef enum CUmode_enum {{ CU_MODE_A = 0 }} CUmode;
typedef void (*CUcall)(void *data);
"""
OLD = TOP.format(version=12000) + """\
CUresult CUDAAPI cuAlpha(CUdevice *dev, unsigned flags);
CUresult CUDAAPI
cuBeta(const char *const *names, CUmode mode,
       CUstream hStream);
__CUDA_DEPRECATED CUresult CUDAAPI cuGone(void);
#if defined(__CUDA_API_VERSION_INTERNAL)
#undef cuAlpha
#undef cuBeta
CUresult CUDAAPI cuAlpha(CUdevice *dev);
CUresult CUDAAPI cuBeta(const char *const *names, CUstream hStream);
CUresult CUDAAPI cuBeta_v2(const char *const *names, CUmode mode, CUstream hStream);
#endif
"""
NEW = TOP.format(version=13000) + """\
CUresult CUDAAPI cuAlpha(CUdevice *device, unsigned int flags);
CUresult CUDAAPI cuBeta(const char *const *names, CUmode mode, CUstream stream);
CUresult CUDAAPI cuDelta(CUcall call, int values[], const CUthing *thing);
static inline CUresult cuInline(int a) {{ return cuDelta(0, 0, 0); }}
""".replace("{{", "{").replace("}}", "}")

EXPECTED = {
    "cuAlpha": "CUresult cuAlpha(CUdevice *dev)",
    "cuAlpha_v2": "CUresult cuAlpha_v2(CUdevice *dev, unsigned int flags)",
    "cuBeta": "CUresult cuBeta(const char *const *names, CUstream hStream)",
    "cuBeta_v2": "CUresult cuBeta_v2(const char *const *names, CUmode mode, CUstream hStream)",
    "cuBeta_v2_ptsz": "CUresult cuBeta_v2_ptsz(const char *const *names, CUmode mode, CUstream hStream)",
    "cuGone": "CUresult cuGone(void)",
}


def refresh(table, *args):
    command = [sys.executable, str(ROOT / "scripts/refresh-api"), "--table", str(table), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def expect(condition, what):
    if not condition:
        sys.exit(f"failed: {what}")


def main():
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "functions.tbl"
        headers = {}
        for name, text in (("old", OLD), ("new", NEW)):
            (Path(folder) / name).mkdir()
            headers[name] = Path(folder) / name / "cuda.h"
            headers[name].write_text(text, encoding="utf-8")

        done = refresh(table, headers["old"])
        expect(done.returncode == 0, done.stderr)
        read = api.load(table)
        expect({n: f.prototype() for n, f in read.functions.items()} == EXPECTED, f"old header: {table.read_text()}")
        expect(set(read.names("gate")) == set(EXPECTED), "a new function is of class gate")
        expect(read.types == {"CUmode": "int"}, f"types {read.types}")
        expect(read.toolkit == 12000, f"toolkit {read.toolkit}")

        # A class set by hand stays; nothing is dropped; a parameter's new name changes nothing.
        table.write_text(table.read_text().replace("gate   CUresult cuAlpha_v2", "wrap   CUresult cuAlpha_v2"))
        before = table.read_text()
        expect(refresh(table, "--check", headers["new"]).returncode == 1, "--check notices a new function")
        expect(table.read_text() == before, "--check writes nothing")
        done = refresh(table, headers["new"], headers["old"])
        expect(done.returncode == 0, done.stderr)
        read = api.load(table)
        delta = {"cuDelta": "CUresult cuDelta(CUcall call, int values[], const CUthing *thing)"}
        expect({n: f.prototype() for n, f in read.functions.items()} == EXPECTED | delta, "both headers")
        expect(read.names("wrap") == ["cuAlpha_v2"], "the class was kept")
        expect(read.toolkit == 13000, f"toolkit {read.toolkit}")
        expect(read.types == {"CUcall": "void *", "CUmode": "int"}, f"types {read.types}")
        expect(refresh(table, "--check", *headers.values()).returncode == 0, "a second run changes nothing")

        # Symbols without a prototype; a debugger's symbols are left out.
        symbols = Path(folder) / "symbols"
        symbols.write_text("cuAlpha\ncuSecret_v2\ncudbgMain\n_init\n", encoding="utf-8")
        expect(refresh(table, "--symbols", symbols).returncode == 0, "--symbols")
        read = api.load(table)
        expect(read.names("opaque") == ["cuSecret_v2"], f"opaque: {read.names('opaque')}")

        # A prototype that turns up later replaces `opaque`.
        headers["new"].write_text(NEW + "CUresult CUDAAPI cuSecret_v2(int key);\n", encoding="utf-8")
        expect(refresh(table, headers["new"]).returncode == 0, "prototype for an opaque function")
        read = api.load(table)
        expect(read.functions["cuSecret_v2"].cls == "gate" and read.functions["cuSecret_v2"].typed, "typed now")

        before = table.read_text()
        bad = Path(folder) / "bad.h"
        bad.write_text("int x;\n", encoding="utf-8")
        done = refresh(table, bad)
        expect(done.returncode == 1 and "not a cuda.h" in done.stderr, "a header that is not cuda.h is refused")
        bad.write_text(TOP.format(version=13000) + "CUresult cuBy(CUstrange value);\n", encoding="utf-8")
        done = refresh(table, bad)
        expect(done.returncode == 1 and "CUstrange" in done.stderr, "an unknown type by value is refused")
        expect(table.read_text() == before, "a refused header changes nothing")
    return 0


if __name__ == "__main__":
    sys.exit(main())
