# SPDX-License-Identifier: MIT
"""Figures, the targets made of them, and the file of results.

A figure is what was measured: a row of values of which the median counts. A target row is a ratio or a limit made of figures of one run on one
machine; where a figure is missing its value is null. A file of results has, beside what the table needs, under "runs" for each row the
number of runs, their minimum, median and maximum, and every value.
"""

import datetime
import json
import os
import pathlib
import re
import statistics
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent


def now():
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def machine(build, simulated):
    smi = "" if simulated else subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
                                              capture_output=True, text=True).stdout.strip()
    gpu, _, driver = smi.partition("\n")[0].partition(", ")
    commit_file = pathlib.Path(build) / "commit"
    if commit_file.exists():
        commit = commit_file.read_text().splitlines()
    else:
        r = subprocess.run("git rev-parse HEAD && git status --porcelain -uno", shell=True, cwd=ROOT, capture_output=True, text=True)
        commit = r.stdout.splitlines()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {"machine": f"{os.cpu_count()} cores, {memory:.0f} GiB, Linux {os.uname().release}", "gpu": gpu or "simulated",
            "driver": driver or "simulated", "date": now(), "commit": (commit or ["unknown"])[0] + (" and changes" if len(commit) > 1 else "")}


class Missing(Exception):
    """A figure that a target needs was not measured."""


class Figures:
    def __init__(self, data):
        self.data = data  # {key: {"name", "unit", "better", "values", "note", "step", "at"}}

    def add(self, key, name, values, unit, better="lower", note="", step=""):
        values = list(values) if isinstance(values, (list, tuple)) else [values]
        self.data[key] = {"name": name, "unit": unit, "better": better, "values": values, "note": note, "step": step, "at": now()}

    def median(self, key):
        if key not in self.data or not self.data[key]["values"]:
            raise Missing(self.data.get(key, {}).get("name", key))
        return statistics.median(self.data[key]["values"])


