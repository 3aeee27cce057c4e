#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""A client that measures examples/llm-server: when its first token is there, and which tokens follow.

usage: libhttp.py PORT [SECONDS]      prints the time from now to the first token, and the tokens
"""

import http.client
import json
import sys
import time

PROMPT = [(i * 7919) % 1000 for i in range(32)]


def generate(port, count=8, seconds=120, gone=lambda: False):
    """Asks until the server answers. Returns (time.monotonic() of the first token, tokens). gone(): true ends the waiting."""
    end = time.monotonic() + seconds
    body = json.dumps({"tokens": PROMPT, "max_new": count})
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=max(1.0, end - time.monotonic()))
        try:
            try:
                connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
                response = connection.getresponse()
            except (ConnectionError, http.client.RemoteDisconnected):
                if gone():
                    raise ConnectionError("the server ended before it answered") from None
                if time.monotonic() > end:
                    raise TimeoutError(f"no server at port {port} in {seconds} s") from None
                time.sleep(0.002)
                continue
            if response.status != 200:
                raise ConnectionError(f"the server answers {response.status}: {response.read(500)!r}")
            line, first, tokens = response.readline(), time.monotonic(), []
            while line:
                tokens.append(json.loads(line)["token"])
                line = response.readline()
            if len(tokens) != count:
                raise ConnectionError(f"{len(tokens)} tokens came, not {count}")
            return first, tokens
        finally:
            connection.close()


if __name__ == "__main__":
    start = time.monotonic()
    at, got = generate(int(sys.argv[1]), seconds=float(sys.argv[2]) if len(sys.argv) > 2 else 120)
    print(f"{at - start:.4f} s", *got)
