#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Loops of PyTorch, timed: what the agent's presence costs a program.

usage: loops.py --commands FIFO

It prints "ready", and then obeys lines of the FIFO: the name of a loop runs it once and prints "NAME SECONDS"; "quit" ends it.

gemm         1,000 products of 4096 x 4096 matrices, bf16
memory       100 times 4 GB of device memory read and written
decode       8 tokens of a model of Qwen2-1.5B's shape, one after another
launches     10,000 operations on one number
allocations  1,000 tensors made and dropped, 20 alive, the cache emptied now and then
"""

import argparse
import os
import random
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, Qwen2Config  # noqa: E402


def make_model():
    torch.manual_seed(1234)
    config = Qwen2Config(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
                         vocab_size=151936, max_position_embeddings=32768, tie_word_embeddings=True)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(torch.float32)
    return model.to(torch.bfloat16).eval()


class Loops:
    def __init__(self):
        self.a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
        self.b = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
        self.c = torch.empty_like(self.a)
        self.big = torch.zeros(10**9, device="cuda")
        self.one = torch.zeros(1, device="cuda")
        self.model = make_model()

    def gemm(self):
        for _ in range(1000):
            torch.mm(self.a, self.b, out=self.c)

    def memory(self):
        for _ in range(100):
            self.big.add_(1)

    def decode(self):
        ids, cache = torch.arange(64, device="cuda").unsqueeze(0), None
        with torch.inference_mode():
            for _ in range(8):
                out = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
                cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
                ids.item()

    def launches(self):
        for _ in range(10000):
            self.one.add_(1)

    def allocations(self):
        rng, alive = random.Random(3), [None] * 20
        for i in range(1000):
            alive[i % 20] = torch.empty(int(2 ** rng.uniform(10, 28)), dtype=torch.uint8, device="cuda")
            if i % 100 == 99:
                torch.cuda.empty_cache()
        alive.clear()
        torch.cuda.empty_cache()


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--commands", required=True)
    args = p.parse_args()
    loops = Loops()
    for name in ("gemm", "memory", "decode", "launches", "allocations"):
        getattr(loops, name)()
    torch.cuda.synchronize()
    print("ready", flush=True)
    with open(args.commands, "rb+", buffering=0) as fifo:
        while (name := fifo.readline().strip().decode()) != "quit":
            torch.cuda.synchronize()
            began = time.perf_counter()
            getattr(loops, name)()
            torch.cuda.synchronize()
            print(f"{name} {time.perf_counter() - began:.9f}", flush=True)


if __name__ == "__main__":
    main()