def targets(sizes):
    """(name, unit, target, better, step, value as a function of median(key), keys) for every target."""
    big, mid, small, load = sizes["big_text"], sizes["mid_text"], sizes["small_text"], sizes["load_text"]
    rows = []

    def row(step, name, unit, target, better, fn, *keys):
        rows.append((name, unit, target, better, step, fn, keys))

    def ratio(step, name, target, better, above, below):
        """How many times `below` is in `above`; each is one key or several to add."""
        def value(m):
            return sum(m(k) for k in above) / sum(m(k) for k in below)
        row(step, name, "x", target, better, value, *above, *below)

    ratio("suspend", f"suspend {big}, host tier: rate / pinned bandwidth", 0.90, "higher", ["suspend.rate"], ["link.out"])
    ratio("suspend", f"resume {big}, host tier: rate / pinned bandwidth", 0.90, "higher", ["resume.rate"], ["link.in"])
    ratio("driver", f"suspend {big}, host tier: times faster than the driver's path", 18, "higher", ["driver.lock", "driver.checkpoint"],
          ["suspend.wall"])
    ratio("driver", f"resume {big}, host tier: times faster than the driver's path", 8, "higher", ["driver.restore", "driver.unlock"],
          ["resume.wall"])
    ratio("blocks", f"suspend + resume {mid} in blocks of {small} / in blocks of {sizes['block_text']}", 2, "lower",
          ["blocks.small.suspend", "blocks.small.resume"], ["blocks.large.suspend", "blocks.large.resume"])
    row("gpu-tier", f"suspend {big}, GPU tier", "s", 0.6, "lower", lambda m: m("gpu.suspend"), "gpu.suspend")
    row("gpu-tier", f"resume {big}, GPU tier", "s", 0.6, "lower", lambda m: m("gpu.resume"), "gpu.resume")
    for which in ("suspend", "resume"):
        ratio("gpu-tier", f"{which}, GPU tier: time of {big} / of {mid}", 1.5, "lower", [f"gpu.{which}"], [f"gpu.mid.{which}"])
    ratio("pytorch", "dump PyTorch with 7 GB to page cache: times faster than driver path + CRIU", 7, "higher", ["pytorch.driver.dump"],
          ["pytorch.agent.dump"])
    ratio("pytorch", "restore PyTorch with 7 GB from page cache: times faster than driver path + CRIU", 6, "higher",
          ["pytorch.driver.restore"], ["pytorch.agent.restore"])
    ratio("pytorch", "restore PyTorch with 7 GB from page cache / with an empty GPU", 1.25, "lower", ["pytorch.agent.restore"],
          ["pytorch.empty.restore"])

    def load_bound(m):
        criu = m("load.empty.restore") - m("load.empty.driver")
        return m("load.restore") / (max(criu, sizes["load"] / 50e9) * 1.15 + m("load.driver"))
    row("load", f"restore {load} from tmpfs / (max(CRIU, bytes / 50 GB/s) x 1.15 + driver restore)", "x", 1, "lower", load_bound,
        "load.restore", "load.driver", "load.empty.restore", "load.empty.driver")
    row("live", f"live dump of {load}: gates closed until nothing is copied from its memory", "s", 0.1, "lower", lambda m: m("live.gpu"),
        "live.gpu")
    row("live", f"second checkpoint of {load}, of which 1/256 is written: bytes sent", "%", 5, "lower", lambda m: m("live.new"), "live.new")
    row("live", f"restore of {load}: hashing on the GPU, of the whole command", "%", 3, "lower", lambda m: m("live.verify"), "live.verify")
    row("rewrite", f"live dump of {sizes['rewrite_text']} rewritten in each step: gates closed until nothing is copied from its memory", "s", 0.15,
        "lower", lambda m: m("rewrite.gpu"), "rewrite.gpu")
    for key, text, target in (("memory", "memory-bound loop", 5), ("decode", "decode loop (PyTorch)", 3)):
        row("copying", f"{text}, while {load} are copied: slower by", "%", target, "lower",
            lambda m, k=key: m(f"copying.{k}.slower"), f"copying.{key}.slower")
    ratio("copying", f"dump --live --leave-running of PyTorch: whole pause with {sizes['torch_live'] + 4} GB / with an empty GPU", 1.2, "lower",
          ["pause.torch"], ["pause.empty"])
    row("replicas", "second checkpoint of an inference server: new bytes", "%", 5, "lower", lambda m: m("replicas.second"), "replicas.second")
    row("replicas", "checkpoint of its replica: new bytes", "%", 5, "lower", lambda m: m("replicas.replica"), "replicas.replica")
    row("hash", "hash kernel", "TB/s", 2, "higher", lambda m: m("hash.gpu"), "hash.gpu")
    row("hash", "hash on one core", "GB/s", 5, "higher", lambda m: m("hash.core"), "hash.core")
    ratio("disk", "dump to disk: rate / the disk's O_DIRECT rate", 0.9, "higher", ["disk.dump_rate"], ["disk.write"])
    ratio("disk", "writing packs: rate / the disk's O_DIRECT rate", 0.9, "higher", ["disk.packs_write"], ["disk.write"])
    ratio("disk", "reading packs: rate / the disk's O_DIRECT rate", 0.9, "higher", ["disk.packs_read"], ["disk.read"])
    ratio("disk", "restore from disk: rate / the disk's O_DIRECT rate", 0.9, "higher", ["disk.restore_rate"], ["disk.read"])
    ratio("llm", "llm-server, first token, restored from page cache: times faster than cold start", 8, "higher", ["llm.cold"], ["llm.restored"])
    ratio("llm", "llm-server, first token, restored from page cache: times faster than driver path + CRIU", 4, "higher", ["llm.driver"],
          ["llm.restored"])
    for key, text in LOOPS.items():
        row("overhead", f"under the agent, {text}: slower by", "%", 1, "lower",
            lambda m, k=key: (m(f"loop.{k}.ratio") - 1) * 100, f"loop.{key}.ratio")
    for key, text in (("gate", "a gated call"), ("gate.cold", "a gated call with other code and data in the caches"), ("gate.launch", "a gated launch")):
        row("gate", f"{text} costs more by", "ns", 15, "lower", lambda m, k=key: m(f"{k}.cost"), f"{key}.cost")
    row("rest", "daemon at rest: CPU", "%", 0, "lower", lambda m: m("rest.cpu"), "rest.cpu")
    row("rest", "daemon at rest: GPU memory beyond its context", "bytes", 0, "lower", lambda m: max(0, m("rest.gpu") - m("rest.context")),
        "rest.gpu", "rest.context")
    row("rest", "daemon at rest: pinned host memory beyond a fresh one's", "bytes", 0, "lower",
        lambda m: max(0, m("rest.pinned_used") - m("rest.pinned_fresh")), "rest.pinned_used", "rest.pinned_fresh")
    return rows


