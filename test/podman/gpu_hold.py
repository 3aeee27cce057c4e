#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""A PyTorch program that checks every byte of its tensors and changes all of them, round after round: gpu_hold.py GB.

It prints "ready" and "round N" after each round, and ends with status 1 at the first tensor that is not what it should be."""
import random
import sys
import time

import torch

rng, left, tensors = random.Random(1), int(float(sys.argv[1]) * 1e9), []
torch.manual_seed(1)
while left > 0:
    n = min(left, int(1e6 * rng.choice((1, 3, 12, 27, 27, 55, 120))))
    tensors.append(torch.randint(-2**61, 2**61, (max(n // 8, 1),), dtype=torch.int64, device="cuda"))
    left -= n
small = torch.randn(256, 256, device="cuda", dtype=torch.bfloat16)
want = (small @ small).float().sum().item()
sums = [t.sum() for t in tensors]
torch.cuda.synchronize()
print(f"ready {torch.cuda.memory_allocated()} bytes in {len(tensors)} tensors", flush=True)
number = 0
while True:
    number += 1
    wrong = sum(int((t.sum() != s).item()) for t, s in zip(tensors, sums)) + ((small @ small).float().sum().item() != want)
    if wrong:
        print(f"WRONG: round {number}: {wrong} tensors", flush=True)
        sys.exit(1)
    for i, t in enumerate(tensors):
        t.add_(number)
        sums[i] += number * t.numel()
    torch.cuda.synchronize()
    print(f"round {number}", flush=True)
    time.sleep(0.02)
