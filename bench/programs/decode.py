#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""A language model that writes tokens without end, and what else it has on the GPU; it knows nothing of checkpoints.

usage: decode.py --commands FIFO [--gb N] [--shape 1.5b|tiny]

A token is one launch of a CUDA graph, as in servers: the GPU is what takes its time. It prints "ready BYTES", and "step N TIME"
(CLOCK_MONOTONIC, s) after each token. --gb: so much more GPU memory, in tensors of 1 GB. Lines that the FIFO takes: "check" compares their
sums and prints "checked N: BAD wrong tensors", "eager" goes on without the graph, some hundred launches a token, and "quit" ends it.
"""

import argparse
import os
import time

import torch
from torch import nn

# Layers, heads of queries and of keys, of 128 each, and words; the larger one is as large as Qwen2-1.5B.
SHAPES = {"1.5b": dict(layers=28, heads=12, kept=2, inner=8960, words=151936), "tiny": dict(layers=2, heads=4, kept=2, inner=512, words=1000)}
HEAD = 128
CONTEXT = 512  # tokens, after which it begins anew


class Layer(nn.Module):
    def __init__(self, heads, kept, inner):
        super().__init__()
        width, self.kept, self.split = heads * HEAD, kept, [heads * HEAD, kept * HEAD, kept * HEAD]
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.ask, self.answer = nn.Linear(width, sum(self.split)), nn.Linear(width, width)
        self.up, self.gate, self.down = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(inner, width)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(kept, CONTEXT, HEAD))

    def forward(self, x, at, past):
        query, key, value = self.ask(self.before(x)).split(self.split)
        self.keys.index_copy_(1, at, key.view(self.kept, 1, HEAD))
        self.values.index_copy_(1, at, value.view(self.kept, 1, HEAD))
        scores = query.view(self.kept, -1, HEAD) @ self.keys.transpose(1, 2) / HEAD**0.5
        seen = scores.masked_fill(~past, -torch.inf).softmax(-1) @ self.values
        x = x + self.answer(seen.flatten())
        y = self.between(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class Model(nn.Module):
    def __init__(self, layers, heads, kept, inner, words):
        super().__init__()
        self.words = nn.Embedding(words, heads * HEAD)
        nn.init.normal_(self.words.weight, std=0.02)  # as usual; with more, each word would be followed by itself
        self.layers = nn.ModuleList(Layer(heads, kept, inner) for _ in range(layers))
        self.last = nn.LayerNorm(heads * HEAD)
        self.register_buffer("word", torch.zeros(1, dtype=torch.long))
        self.register_buffer("at", torch.zeros(1, dtype=torch.long))
        self.register_buffer("places", torch.arange(CONTEXT))

    @torch.inference_mode()
    def forward(self):
        """One token more, into self.word."""
        x, past = self.words(self.word)[0], self.places <= self.at
        for layer in self.layers:
            x = layer(x, self.at, past)
        self.word.copy_((self.words.weight @ self.last(x)).argmax())
        self.at.add_(1).remainder_(CONTEXT)


def make_model(shape):
    torch.manual_seed(1234)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Model(**SHAPES[shape])
    torch.set_default_dtype(torch.float32)
    return model.eval()


def record(model):
    """The graph of one token."""
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        for _ in range(3):  # libraries make ready what they may not while a graph is recorded
            model()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model()
    return graph


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--commands", required=True)
    p.add_argument("--gb", type=int, default=0)
    p.add_argument("--shape", choices=SHAPES, default="1.5b")
    args = p.parse_args()
    fifo = os.open(args.commands, os.O_RDWR | os.O_NONBLOCK)
    model = make_model(args.shape)
    one_token = record(model).replay
    tensors = [torch.randint(-2**61, 2**61, (125_000_000,), dtype=torch.int64, device="cuda") for _ in range(args.gb)]
    sums = [t.sum().item() for t in tensors]
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    print(f"ready {torch.cuda.memory_reserved()}", flush=True)
    checks = step = 0
    while True:
        one_token()
        model.word.item()
        step += 1
        print(f"step {step} {time.monotonic():.6f}", flush=True)
        try:
            command = os.read(fifo, 64)
        except BlockingIOError:
            continue
        if b"check" in command:
            checks += 1
            print(f"checked {checks}: {sum(t.sum().item() != s for t, s in zip(tensors, sums))} wrong tensors", flush=True)
        if b"eager" in command:
            one_token = model
        if b"quit" in command:
            return


if __name__ == "__main__":
    main()
