#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""A language model that writes tokens without end, and what else it has on the GPU; it knows nothing of checkpoints.

usage: decode.py --commands FIFO [--gb N] [--shape 1.5b|tiny]

It prints "ready BYTES", and "step N TIME" (CLOCK_MONOTONIC, s) after each token. --gb: so much more GPU memory, in tensors of 1 GB. A
line "check" in the FIFO compares their sums and prints "checked N: BAD wrong tensors", "quit" ends it.
"""

import argparse
import os
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, Qwen2Config  # noqa: E402

SHAPES = {
    "1.5b": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
                 vocab_size=151936, max_position_embeddings=32768, tie_word_embeddings=True),
    "tiny": dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 vocab_size=1000, max_position_embeddings=4096, tie_word_embeddings=True),
}
CONTEXT = 512  # tokens, after which it begins anew


def make_model(shape):
    torch.manual_seed(1234)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(Qwen2Config(**SHAPES[shape]))
    torch.set_default_dtype(torch.float32)
    return model.to(torch.bfloat16).eval()


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--commands", required=True)
    p.add_argument("--gb", type=int, default=0)
    p.add_argument("--shape", choices=SHAPES, default="1.5b")
    args = p.parse_args()
    fifo = os.open(args.commands, os.O_RDWR | os.O_NONBLOCK)
    model = make_model(args.shape)
    tensors = [torch.randint(-2**61, 2**61, (125_000_000,), dtype=torch.int64, device="cuda") for _ in range(args.gb)]
    sums = [t.sum().item() for t in tensors]
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    print(f"ready {torch.cuda.memory_reserved()}", flush=True)
    checks = step = 0
    while True:
        ids, cache = torch.arange(64, device="cuda").unsqueeze(0), None
        for _ in range(CONTEXT):
            with torch.inference_mode():
                out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            ids.item()
            step += 1
            print(f"step {step} {time.monotonic():.6f}", flush=True)
            try:
                command = os.read(fifo, 64)
            except BlockingIOError:
                continue
            if b"check" in command:
                checks += 1
                print(f"checked {checks}: {sum(t.sum().item() != s for t, s in zip(tensors, sums))} wrong tensors", flush=True)
            if b"quit" in command:
                return


if __name__ == "__main__":
    main()
