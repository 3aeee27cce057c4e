#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""A small language model server: a model of Qwen2-1.5B's shape with random weights of a fixed seed, on one GPU.

usage: server.py [--port N] [--shape 1.5b|tiny]

POST /generate with {"tokens": [1, 2, 3], "max_new": 16} answers with one line of JSON a token, {"token": 123}, each as soon as it
is there. GET /health says {"ready": true}. The server prints "ready PORT" when it takes requests, and serves one at a time: there is one GPU.
It knows nothing of checkpoints.
"""

import argparse
import http.server
import json
import os
import socketserver

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, Qwen2Config  # noqa: E402

SHAPES = {
    "1.5b": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
                 vocab_size=151936, max_position_embeddings=32768, tie_word_embeddings=True),
    "tiny": dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 vocab_size=1000, max_position_embeddings=4096, tie_word_embeddings=True),
}
MAX_BODY = 1 << 20
MAX_NEW = 4096


def load_model(shape, device):
    torch.manual_seed(1234)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(Qwen2Config(**SHAPES[shape]))
    torch.set_default_dtype(torch.float32)
    return model.to(torch.bfloat16).eval()


def generate(model, tokens, count):
    """Greedy: the same tokens always give the same answer."""
    ids, cache = torch.tensor([tokens], device=model.device), None
    for _ in range(count):
        with torch.inference_mode():
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        yield ids.item()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30

    def log_message(self, *_):
        pass

    def answer(self, status, body):
        data = json.dumps(body).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        if self.path == "/health":
            self.answer(200, {"ready": True})
        else:
            self.answer(404, {"error": "there is /health and /generate"})

    def request_body(self):
        """(tokens, count), or None where they make no sense."""
        try:
            length = int(self.headers.get("Content-Length", "0"))
            if not 0 < length <= MAX_BODY:
                return None
            body = json.loads(self.rfile.read(length))
            tokens, count = body["tokens"], body.get("max_new", 16)
            vocabulary = self.server.model.config.vocab_size
            if not tokens or not 0 < count <= MAX_NEW or not all(type(t) is int and 0 <= t < vocabulary for t in tokens):
                return None
            if len(tokens) + count > self.server.model.config.max_position_embeddings:
                return None
            return tokens, count
        except (ValueError, KeyError, TypeError):
            return None

    def do_POST(self):
        if self.path != "/generate":
            self.answer(404, {"error": "there is /health and /generate"})
            return
        request = self.request_body()
        if request is None:
            self.answer(400, {"error": 'send {"tokens": [1, 2, 3], "max_new": 16}'})
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("Connection", "close")
        self.end_headers()
        for token in generate(self.server.model, *request):
            self.chunk(json.dumps({"token": token}).encode() + b"\n")
        self.chunk(b"")

    def chunk(self, data):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()


class Server(socketserver.TCPServer):
    """One request at a time. Not http.server's own class: that one asks the name service who it is."""
    allow_reuse_address = True
    request_queue_size = 64


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--port", type=int, default=8000)
    p.add_argument("--shape", choices=SHAPES, default="1.5b")
    p.add_argument("--device", default="cuda")
    args = p.parse_args()
    model = load_model(args.shape, args.device)
    for _ in generate(model, [1, 2, 3], 2):  # whatever is only set up when it is first used
        pass
    with Server(("127.0.0.1", args.port), Handler) as server:
        server.model = model
        print(f"ready {server.server_address[1]}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