# Loops of programs/loops.py (PyTorch) and, with "c-" before their names, of programs/loops.c (driver API).
LOOPS = {
    "gemm": "GEMM loop (PyTorch)", "memory": "memory-bound loop (PyTorch)", "decode": "token-by-token decode (PyTorch)",
    "launches": "10,000 small launches (PyTorch)", "allocations": "allocation loop (PyTorch)",
    "c-memory": "memory-bound loop (driver API)", "c-launches": "10,000 small launches (driver API)",
    "c-allocations": "allocation loop (driver API)", "c-segments": "what PyTorch's allocator asks of the driver (driver API)",
    "c-small": "allocation loop of blocks up to 4 MiB (driver API)",
}


def median_range(values):
    """Where the median of what these values are a sample of lies, with 95 %: order statistics, so no shape of it is assumed."""
    values, half = sorted(values), 0.98 * len(values) ** 0.5
    return values[max(0, int(len(values) / 2 - half))], values[min(len(values) - 1, int(len(values) / 2 + half))]


def runs_of(values, **more):
    if len(values) > 4:
        more["quartiles"] = statistics.quantiles(values, n=4)[::2]
    return {"n": len(values), "min": min(values), "median": statistics.median(values), "max": max(values), "values": values,
            **{k: v for k, v in more.items() if v}}


def make_rows(figures, sizes, skipped):
    """(rows, runs): the target rows, then the figures. skipped: {step: why it was not measured}."""
    rows, runs = [], {}
    f = Figures(figures)
    for name, unit, target, better, step, fn, keys in targets(sizes):
        try:
            value = fn(f.median)
            runs[name] = {"step": step, "at": max(figures[k]["at"] for k in keys), "from": [figures[k]["name"] for k in keys],
                          "n": min(len(figures[k]["values"]) for k in keys)}
            if len(keys) == 1 and figures[keys[0]]["note"]:
                runs[name]["note"] = figures[keys[0]]["note"]
        except Missing as e:
            value = None
            runs[name] = {"step": step, "note": skipped.get(step) or f"not measured: {e}"}
        except ZeroDivisionError:
            value = None
            runs[name] = {"step": step, "note": "a figure that it is divided by is 0"}
        rows.append({"name": name, "value": value if value is None else float(f"{value:.6g}"), "unit": unit, "target": target, "better": better})
    for fig in figures.values():
        if fig["values"]:
            rows.append({"name": fig["name"], "value": float(f"{statistics.median(fig['values']):.6g}"), "unit": fig["unit"], "target": None,
                         "better": fig["better"]})
            runs[fig["name"]] = runs_of(fig["values"], step=fig["step"], note=fig["note"], at=fig["at"])
    return rows, runs


def document(head, state, sizes):
    rows, runs = make_rows(state["figures"], sizes, {s: v["text"] for s, v in state["steps"].items() if v["result"] != "done"})
    return {**head, "rows": rows, "simulated": state["simulated"], "quick": state["quick"], "notes": state["notes"], "runs": runs, "steps": state["steps"]}


