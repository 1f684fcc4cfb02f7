"""Training on several devices: the strategies ddp_flat and fsdp2, and checks of the processes that take part."""

import ctypes
import os
import platform
import signal
import sys
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, StrategyRegistry
from torch import Tensor
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from .. import STARTED, __version__
from ..checkpoint.io import read_checkpoint
from ..model.gpt import GPT
from .lightning_compat import set_data_parallel_size, skip_sigterm_broadcast, start_method


def uses_several_devices(trainer) -> bool:
    """Whether these settings of the Trainer mean more than one device or more than one machine."""
    if trainer.num_nodes > 1 or isinstance(trainer.devices, list) and len(trainer.devices) > 1:
        return True
    gpus = torch.cuda.device_count() if trainer.accelerator in ("auto", "gpu", "cuda") else 0
    devices = gpus if str(trainer.devices) in ("auto", "-1") else trainer.devices
    return str(devices).isdecimal() and int(devices) > 1 or "," in str(devices).rstrip(",")


class PeerLostError(Exception):
    """Another process of the run has ended or hangs, so this one cannot continue."""


def is_peer_lost(error: Exception) -> bool:
    """Whether an error comes from communication with a process that has ended."""
    return isinstance(error, dist.DistBackendError) or isinstance(error, RuntimeError) and "gloo" in str(error)


LAUNCHER_PID = "LIGHTNING_GPT_LAUNCHER_PID"  # environment variable: the process from which Lightning starts the others


def launcher_pid() -> int | None:
    """The process that launched this one as a rank of a run; None if none did."""
    parent = STARTED[1] if STARTED[0] == os.getpid() else os.getppid()  # in a fork, STARTED is that of its parent
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return parent  # torchrun's agent, which is not a rank and does not set LAUNCHER_PID
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return None
    return int(os.environ.get(LAUNCHER_PID, parent))


def export_launcher_pid() -> None:
    """Sets LAUNCHER_PID for the processes that Lightning starts from this one."""
    if launcher_pid() is None:
        os.environ[LAUNCHER_PID] = str(os.getpid())


def die_with_parent() -> None:
    """Ends a process that Lightning or torchrun launched when its launcher is killed, so that it frees its GPU."""
    launcher = launcher_pid()
    if sys.platform == "linux" and launcher is not None:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != launcher:  # it was killed earlier, during the imports of this process
            os.kill(os.getpid(), signal.SIGKILL)


def check_world_size(trainer: L.Trainer) -> None:
    """Raises ValueError if torchrun started another number of processes than the Trainer expects."""
    started, devices, nodes = int(os.environ.get("WORLD_SIZE", 1)), trainer.num_devices, trainer.num_nodes
    if "TORCHELASTIC_RUN_ID" in os.environ and started != devices * nodes:
        raise ValueError(
            f"torchrun started {started} process{'es' * (started > 1)}, but trainer.devices x "
            f"trainer.num_nodes is {devices} x {nodes}: give torchrun the same --nproc_per_node and --nnodes"
        )


def check_launcher(trainer: L.Trainer) -> None:
    """Raises ValueError for a strategy that forks or spawns its processes: their weights would not reach this one."""
    if method := start_method(trainer.strategy):
        raise ValueError(
            f"trainer.strategy starts its processes by {method}, "
            "which leaves this process without the trained weights: use ddp_flat or ddp"
        )


def check_versions() -> None:
    """Raises ValueError in all processes if their versions of Python, torch, lightning or lightning-gpt differ."""
    python, ours = platform.python_version(), __version__
    local = f"Python {python}, torch {torch.__version__}, lightning {L.__version__}, lightning-gpt {ours}"
    versions: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(versions, local)
    for rank, version in enumerate(versions):
        if version != versions[0]:
            raise ValueError(
                f"the processes of this run have different software: rank 0 {versions[0]}; rank {rank} {version}. "
                "Install the same versions on every machine"
            )


class DDPFlatStrategy(DDPStrategy):
    """Data parallel training that averages all gradients in one all-reduce per step, after the backward pass.

    DDP overlaps its messages with the backward pass, but needs a wrapper that cannot be captured in a CUDA graph and
    that runs in every micro-batch. For nets of this size one message is faster, see the README of training.
    """

    def setup_environment(self) -> None:
        die_with_parent()
        super().setup_environment()
        check_versions()

    def setup(self, trainer: L.Trainer) -> None:
        # Lightning asks all ranks in each step for a SIGTERM, and the GPU waits; StopOnSignal asks every EVERY steps
        skip_sigterm_broadcast(trainer)
        super().setup(trainer)

    def configure_ddp(self) -> None:
        """Broadcasts the weights of rank 0, so that all ranks start equal; no wrapper."""
        assert self.model is not None
        for tensor in self.model.state_dict().values():
            dist.broadcast(tensor, src=0)

    def all_reduce_mean(self, tensors: list[Tensor]) -> None:
        """Replaces each tensor by its mean over all ranks, in place."""
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        means = (flat / self.world_size).split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [mean.view_as(tensor) for mean, tensor in zip(means, tensors, strict=True)])

    def teardown(self) -> None:
        if self.lightning_module is not None:  # NCCL waits at the end for graphs that contain its messages
            cast(Any, self.lightning_module).captured = None
        super().teardown()


def apply_fsdp(net: GPT, mesh: DeviceMesh) -> None:
    """Shards each weight over the devices with FSDP2 (`fully_shard`), which gathers a block's weights when it runs."""
    for block in net.h:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    # gathers the weights for calls of `features` too; those of the head then stay gathered for `logits`
    register_fsdp_forward_method(net, "features")


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor on this device, gathered if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2: shards weights, gradients and optimizer state; checkpoints are full and load on any number of devices.

    With accumulate_grad_batches, gradients are reduced and sharded after each batch, as full ones might not fit.
    """

    def __init__(self, **kwargs) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **kwargs)

    def setup_environment(self) -> None:
        die_with_parent()
        set_data_parallel_size(self, self.num_nodes * self.num_processes)
        super().setup_environment()
        check_versions()

    def load_checkpoint(self, checkpoint_path, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint, module = read_checkpoint(checkpoint_path), self.lightning_module
        assert module is not None
        options = StateDictOptions(full_state_dict=True)
        checkpoint["state_dict"] = cast(Any, module).with_ema(checkpoint["state_dict"])
        set_model_state_dict(module, checkpoint["state_dict"], options=options)
        name_of = {p: name for name, p in module.named_parameters()}
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            # the file numbers the parameters in the order of the groups; set_optimizer_state_dict needs names
            names = iter([name_of[p] for group in optimizer.param_groups for p in group["params"]])
            named = {k: next(names) for group in state["param_groups"] for k in group["params"]}
            groups = [group | {"params": [named[k] for k in group["params"]]} for group in state["param_groups"]]
            by_name: dict[str, Any] = {
                "state": {named[k]: value for k, value in state["state"].items()},
                "param_groups": groups,
            }
            set_optimizer_state_dict(module, optimizer, by_name, options=options)
        return checkpoint


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2: shards weights, gradients and optimizer state")
StrategyRegistry.register("ddp_flat", DDPFlatStrategy, description="data parallel, one all-reduce per step")
