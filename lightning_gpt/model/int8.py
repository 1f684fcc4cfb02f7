"""Linear layers with int8 weights, for generation on a CPU; a C++ compiler builds their kernel, int8_linear.cpp.

Shapes   B rows · K input channels, padded to a multiple of 8 · N output channels, padded to J blocks of 64
"""

import ctypes
import os
import shlex
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import warn_once

SOURCE = Path(__file__).with_name("int8_linear.cpp")
WIDTH, DEPTH = 64, 8  # as in int8_linear.cpp
MAX_ROWS = 32  # more of x at once are faster in float32


@cache
def build_kernel() -> Any:
    """The function of int8_linear.cpp, compiled for this CPU in 0.2 s; None without a C++ compiler."""
    compiler, errors = shlex.split(os.environ.get("CXX", "c++")), []
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "int8_linear.so")
        for flags in (["-march=native", "-fopenmp"], []):  # some compilers have no OpenMP
            command = [*compiler, "-O3", *flags, "-shared", "-fPIC", str(SOURCE), "-o", str(library)]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True)
                function = ctypes.CDLL(str(library)).int8_linear
            except (OSError, subprocess.CalledProcessError) as error:
                errors.append(str(getattr(error, "stderr", None) or error).strip().split("\n")[0][:150])
            else:
                function.argtypes, function.restype = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 3, None
                return function
    warn_once(
        f"the kernel for int8 weights can't be compiled ({errors[0]}), so they are multiplied in float32, more slowly: "
        "install g++ or clang, or set CXX to a C++ compiler"
    )
    return None


def quantize_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values (N, K) of a matrix and float32 scales (N,), so that w is about values * scales[:, None]."""
    scales = w.float().abs().amax(1).clamp(min=1e-30) / 127
    return (w.float() / scales[:, None]).round().to(torch.int8), scales


class Int8Linear(nn.Module):
    """x W^T + b with int8 weights, one scale a row of W; inputs, sums and outputs are in float32.

    PyTorch's int8 matrix products round x, and its products in float32 read four times as many bytes.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        values, self.scales = quantize_rows(linear.weight.detach())
        self.bias = torch.zeros_like(self.scales) if linear.bias is None else linear.bias.detach().float()
        self.N, self.K = values.shape
        blocks = F.pad(values, (0, -self.K % DEPTH, 0, -self.N % WIDTH)).view(-1, WIDTH, self.K + -self.K % DEPTH)
        self.blocks = blocks.transpose(1, 2).contiguous()  # (J, K, WIDTH)
        build_kernel()  # now, not in the time of the first token

    def forward(self, x: Tensor) -> Tensor:
        B, K, kernel = x.numel() // self.K, self.blocks.size(1), build_kernel()
        if B > MAX_ROWS or kernel is None:
            return self.multiply_in_float32(x)
        x = (F.pad(x, (0, K - self.K)) if K > self.K else x).float().contiguous()
        y = x.new_empty(*x.shape[:-1], self.N)
        weights = self.blocks.data_ptr(), self.scales.data_ptr(), self.bias.data_ptr()
        kernel(*weights, x.data_ptr(), y.data_ptr(), B, K, self.N)
        return y

    def multiply_in_float32(self, x: Tensor) -> Tensor:
        weights = self.blocks.transpose(1, 2).flatten(0, 1)[: self.N, : self.K]
        return torch.addcmul(self.bias, x.float() @ weights.float().T, self.scales)


def to_int8(net: nn.Module) -> None:
    """Replace the linear layers of a net on a CPU, in place."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))
