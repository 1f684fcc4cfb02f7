"""A whole step as one CUDA graph, so that the GPU never waits for Python."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class CapturedStep:
    """Calls `step()` as it is for `warm_up` times, then captures it once and replays the graph from there.

    A graph holds addresses, not values: the inputs of later steps are copied into those of the captured one, and what
    changes from step to step (a learning rate) must be a tensor. Dropout draws new masks in each replay, as PyTorch
    registers its generator with the graph. Python code in `step` runs in the first warm_up + 1 calls only.
    """

    def __init__(self, warm_up: int = 3):
        # compilation, autotuning and lazy initialization come first, on the stream that is captured later
        self.warm_up, self.calls, self.result = warm_up, 0, None
        self.graph, self.stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        self.inputs: tuple[Tensor, ...] = ()

    def __call__(self, step: Callable[[], Any], inputs: tuple[Tensor, ...]) -> Any:
        """Take the step on `inputs`, which `step` itself refers to and whose shapes never change.

        Returns:
            what `step` returned; from a replayed graph, what the captured call returned.
        """
        self.calls += 1
        if self.calls <= self.warm_up:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                result = step()
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        if self.calls == self.warm_up + 1:
            self.inputs = inputs
            # thread_local: a checkpoint may be written in another thread meanwhile
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.result = step()
        else:
            torch._foreach_copy_(list(self.inputs), list(inputs))
        self.graph.replay()
        return self.result
