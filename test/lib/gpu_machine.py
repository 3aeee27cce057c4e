"""For what runs on a machine with a GPU: its tests and benchmarks."""

import os
import pathlib
import subprocess


def tail(path, lines=30):
    """The end of a log, or why there is none."""
    try:
        text = pathlib.Path(path).read_text(errors="replace")
    except OSError as e:
        return f"({e})"
    return "\n".join(text.splitlines()[-lines:])


def find_driver():
    """The full path of the real libcuda.so.1, or None."""
    out = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
    paths = [line.split("=>")[1].strip() for line in out.splitlines() if "libcuda.so.1" in line and "x86-64" in line]
    folders = os.environ.get("LD_LIBRARY_PATH", "").split(":") + ["/usr/local/nvidia/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/lib64"]
    paths += [f"{folder}/libcuda.so.1" for folder in folders if folder]
    return next((p for p in paths if os.path.exists(p)), None)


def write_simulated_gpus(folder, machine, count):
    """What the kernel's driver would say of the GPUs of a simulated machine (BENNU_SIM_PROC): sim/device.c has their UUIDs."""
    name = 5381
    for c in machine.encode():
        name = (name * 33 + c) & 0xffffffff
    for gpu in range(count):
        uuid = (b"SIMGPU\0\0" + name.to_bytes(4, "little") + bytes([0, 0, 0x40, gpu])).hex()
        of_gpu = pathlib.Path(folder) / f"0000:{gpu:02x}:00.0"
        of_gpu.mkdir(parents=True)
        (of_gpu / "information").write_text(f"Model: \t\t Simulated GPU\nIRQ:   \t\t 1\nGPU UUID: \t GPU-{uuid[:8]}-{uuid[8:12]}-{uuid[12:16]}-"
                                            f"{uuid[16:20]}-{uuid[20:]}\nVideo BIOS: \t ?\n")