def file_name(doc):
    kind = re.sub(r"[^a-z0-9]+", "-", doc["gpu"].lower()).strip("-")
    commit = doc["commit"].split()[0][:12] + ("-changed" if " " in doc["commit"] else "")
    return f"{doc['date'][:10]}-{kind}-{commit}{'-quick' if doc.get('quick') else ''}.json"


def merge(docs):
    """One document of several of one kind of machine and commit. Of two rows of one name the later one that has a value stays. Every
    target row was made within one run already."""
    docs = sorted(docs, key=lambda d: d["date"])
    if len({(d["gpu"], d["driver"], d["commit"], d.get("quick")) for d in docs}) > 1:
        raise ValueError("these results are not of one GPU, driver, commit and size")
    out = {**docs[-1], "rows": [], "runs": {}, "steps": {}, "notes": {}}
    place = {}
    for d in docs:
        out["notes"].update(d.get("notes", {}))
        out["steps"].update({k: v for k, v in d.get("steps", {}).items() if v["result"] == "done" or k not in out["steps"]})
        for r in d["rows"]:
            if r["name"] not in place:
                place[r["name"]] = len(out["rows"])
                out["rows"].append(r)
            elif r["value"] is not None and (out["rows"][place[r["name"]]]["value"] is None or at(d, r) >= out["runs"][r["name"]].get("at", "")):
                out["rows"][place[r["name"]]] = r
            else:
                continue
            out["runs"][r["name"]] = d.get("runs", {}).get(r["name"], {})
    out["rows"].sort(key=lambda r: r["target"] is None)  # stable
    return out


def at(doc, row):
    return doc.get("runs", {}).get(row["name"], {}).get("at", "")


def met(row):
    if row["value"] is None or row["target"] is None:
        return None
    return row["value"] >= row["target"] if row["better"] == "higher" else row["value"] <= row["target"]


def number(v, unit=""):
    if v is None:
        return "-"
    if unit == "bytes" and abs(v) >= 1e6:
        return f"{v / 1e9:.3f}e9"
    return f"{v:.0f}" if v == int(v) and abs(v) >= 100 else f"{v:.4g}"


def table(doc):
    """The results as text."""
    lines = [f"{doc['gpu']}, driver {doc['driver']}; {doc['machine']}; {doc['date']}; commit {doc['commit'][:12]}"]
    if doc.get("simulated"):
        lines.append("SIMULATED DRIVER: for shape only, no figure means anything")
    lines += [f"{k}: {v}" for k, v in doc.get("notes", {}).items()]
    for targets_, title in ((True, "target"), (False, "figure (median)")):
        rows = [r for r in doc["rows"] if (r["target"] is not None) == targets_]
        width = max([len(r["name"]) for r in rows] + [10])
        lines += ["", f"{title:{width}}  {'value':>10} {'':6}" + (f" {'wanted':>8}" if targets_ else f" {'n':>3} {'min':>10} {'max':>10}")]
        for r in rows:
            run = doc["runs"].get(r["name"], {})
            line = f"{r['name']:{width}}  {number(r['value'], r['unit']):>10} {r['unit']:6}"
            if targets_:
                sign = "≥" if r["better"] == "higher" else "≤"
                line += f" {sign + number(r['target']):>8}  {'' if doc.get('simulated') else ({True: 'met', False: 'NOT MET', None: ''})[met(r)]}"
            else:
                line += f" {run.get('n', 0):>3} {number(run.get('min'), r['unit']):>10} {number(run.get('max'), r['unit']):>10}"
            note = run.get("note", "")
            lines.append(line + (f"  {note.splitlines()[0][:100]}" if note else ""))
    return "\n".join(lines)


def write(path, doc):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(doc, indent=1, ensure_ascii=False) + "\n")
    os.replace(new, path)
