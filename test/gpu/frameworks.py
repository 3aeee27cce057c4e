# SPDX-License-Identifier: MIT
"""What a PyTorch, CuPy or JAX program computes, printed: the same with and without the agent. Usage: frameworks.py WHAT"""
import os
import sys

os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"


def pytorch():
    import torch
    torch.manual_seed(1)
    a = torch.randint(-8, 8, (2048, 2048), device="cuda").float()
    b = a @ a.T
    streams = [torch.cuda.Stream() for _ in range(4)]
    parts = []
    torch.cuda.synchronize()
    for s in streams:
        with torch.cuda.stream(s):
            parts.append((b * 2).sum())
    torch.cuda.synchronize()
    x = torch.zeros(1024, device="cuda")
    g = torch.cuda.CUDAGraph()
    warm = torch.cuda.Stream()
    with torch.cuda.stream(warm):
        x.add_(1)
    torch.cuda.synchronize()
    with torch.cuda.graph(g):
        x.add_(1)
        y = x * 2
    for _ in range(10):
        g.replay()
    torch.cuda.synchronize()
    try:
        torch.empty(1 << 45, dtype=torch.uint8, device="cuda")
        oom = "no"
    except torch.OutOfMemoryError:
        oom = "yes"
    print([p.item() for p in parts], y.sum().item(), "out of memory:", oom, torch.cuda.get_device_name(),
          torch.cuda.memory_allocated(), torch.cuda.memory_reserved())
    held = torch.empty(300 << 20, dtype=torch.uint8, device="cuda").fill_(3)
    del held
    torch.cuda.empty_cache()
    print(torch.cuda.memory_reserved())


def expandable():
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    import torch
    xs = [torch.full((1 << 20, i + 1), float(i), device="cuda") for i in range(16)]
    print([x.sum().item() for x in xs], torch.cuda.memory_allocated(), torch.cuda.memory_reserved())
    del xs[::2]
    torch.cuda.empty_cache()
    print([x.sum().item() for x in xs], torch.cuda.memory_reserved())


def compiled():
    import torch
    torch._logging.set_logs(all=40)

    @torch.compile(mode="reduce-overhead")
    def f(x, w):
        return torch.relu(x @ w).mul(3).softmax(-1)
    torch.manual_seed(2)
    w = torch.randn(512, 512, device="cuda")
    for i in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        r = f(torch.full((256, 512), float(i), device="cuda"), w).sum().item()
    print(round(r, 2))


def cupy():
    import cupy as cp
    a = cp.arange(4_000_000, dtype=cp.int64).reshape(2000, 2000)
    k = cp.ElementwiseKernel("int64 x", "int64 y", "y = x * x % 1009", "square")
    print(int(k(a).sum()), int((a.T[::3] + a[:667]).sum()), cp.get_default_memory_pool().used_bytes())


def jax():
    import jax
    import jax.numpy as jnp
    f = jax.jit(lambda x: jnp.sum((x @ x.T) % 17))
    print(jax.devices()[0].platform, float(f(jnp.arange(1 << 20, dtype=jnp.float32).reshape(1024, 1024) % 31)))


globals()[sys.argv[1]]()
