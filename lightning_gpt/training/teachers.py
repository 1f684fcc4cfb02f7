"""The teachers of distillation: nets of other checkpoints, whose probabilities a student learns."""

from ..checkpoint.io import find_checkpoints
from ..data.tokenizers import Tokenizer
from ..inference.text import load_files
from ..model.ensemble import Net


def load_teacher(names: str, tokenizer: Tokenizer | None, block_size: int) -> tuple[Net, str]:
    """The net of a checkpoint, or the `Ensemble` of several, without gradients; and the list of their paths.

    Args:
        names: a comma-separated list of checkpoints, or a pattern.
        tokenizer: the student's, if there is one.
        block_size: the student's.
    Raises:
        ValueError: the teachers' vocabulary is another one, or their context is shorter.
    """
    paths = find_checkpoints(names)
    net, theirs = load_files(paths, "cpu", "float32")
    if tokenizer is not None and not theirs.has_ids_of(tokenizer):
        raise ValueError(
            f"the teachers {names} have another vocabulary than the data, {len(theirs)} tokens of {theirs.name} "
            f"instead of {len(tokenizer)} of {tokenizer.name}: a student needs that of its teachers"
        )
    if net.config.block_size < block_size:
        raise ValueError(
            f"the teachers' block_size={net.config.block_size} is less than model.block_size={block_size}: take at "
            "most theirs"
        )
    return net.eval().requires_grad_(False), ",".join(map(str, paths))
