"""A whole optimizer step as one CUDA graph, so that the GPU never waits for Python. Torch only."""

from collections.abc import Callable

import torch
from torch import Tensor


class CapturedStep:
    """Calls `step()` as it is `warm_up` times, then records it once and replays the recording from there.

    The recording holds addresses, not values: inputs of later steps are copied into those of the recorded one, and
    what changes from step to step (a learning rate) has to be a tensor. Dropout's dice go on, as CUDA graphs keep the
    generator's state apart. Whatever `step` does in Python happens in these first calls only.
    """

    def __init__(self, warm_up: int = 3):
        self.warm_up = warm_up  # compiling, autotuning and lazy state come first, on the stream that is recorded later
        self.calls, self.graph, self.stream = 0, torch.cuda.CUDAGraph(), torch.cuda.Stream()
        self.inputs: tuple[Tensor, ...] = ()

    def __call__(self, step: Callable[[], object], inputs: tuple[Tensor, ...]) -> None:
        """Take the step on `inputs`, which `step` itself refers to, shapes the same every time."""
        self.calls += 1
        if self.calls <= self.warm_up:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                step()
            torch.cuda.current_stream().wait_stream(self.stream)
            return
        if self.calls == self.warm_up + 1:
            self.inputs = inputs
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):  # saves go on
                step()
        else:
            torch._foreach_copy_(list(self.inputs), list(inputs))
        self.graph.replay()
