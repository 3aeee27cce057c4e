#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Trains a small network with Adam; its losses are the same bits in every run.

It prints "ready", and a line "N LOSS" after each step, with the loss's 32 bits in hexadecimal; after --steps steps "done". The file --pace may
say at any time how many milliseconds a step is to take at the least. It knows nothing of checkpoints.
"""

import argparse
import os
import struct
import time

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # two runs of the program alone must give the same bits

import torch  # noqa: E402


def least_seconds(path):
    try:
        with open(path, encoding="ascii") as f:
            return float(f.read()) / 1000
    except (OSError, TypeError, ValueError):  # none, or half-written
        return 0.0


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--steps", type=int, default=1000)
    p.add_argument("--pace", metavar="FILE")
    p.add_argument("--width", type=int, default=1536)
    p.add_argument("--device", default="cuda")
    args = p.parse_args()
    torch.manual_seed(7)
    torch.use_deterministic_algorithms(True)
    layers = [torch.nn.Linear(args.width, args.width) if i % 2 == 0 else torch.nn.GELU() for i in range(7)]
    model = torch.nn.Sequential(*layers).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    print("ready", flush=True)
    for n in range(args.steps):
        began = time.monotonic()
        # From the generator's own state, which a checkpoint must keep, too.
        x = torch.randn(256, args.width, device=args.device)
        loss = (model(x) - x.roll(1, 1)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        print(n, struct.pack(">f", loss.item()).hex(), flush=True)
        time.sleep(max(0.0, least_seconds(args.pace) - (time.monotonic() - began)))
    print("done", flush=True)


if __name__ == "__main__":
    main()
