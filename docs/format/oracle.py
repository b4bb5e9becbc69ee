#!/usr/bin/env python3
"""oracle.py IMAGE BLOCK_BYTES: prints the root digest of an image (docs/format/manifest.md). Needs: pip install blake3"""
import os, struct, sys
from blake3 import blake3

NODE, ROOT = "blockferry 2026-11-21 tree node v1", "blockferry 2026-11-21 tree root v1"

def root(path, block_bytes):
    with open(path, "rb") as image:
        digests = [blake3(block).digest() for block in iter(lambda: image.read(block_bytes), b"")]
    level = 0
    while level == 0 or len(digests) > 1:
        level += 1
        groups = [digests[i:i + 256] for i in range(0, len(digests), 256)] or [[]]
        digests = [blake3(bytes([level]) + b"".join(g), derive_key_context=NODE).digest() for g in groups]
    head = struct.pack("<IQQB", 1, os.path.getsize(path), block_bytes, level)
    return blake3(head + digests[0], derive_key_context=ROOT).hexdigest()

if __name__ == "__main__":
    print(root(sys.argv[1], int(sys.argv[2])))
