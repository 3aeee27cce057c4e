#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""A PyTorch program that holds GPU memory in tensors of many sizes and knows their sums; it knows nothing of checkpoints.

usage: torch_hold.py --commands FIFO [--gb N]

It prints "ready BYTES in N tensors". A line "check" in the FIFO compares every tensor's sum (and prints "checked N: BAD wrong tensors"),
"quit" ends it. --gb 0: PyTorch, its context and cuBLAS, and next to nothing on the GPU.
"""

import argparse
import random

import torch


def make(gigabytes):
    """Tensors of 1 to 120 MB, as a model of that size would have."""
    rng, left, tensors = random.Random(1), int(gigabytes * 1e9), []
    torch.manual_seed(1)
    while left > 0:
        n = min(left, int(1e6 * rng.choice((1, 3, 12, 27, 27, 55, 120))))
        tensors.append(torch.randint(-2**61, 2**61, (max(n // 8, 1),), dtype=torch.int64, device="cuda"))
        left -= n
    return tensors


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--commands", required=True)
    p.add_argument("--gb", type=float, default=7)
    args = p.parse_args()
    small = torch.randn(256, 256, device="cuda", dtype=torch.bfloat16)
    want = (small @ small).float().sum().item()  # cuBLAS has its workspace
    tensors = make(args.gb)
    sums = [t.sum().item() for t in tensors]
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    print(f"ready {torch.cuda.memory_allocated()} in {len(tensors)} tensors", flush=True)
    checks = 0
    with open(args.commands, "rb+", buffering=0) as fifo:
        while (line := fifo.readline().strip()) != b"quit":
            if line == b"check":
                checks += 1
                wrong = sum(t.sum().item() != s for t, s in zip(tensors, sums)) + ((small @ small).float().sum().item() != want)
                print(f"checked {checks}: {wrong} wrong tensors", flush=True)


if __name__ == "__main__":
    main()
