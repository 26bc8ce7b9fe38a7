"""Metal, CUDA or CPU: what MLX computes on here, in which type, and with how much memory.

On a Linux CPU the mlx wheel carries a reference BLAS that is tens of times slower than the machine.
An OpenBLAS loaded with global symbols before `mlx.core` takes its place; `put_blas_under_mlx` does
that, and `import brie_mlx` calls it. Nothing here imports mlx before a function is called.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.core as mx

_LIBRARIES = ("libopenblas.so.0", "libopenblas.so", "libopenblasp.so.0")
_HOW_TO_INSTALL = "apt-get install libopenblas0-pthread (Debian, Ubuntu) or dnf install openblas-threads (Fedora)"
_blas: tuple[str, ctypes.CDLL] | None = None


def put_blas_under_mlx() -> None:
    """On Linux, load the system's OpenBLAS ahead of MLX; do nothing where there is none.

    Harmless on CUDA machines, where only stray CPU work uses it. Too late, and so skipped, in a
    process that has imported mlx already.
    """
    global _blas
    if sys.platform != "linux" or "mlx.core" in sys.modules:
        return
    kernel = _openblas_kernel()
    if kernel:
        os.environ.setdefault("OPENBLAS_CORETYPE", kernel)
    for name in _LIBRARIES:
        try:
            _blas = name, ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return


def _openblas_kernel() -> str | None:
    """Name the kernel for this processor: older OpenBLAS takes new Intel chips for a Prescott."""
    if platform.machine() != "x86_64":
        return None
    try:
        flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    except OSError:
        return None
    return "SKYLAKEX" if "avx512f" in flags else "HASWELL" if "avx2" in flags else None


def cores() -> int:
    """Return the processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@contextlib.contextmanager
def blas_threads(number: int) -> Iterator[None]:
    """Let the BLAS under MLX use this many threads a product, and as many as there are cores again afterwards."""
    set_threads = getattr(_blas[1], "openblas_set_num_threads", None) if _blas else None
    if set_threads is None:
        yield
        return
    set_threads(number)
    try:
        yield
    finally:
        set_threads(cores())


def is_cpu() -> bool:
    """Tell whether MLX computes on the CPU here."""
    import mlx.core as mx

    return mx.default_device().type == mx.DeviceType.cpu


def describe() -> str:
    """Return one line: the device, and on a CPU the BLAS under MLX or what to install."""
    import mlx.core as mx

    name = str(mx.device_info().get("device_name", platform.machine()))
    if not is_cpu():
        kind = "Metal" if mx.metal.is_available() else "CUDA"
        return f"{kind}: {name}, {memory_bytes() / 2**30:.0f} GB"
    if sys.platform != "linux":
        return f"CPU: {name}"
    if _blas:
        kernel = os.environ.get("OPENBLAS_CORETYPE", "its own choice of kernel")
        return f"CPU: {name}, float32 through {_blas[0]} ({kernel})"
    why = "mlx was imported before brie_mlx" if "mlx.core" in sys.modules and _loadable() else _HOW_TO_INSTALL
    return f"CPU: {name}, MLX's own slow BLAS; for tens of times the speed: {why}"


def _loadable() -> bool:
    import ctypes.util

    return ctypes.util.find_library("openblas") is not None


def memory_bytes() -> int:
    """Return the memory that MLX can use here: the machine's, or the CUDA card's."""
    import mlx.core as mx

    reported = 0 if is_cpu() else int(mx.device_info().get("memory_size", 0))
    return reported or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def compute_type(asked: str, own: mx.Dtype) -> mx.Dtype:
    """Return the type for the base's weights: `asked`, or for "auto" their own, float32 on a CPU."""
    import mlx.core as mx

    if asked == "auto":
        return mx.float32 if is_cpu() else own
    return {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}[asked]
