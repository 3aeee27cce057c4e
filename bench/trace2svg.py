#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Draw a trace (bennu dump --trace FILE, and so on) as an SVG: one bar a phase, in the order of their beginnings.

usage: trace2svg.py TRACE.json [OUT.svg] [--title TEXT] [--no-times]

--no-times leaves the scale and the durations out: for traces of the simulated driver, which show order and overlap only.
"""

import argparse
import html
import json
import pathlib
import sys

ROW, LEFT, WIDTH, TOP, RIGHT = 20, 250, 640, 58, 90
SHADES = {1: "#7a7a7a", 2: "#3569a8", 3: "#b36a1e"}
WHO = {1: "bennu", 2: "bennud", 3: "CRIU"}


def read(path):
    events = [e for e in json.loads(pathlib.Path(path).read_text()) if e["ph"] == "X"]
    if not events:
        sys.exit(f"trace2svg.py: {path} holds no events")
    return sorted(events, key=lambda e: (e["ts"], -e["dur"]))


def size(n):
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            return f"{n:.3g} {unit}"
        n /= 1000


def label(e):
    name = e["name"]
    if e["pid"] == 3:
        name = {"criu": "CRIU, all of it", "processes": "CRIU, on its own"}.get(name, name)
    if e["tid"] >= 100:
        name = f"· process {e['args']['process']}, GPU {e['args']['gpu']}"
    return name


def ordered(events):
    """The parts of a phase below it."""
    parts = [e for e in events if e["tid"] >= 100]
    for e in events:
        if e["tid"] < 100:
            yield e
            if e["pid"] == 2:
                yield from (p for p in parts if p["name"] == e["name"])


def draw(events, title, times):
    begin, end = min(e["ts"] for e in events), max(e["ts"] + e["dur"] for e in events)
    scale = WIDTH / max(end - begin, 1)
    rows = list(ordered(events))
    height = TOP + ROW * len(rows) + 30
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + RIGHT}" height="{height}" font-family="sans-serif" font-size="12">',
           '<rect width="100%" height="100%" fill="white"/>', f'<text x="12" y="22" font-size="15">{html.escape(title)}</text>']
    for i, (pid, name) in enumerate(WHO.items()):
        out.append(f'<rect x="{12 + 90 * i}" y="33" width="12" height="12" fill="{SHADES[pid]}"/><text x="{29 + 90 * i}" y="44">{name}</text>')
    for i, e in enumerate(rows):
        y, x, w = TOP + ROW * i, LEFT + (e["ts"] - begin) * scale, max(e["dur"] * scale, 1.5)
        grey, faint = (' fill="#666"', ' opacity="0.5"') if e["tid"] >= 100 else ("", "")
        out.append(f'<text x="{LEFT - 10}" y="{y + 14}" text-anchor="end"{grey}>{html.escape(label(e))}</text>')
        tip = f'{e["name"]}: {e["dur"] / 1e3:.3g} ms' + (f', {size(e["args"]["bytes"])}' if e["args"].get("bytes") else "")
        tip = f"<title>{html.escape(tip)}</title>" if times else ""
        out.append(f'<rect x="{x:.1f}" y="{y + 3}" width="{w:.1f}" height="{ROW - 6}" fill="{SHADES[e["pid"]]}"{faint}>{tip}</rect>')
        if times:
            out.append(f'<text x="{x + w + 5:.1f}" y="{y + 14}" font-size="10" fill="#444">{e["dur"] / 1e3:.3g} ms</text>')
    y = height - 10
    if times:
        out.append(f'<text x="{LEFT}" y="{y}">0</text><text x="{LEFT + WIDTH}" y="{y}" text-anchor="end">{(end - begin) / 1e3:.3g} ms</text>')
    else:
        out.append(f'<text x="{LEFT}" y="{y}" fill="#444">time →   (order and overlap; lengths mean nothing)</text>')
    out.append("</svg>")
    return "\n".join(out) + "\n"


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("trace")
    p.add_argument("out", nargs="?")
    p.add_argument("--title", default="")
    p.add_argument("--no-times", action="store_true")
    args = p.parse_args()
    svg = draw(read(args.trace), args.title or pathlib.Path(args.trace).stem, not args.no_times)
    if args.out:
        pathlib.Path(args.out).write_text(svg)
    else:
        sys.stdout.write(svg)


if __name__ == "__main__":
    main()
