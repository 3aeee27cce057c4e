#!/usr/bin/env python3
"""Bennu's hash, as plain as it can be: written from docs/image-format.md alone, it makes the test vectors.

    hash_reference.py             print the vectors (test/golden/hash_vectors.txt)
    hash_reference.py KEY FILE    print the hash of a file, KEY in hexadecimal
"""
import struct
import sys

M32 = (1 << 32) - 1
M64 = (1 << 64) - 1
CHUNK = 2 << 20


def quarter_round(x, a, b, c, d):
    for add, turn, bits in ((b, d, 16), (d, b, 12), (b, d, 8), (d, b, 7)):
        into = a if turn == d else c
        x[into] = (x[into] + x[add]) & M32
        v = x[turn] ^ x[into]
        x[turn] = (v << bits | v >> (32 - bits)) & M32


def chacha20_words(key, nonce, count):
    """The first `count` 32-bit words of ChaCha20's stream, 128-bit key, 64-bit counter and nonce."""
    k = struct.unpack("<4I", key)
    words, counter = [], 0
    while len(words) < count:
        start = [*struct.unpack("<4I", b"expand 16-byte k"), *k, *k,
                 counter & M32, counter >> 32, nonce & M32, nonce >> 32]
        x = list(start)
        for _ in range(10):
            for i in range(4):
                quarter_round(x, i, 4 + i, 8 + i, 12 + i)
            for i in range(4):
                quarter_round(x, i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
        words += [(a + b) & M32 for a, b in zip(x, start)]
        counter += 1
    return words[:count]


class Material:
    def __init__(self, key, level):
        self.words = chacha20_words(key, level, 37136 // 4)
        self.nh = self.words[0:1040]
        quads = [lo | hi << 32 for lo, hi in zip(self.words[1040:9248:2], self.words[1041:9248:2])]
        self.lanes, self.length, self.add = quads[0:4096], quads[4096:4100], quads[4100:4104]
        self.last = self.words[9248:9284]


def chunk_hash(material, data):
    """At most 2 MiB."""
    assert len(data) <= CHUNK
    padded = data + bytes(-len(data) % 512)
    words = struct.unpack("<%dI" % (len(padded) // 4), padded)
    rows = len(padded) // 512
    nh, out = material.nh, []
    for p in range(4):
        total = material.add[p] + material.length[p] * len(data)
        for lane in range(512):
            strip, column = divmod(lane, 32)
            value = 0
            for row in range(min(256, max(0, rows - 256 * strip))):
                m = ((strip * 256 + row) * 32 + column) * 4
                k = (row + p) * 4
                value += ((words[m] + nh[k]) & M32) * ((words[m + 1] + nh[k + 1]) & M32)
                value += ((words[m + 2] + nh[k + 2]) & M32) * ((words[m + 3] + nh[k + 3]) & M32)
            value &= M64
            total += material.lanes[p * 1024 + lane] * (value & M32)
            total += material.lanes[p * 1024 + 512 + lane] * (value >> 32)
        out.append((total & M64) >> 32)
    for i in range(8):
        for w in range(4):
            out[w] ^= material.last[4 * i + w]
        quarter_round(out, 0, 1, 2, 3)
    return struct.pack("<4I", *(v ^ k for v, k in zip(out, material.last[32:36])))


def long_hash(key, data):
    level = 0
    while True:
        material = Material(key, level)
        if len(data) <= CHUNK:
            return chunk_hash(material, data)
        data = b"".join(chunk_hash(material, data[i:i + CHUNK]) for i in range(0, len(data), CHUNK))
        level += 1


def pattern(name, length):
    if name == "zero":
        return bytes(length)
    if name == "ones":
        return b"\xff" * length
    if name == "count":  # byte i is the low byte of i + i/256
        return bytes((i + (i >> 8)) & 255 for i in range(length))
    assert name == "mix"  # splitmix64 from 0, little endian
    words, state = [], 0
    for _ in range(-(-length // 8)):
        state = (state + 0x9E3779B97F4A7C15) & M64
        z = state
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & M64
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & M64
        words.append(z ^ z >> 31)
    return struct.pack("<%dQ" % len(words), *words)[:length]


def self_check():
    """The published first block of ChaCha20's stream, 128-bit key and nonce of zeros."""
    stream = struct.pack("<4I", *chacha20_words(bytes(16), 0, 4))
    assert stream.hex() == "89670952608364fd00b2f90936f031c8", stream.hex()


def main():
    self_check()
    if len(sys.argv) == 3:
        with open(sys.argv[2], "rb") as f:
            print(long_hash(bytes.fromhex(sys.argv[1]), f.read()).hex())
        return
    keys = [bytes(16), bytes(range(16)), b"\xff" * 16]
    cases = [(k, "mix", n) for k in keys for n in (0, 1, 511, 512, 513, 4096, 131072, 131073, 300001)]
    cases += [(keys[1], name, n) for name in ("zero", "ones", "count") for n in (16, 65536)]
    cases += [(keys[1], name, CHUNK) for name in ("zero", "ones", "count", "mix")]
    cases += [(keys[0], "zero", CHUNK), (keys[2], "mix", CHUNK - 5), (keys[1], "mix", CHUNK + 1),
              (keys[1], "zero", 2 * CHUNK)]
    print("# key pattern length hash; written by hash_reference.py")
    for key, name, length in cases:
        print(key.hex(), name, length, long_hash(key, pattern(name, length)).hex())


main()
