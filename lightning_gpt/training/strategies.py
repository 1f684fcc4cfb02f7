"""Several devices as one: each takes its share of a batch, and holds the whole net or a part of it."""

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
    """Whether these settings of the Trainer mean more than one device on this machine, or machines."""
    if trainer.num_nodes > 1 or isinstance(trainer.devices, list) and len(trainer.devices) > 1:
        return True
    gpus = torch.cuda.device_count() if trainer.accelerator in ("auto", "gpu", "cuda") else 0
    devices = gpus if str(trainer.devices) in ("auto", "-1") else trainer.devices
    return str(devices).isdecimal() and int(devices) > 1 or "," in str(devices).rstrip(",")


class PeerLostError(Exception):
    """Another process of the run has ended or hangs, and none can go on alone."""


def is_peer_lost(error: Exception) -> bool:
    """Whether an error comes from talking to processes, one of which is gone."""
    return isinstance(error, dist.DistBackendError) or isinstance(error, RuntimeError) and "gloo" in str(error)


LAUNCHER_PID = "LIGHTNING_GPT_STARTER"  # the process that Lightning starts the others from, for them to know


def launcher_pid() -> int | None:
    """The process that started this one to be one of several; None if nobody did."""
    parent = STARTED[1] if STARTED[0] == os.getpid() else os.getppid()  # a fork has another one
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return parent  # torchrun's agent is none of the ranks, and tells nothing
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return None
    return int(os.environ.get(LAUNCHER_PID, parent))


def export_launcher_pid() -> None:
    """Tell the processes that Lightning will start from this one whose they are."""
    if launcher_pid() is None:
        os.environ[LAUNCHER_PID] = str(os.getpid())


def die_with_parent() -> None:
    """A process that Lightning or torchrun started ends when its starter is killed, and does not keep its GPU."""
    starter = launcher_pid()
    if sys.platform == "linux" and starter is not None:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != starter:  # it was killed before, while this process imported
            os.kill(os.getpid(), signal.SIGKILL)


def check_world_size(trainer: L.Trainer) -> None:
    """Raises ValueError if torchrun started more or fewer processes than the Trainer takes; each might train alone."""
    started, devices, nodes = int(os.environ.get("WORLD_SIZE", 1)), trainer.num_devices, trainer.num_nodes
    if "TORCHELASTIC_RUN_ID" in os.environ and started != devices * nodes:
        raise ValueError(
            f"torchrun started {started} process{'es' * (started > 1)}, but {devices} x {nodes} make up the run, which "
            "are trainer.devices and trainer.num_nodes: give torchrun the same --nproc_per_node and --nnodes"
        )


def check_launcher(trainer: L.Trainer) -> None:
    """Raises ValueError for a strategy whose processes are copies of this one and can't hand back what they did."""
    if method := start_method(trainer.strategy):
        raise ValueError(
            f"trainer.strategy starts its processes by {method} from inside this one, "
            "which leaves this one without the trained weights: take ddp_flat or ddp"
        )


def check_versions() -> None:
    """Raises ValueError in all processes if they do not run the same software."""
    python, us = platform.python_version(), __version__
    mine = f"Python {python}, torch {torch.__version__}, lightning {L.__version__}, lightning-gpt {us}"
    all_of_them: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(all_of_them, mine)
    for rank, theirs in enumerate(all_of_them):
        if theirs != all_of_them[0]:
            raise ValueError(
                f"the processes of this run have different software: rank 0 {all_of_them[0]}; rank {rank} {theirs}. "
                "Install the same on every machine"
            )


class DDPFlatStrategy(DDPStrategy):
    """Data parallel in one message a step: gradients are averaged at once, when all are there.

    DDP hides its many messages behind the backward pass, at the price of a wrapper that no CUDA graph records and that
    works in every micro-batch. Nets of this size are sent faster than they are hidden.
    """

    def setup_environment(self) -> None:
        die_with_parent()
        super().setup_environment()
        check_versions()

    def setup(self, trainer: L.Trainer) -> None:
        # Lightning asks all ranks in each step if one got a SIGTERM, and the GPU waits. StopOnSignal asks now and then
        skip_sigterm_broadcast(trainer)
        super().setup(trainer)

    def configure_ddp(self) -> None:
        """No wrapper; but all start from the weights of rank 0, whatever dice the others threw."""
        assert self.model is not None
        for tensor in self.model.state_dict().values():
            dist.broadcast(tensor, src=0)

    def all_reduce_mean(self, tensors: list[Tensor]) -> None:
        """Each tensor becomes its mean over all ranks, in place."""
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        means = (flat / self.world_size).split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [mean.view_as(tensor) for mean, tensor in zip(means, tensors, strict=True)])

    def teardown(self) -> None:
        if self.lightning_module is not None:  # NCCL waits at the end for each graph that holds a message of its own
            cast(Any, self.lightning_module).captured = None
        super().teardown()


def apply_fsdp(net: GPT, mesh: DeviceMesh) -> None:
    """Every device keeps a part of each weight and fetches a block's others when it is that block's turn.

    FSDP2, torch.distributed.fsdp.fully_shard; for nets that outgrow one device.
    """
    for block in net.h:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    # we call the net there too, and it has to fetch its weights first; the head's then stay for `logits`
    register_fsdp_forward_method(net, "features")


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor on this device, which may be sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class FSDP2Strategy(ModelParallelStrategy):
    """Every device keeps a part of each weight; checkpoints are whole ones, that any number of devices takes up.

    With accumulate_grad_batches, gradients are shared out after each batch, as whole ones might not fit.
    """

    def __init__(self, **how) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **how)

    def setup_environment(self) -> None:
        die_with_parent()
        set_data_parallel_size(self, self.num_nodes * self.num_processes)
        super().setup_environment()
        check_versions()

    def load_checkpoint(self, checkpoint_path, weights_only: bool | None = None) -> dict[str, Any]:
        saved, module = read_checkpoint(checkpoint_path), self.lightning_module
        assert module is not None
        options = StateDictOptions(full_state_dict=True)
        saved["state_dict"] = cast(Any, module).with_ema(saved["state_dict"])
        set_model_state_dict(module, saved["state_dict"], options=options)
        name_of = {p: name for name, p in module.named_parameters()}
        for optimizer, state in zip(self.optimizers, saved["optimizer_states"], strict=False):
            # parameters have numbers in the file, in the order of the groups, and names here
            names = iter([name_of[p] for group in optimizer.param_groups for p in group["params"]])
            named = {k: next(names) for group in state["param_groups"] for k in group["params"]}
            groups = [group | {"params": [named[k] for k in group["params"]]} for group in state["param_groups"]]
            by_name: dict[str, Any] = {
                "state": {named[k]: value for k, value in state["state"].items()},
                "param_groups": groups,
            }
            set_optimizer_state_dict(module, optimizer, by_name, options=options)
        return saved


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2: weights, gradients and optimizer in parts")
StrategyRegistry.register("ddp_flat", DDPFlatStrategy, description="data parallel, gradients averaged in one message")
