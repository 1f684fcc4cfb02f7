"""Linear layers with int8 weights, for generation on a CPU.

Shapes   B rows · K input channels · N output channels, padded to J pieces of W
"""

import torch
from torch import Tensor, nn

MAX_WIDTH = 96  # sums that FBGEMM keeps in the registers of AVX2
MAX_ROWS = 8  # more rows at once are multiplied in float32


def quantize_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values (N, K) of a matrix and float32 scales (N,), so that w is about values * scales[:, None]."""
    scales = w.float().abs().amax(1).clamp(min=1e-30) / 127
    return (w.float() / scales[:, None]).round().to(torch.int8), scales


class Int8Linear(nn.Module):
    """x W^T + b with int8 weights, one scale a row of W; inputs, sums and outputs are in float32.

    One row is multiplied by FBGEMM's embedding_bag, which sums int8 rows of a table, each with a float32 weight: the
    table's rows are the columns of W, and their weights are x. PyTorch's int8 matrix products round x, and in a decode
    step of 10.7M parameters they are not clearly faster. Each bag makes W outputs, few enough for the registers.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        values, self.scales = quantize_rows(linear.weight.detach())
        self.bias = torch.zeros_like(self.scales) if linear.bias is None else linear.bias.detach().float()
        self.N, K = values.shape
        J = -(-self.N // MAX_WIDTH)
        W = -(-self.N // (8 * J)) * 8
        padded = torch.cat((values.short() + 128, values.new_zeros(J * W - self.N, K))).to(torch.uint8)
        scale_and_offset = torch.tensor([1.0, -128.0]).view(torch.uint8).expand(J, K, 8)  # FBGEMM's, of each row
        self.table = torch.cat((padded.view(J, W, K).transpose(1, 2), scale_and_offset), 2)  # (J, K, W + 8)
        self.bags = self.table.flatten(0, 1), torch.arange(J * K).int(), torch.arange(0, J * K, K).int()
        self.ones = torch.ones(J, 1)

    def row(self, x: Tensor) -> Tensor:
        """The outputs (1, N) of one row, x (1, K)."""
        weights = (self.ones * x).view(-1)  # x for each bag
        y = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(*self.bags, False, 0, False, weights, None, False)
        return torch.addcmul(self.bias, y.view(1, -1)[:, : self.N], self.scales)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.size(-1))
        if len(rows) == 1:
            y = self.row(rows)
        elif len(rows) <= MAX_ROWS:
            y = torch.cat([self.row(row) for row in rows.split(1)])
        else:
            y = rows @ (self.table[..., :-8].float() - 128)  # (J, B, W)
            y = torch.addcmul(self.bias, y.transpose(0, 1).flatten(1)[:, : self.N], self.scales)
        return y.view(*x.shape[:-1], self.N)


def to_int8(net: nn.Module) -> None:
    """Replace the linear layers of a net on a CPU, in place."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))
