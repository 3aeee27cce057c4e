#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""A language model of the shape of Qwen2-1.5B with random weights writes tokens, one after another, greedily.

It prints "ready" when the model is on the GPU, a line "N TOKEN SUM" for each token, with a checksum of the logits that it was chosen by, and
at the end "done" with what PyTorch's allocator holds. It knows nothing of checkpoints. With --ballast-gb, that much more GPU memory is kept and every byte of it checked at the end.
"""

import argparse
import os
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # two runs of the program alone must give the same bits

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, Qwen2Config  # noqa: E402

SHAPES = {
    "1.5b": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
                 vocab_size=151936, max_position_embeddings=32768, tie_word_embeddings=True, rope_theta=1000000.0),
    "tiny": dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 vocab_size=1000, max_position_embeddings=4096, tie_word_embeddings=True),
}
PIECE = 1 << 27  # words of 8 bytes: 1 GiB


def make_model(shape):
    torch.manual_seed(1234)
    torch.use_deterministic_algorithms(True, warn_only=True)
    config = Qwen2Config(**SHAPES[shape])
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
    assert model.lm_head.weight.is_cuda and model.lm_head.weight.dtype == torch.bfloat16
    return model.eval()


def make_ballast(gigabytes):
    pieces, words = [], int(gigabytes * 1e9 / 8)
    while words > 0:
        n = min(words, PIECE)
        pieces.append(torch.arange(n, dtype=torch.int64, device="cuda").mul_(2862933555777941757).add_(len(pieces)))
        words -= n
    return pieces


def check_ballast(pieces):
    for i, piece in enumerate(pieces):
        want = torch.arange(piece.numel(), dtype=torch.int64, device="cuda").mul_(2862933555777941757).add_(i)
        assert torch.equal(piece, want), f"piece {i} of the ballast has changed"
        del want


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--tokens", type=int, default=400)
    p.add_argument("--shape", choices=SHAPES, default="1.5b")
    p.add_argument("--ballast-gb", type=float, default=0)
    p.add_argument("--at-least-ms", type=float, default=0, help="time of a token, at the least")
    args = p.parse_args()
    model = make_model(args.shape)
    ballast = make_ballast(args.ballast_gb)
    ids = (torch.arange(64, device="cuda") * 7919 % model.config.vocab_size).unsqueeze(0)
    torch.cuda.synchronize()
    print(f"ready {torch.cuda.memory_reserved()}", flush=True)
    cache = None
    with torch.inference_mode():
        for n in range(args.tokens):
            began = time.monotonic()
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            checksum = out.logits[0, -1].contiguous().view(torch.int16).to(torch.int64)
            checksum = (checksum * torch.arange(1, checksum.numel() + 1, device="cuda")).sum()
            print(n, ids.item(), checksum.item(), flush=True)
            time.sleep(max(0.0, args.at_least_ms / 1000 - (time.monotonic() - began)))
    check_ballast(ballast)
    stats = torch.cuda.memory_stats()
    print("done", stats["allocated_bytes.all.current"], stats["active.all.current"], cache.get_seq_length(), flush=True)


if __name__ == "__main__":
    main()
