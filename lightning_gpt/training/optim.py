"""Parameter groups, Muon and learning-rate schedules."""

import math
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.optim.adamw import adamw

from ..model.gpt import parameter_role


def adamw_groups(net: nn.Module, learning_rate: float, betas: tuple[float, float], weight_decay: float) -> list[dict]:
    """Weight decay on matrices and embeddings; none on biases and norms."""
    params = list(net.parameters())
    settings = {"lr": learning_rate, "peak_lr": learning_rate, "betas": tuple(betas)}
    return [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay, **settings},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0, **settings},
    ]


def muon_groups(
    net: nn.Module, muon_lr: float, muon_decay: float, learning_rate: float, betas: tuple[float, float]
) -> list[dict]:
    """The blocks' matrices for Muon, c_attn as three (q, k, v); all other parameters for AdamW, without decay."""
    matrices = {name: p for name, p in net.named_parameters() if p.dim() == 2 and parameter_role(name).startswith("h.")}
    muon = {"muon": True, "lr": muon_lr, "peak_lr": muon_lr, "weight_decay": muon_decay}
    rest = [p for name, p in net.named_parameters() if name not in matrices]
    groups = [
        {"params": [p for name, p in matrices.items() if "c_attn" in name], "pieces": 3, **muon},
        {"params": [p for name, p in matrices.items() if "c_attn" not in name], "pieces": 1, **muon},
        {
            "params": rest,
            "muon": False,
            "lr": learning_rate,
            "peak_lr": learning_rate,
            "betas": tuple(betas),
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]


def orthogonalize(x: Tensor) -> Tensor:
    """Approximately U V^T of each matrix U S V^T in x (N, rows, columns): all singular values become 0.7 to 1.2.

    Five Newton-Schulz steps with the coefficients of Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon);
    in bfloat16 on a GPU.
    """
    wide = x.size(-2) <= x.size(-1)
    x = x if wide else x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    x = x.bfloat16() if x.is_cuda else x
    for _ in range(5):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return x if wide else x.mT


def orthogonalize_distributed(x: Tensor) -> Tensor:
    """`orthogonalize` of x (N, rows, columns), shared out: each rank computes N / world_size matrices."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    each = -(-len(x) // ranks)
    mine = x[rank * each : (rank + 1) * each]
    mine = orthogonalize(F.pad(mine, (0, 0, 0, 0, 0, each - len(mine)))).contiguous()  # zeros stay zeros
    new = mine.new_empty(ranks * each, *x.shape[1:])
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
    gather(new, mine)
    return new[: len(x)]


class Muon(torch.optim.Optimizer):
    """Muon for the groups with `muon: True`, AdamW for the others; torch.optim.Muon's update, but in batches.

    Matrices of one shape are orthogonalized in one batch, where torch.optim.Muon takes one after the other. A group's
    `pieces` is the number of matrices of equal height that each of its parameters is split into.

    Args:
        groups: from `muon_groups`.
        momentum: decay of the momentum buffer; Nesterov momentum.
        shared: ranks with equal gradients orthogonalize a part of the matrices each.
    """

    def __init__(self, groups: list[dict], momentum: float = 0.95, shared: bool = False):
        # with fused, load_state_dict keeps AdamW's step counters on the device, where the kernel reads them
        super().__init__(groups, {"momentum": momentum, "eps": 1e-8, "fused": True})
        self.orthogonalise = orthogonalize_distributed if shared else orthogonalize

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                (self._muon if group["muon"] else self._adamw)(group, params)
        return loss

    def _muon(self, group: dict, params: list[Tensor]) -> None:
        grads, lr = [p.grad for p in params if p.grad is not None], group["lr"]
        buffers = [self._state(p, "momentum_buffer") for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        updates = list(torch._foreach_lerp(grads, buffers, group["momentum"]))
        same_shape = defaultdict(list)
        for i, update in enumerate(updates):
            same_shape[update.shape].append(i)
        for (rows, columns), places in same_shape.items():
            matrices = torch.stack([updates[i] for i in places]).view(-1, rows // group["pieces"], columns)
            scale = math.sqrt(max(1, matrices.size(-2) / columns))  # torch's adjust_lr_fn="original"
            new = self.orthogonalise(matrices)
            new = (new.to(torch.promote_types(new.dtype, torch.float32)) * (-lr * scale)).reshape(-1, rows, columns)
            for i, update in zip(places, new.unbind(), strict=True):
                updates[i] = update.to(params[i].dtype)
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, updates)

    def _adamw(self, group: dict, params: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        for p in params:
            if "step" not in self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            [self._state(p, "exp_avg") for p in params],
            [self._state(p, "exp_avg_sq") for p in params],
            [],
            [self.state[p]["step"] for p in params],
            fused=params[0].device.type in ("cuda", "cpu"),
            capturable=params[0].is_cuda,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _state(self, p: Tensor, name: str) -> Tensor:
        if name not in self.state[p]:
            self.state[p][name] = torch.zeros_like(p)
        return self.state[p][name]


def lr_factor(step: int, total: float, warmup: int, schedule: str, floor: float, decay_fraction: float) -> float:
    """The learning rate at `step` (from 0) as a fraction of its peak: linear warm-up over `warmup` steps, then a decay
    to `floor`, reached at `total`.

    cosine and linear decay all the way; wsd (warm-up, stable, decay: Hu et al. 2024, MiniCPM, section 4) keeps the
    peak and decays linearly over the last `decay_fraction` of all steps.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)  # nanoGPT's: the first step already moves
    start = max(warmup, total * (1 - decay_fraction)) if schedule == "wsd" else warmup
    progress = min(1.0, max(0.0, (step - start) / max(1, total - start)))
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return floor + (1 - floor) * fall
