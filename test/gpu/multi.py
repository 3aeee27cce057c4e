#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""PyTorch on several GPUs: memory of which every byte is compared, and rewritten, in every step.

usage: multi.py both [--peer] | ranks --meet FILE     [--gpus N] [--gb GB] [--device cpu]

both   One process with memory on all GPUs. With --peer it also copies from each GPU to the next and compares what arrives.
ranks  As torchrun has it: a parent without CUDA and a process for each GPU. They add up a block of each of them in every step, with NCCL, and
       compare the sum. They find each other through FILE, which must not be there.

Each process prints "RANK ready" (both: rank 0), then "RANK step N" for each step. It ends with an error at the first wrong byte. It knows nothing
of checkpoints. With --device cpu there are no GPUs (and gloo in NCCL's place): to try the program.
"""

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import time

PIECE = 1 << 25  # words of 8 bytes: 256 MiB
PR_SET_PDEATHSIG = 1


def arguments():
    p = argparse.ArgumentParser()
    p.add_argument("what", choices=["both", "ranks"])
    p.add_argument("--gpus", type=int, default=2)
    p.add_argument("--gb", type=float, default=4, help="on each GPU")
    p.add_argument("--peer", action="store_true")
    p.add_argument("--meet", metavar="FILE")
    p.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    p.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    return p.parse_args()


class Memory:
    """Blocks on one GPU. Each word is a function of GPU, block, place and step."""

    def __init__(self, torch, kind, gpu, gigabytes):
        self.torch, self.gpu = torch, gpu
        self.device = torch.device(kind, gpu) if kind == "cuda" else torch.device(kind)
        self.sizes, left = [], max(int(gigabytes * 1e9 / 8), 1024)
        while left > 0:
            self.sizes.append(min(left, PIECE))
            left -= self.sizes[-1]
        self.blocks = [self.expected(gpu, i, 0) for i in range(len(self.sizes))]

    def expected(self, gpu, block, step):
        """What block `block` of that GPU holds in that step, made here."""
        words = self.torch.arange(self.sizes[block], dtype=self.torch.int64, device=self.device)
        return words.mul_(2862933555777941757).add_(gpu * 1000003 + block * 7919 + step * 104729)

    def same(self, have, gpu, block, step, what):
        if not self.torch.equal(have, self.expected(gpu, block, step)):
            sys.exit(f"WRONG: step {step}, GPU {self.gpu}: {what}")

    def check(self, step):
        for i, block in enumerate(self.blocks):
            self.same(block, self.gpu, i, step, f"block {i}")

    def rewrite(self):
        for block in self.blocks:
            block.add_(104729)


def say(text):
    os.write(1, f"{text}\n".encode())  # in one piece: others write there, too


def run(rank, one_step):
    say(f"{rank} ready")
    step = 0
    while True:
        one_step(step)
        step += 1
        say(f"{rank} step {step}")
        time.sleep(0.02)


def both(args):
    import torch
    memories = [Memory(torch, args.device, gpu, args.gb) for gpu in range(args.gpus)]

    def one_step(step):
        for m in memories:
            m.check(step)
        for m, to in zip(memories, memories[1:] + memories[:1]) if args.peer else ():
            to.same(m.blocks[0].to(to.device), m.gpu, 0, step, f"what came from GPU {m.gpu}")
        for m in memories:
            m.rewrite()

    run(0, one_step)


def rank(args):
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    import torch
    import torch.distributed as dist
    if args.device == "cuda":
        torch.cuda.set_device(args.rank)
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo", init_method=f"file://{os.path.abspath(args.meet)}", rank=args.rank,
                            world_size=args.gpus)
    memory = Memory(torch, args.device, args.rank, args.gb)

    def one_step(step):
        memory.check(step)
        total = memory.blocks[0].clone()
        dist.all_reduce(total)
        want = memory.expected(0, 0, step)
        for gpu in range(1, args.gpus):
            want.add_(memory.expected(gpu, 0, step))
        if not torch.equal(total, want):
            sys.exit(f"WRONG: step {step}, rank {args.rank}: the sum of all ranks")
        memory.rewrite()

    run(args.rank, one_step)


def ranks(args):
    children = [subprocess.Popen([sys.executable, *sys.argv, "--rank", str(i)], stdin=subprocess.DEVNULL) for i in range(args.gpus)]
    pid, status = os.wait()
    which = next(i for i, c in enumerate(children) if c.pid == pid)
    sys.exit(f"rank {which} ended with {os.waitstatus_to_exitcode(status)}")


def main():
    args = arguments()
    if args.what == "both":
        both(args)
    elif args.rank is None:
        ranks(args)
    else:
        rank(args)


if __name__ == "__main__":
    main()
