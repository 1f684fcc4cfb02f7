"""Initial weights from a checkpoint for fine-tuning on another text."""

from pathlib import Path

import torch
from torch import Tensor

from ..data.tokenizers import CharTokenizer, Tokenizer
from .io import find_checkpoint, load_net


def transfer_weights(
    path: str | Path, fresh: dict[str, Tensor], tokenizer: Tokenizer | None, frozen: bool = False
) -> dict[str, Tensor]:
    """The weights of a checkpoint (of the weight average, if it has one) for a net to be fine-tuned on another text.

    Characters that the checkpoint does not have keep their fresh embeddings. Position embeddings beyond the new net's
    block_size are dropped.

    Args:
        fresh: the new net's weights by name, whose shapes are required.
        tokenizer: the new text's; its vocabulary may extend the checkpoint's characters, and must otherwise be equal.
        frozen: whether the embeddings are frozen, so that no characters can be added.
    Raises:
        ValueError: a shape or the tokenizer differs; the message names both. OSError: the file can't be read.
    """
    net, old = load_net(find_checkpoint(path))
    weights, same_type = net.state_dict(), type(old) is type(tokenizer)
    if "reward_head.weight" in fresh:  # a reward model starts from a language model's trunk
        del weights["lm_head.weight"]
        weights["reward_head.weight"] = fresh["reward_head.weight"]
    vocabulary, new_vocabulary = old.vocabulary, () if tokenizer is None else tokenizer.vocabulary
    extends = isinstance(old, CharTokenizer) and same_type and "".join(new_vocabulary).startswith("".join(vocabulary))
    if tokenizer is not None and not extends and (not same_type or vocabulary != new_vocabulary):
        missing = "".join(set(vocabulary) - set(new_vocabulary))[:40] if isinstance(old, CharTokenizer) else ""
        raise ValueError(
            f"the checkpoint {path} has the {len(old)} tokens of its {type(old).__name__}, and the text has the "
            f"{len(tokenizer)} of a {type(tokenizer).__name__}{f', which lack {missing!r}' if missing else ''}: "
            "set data.tokenizer and data.vocabulary to the checkpoint's"
        )
    if extends and frozen and len(vocabulary) < len(new_vocabulary):
        raise ValueError(
            f"model.freeze_layers freezes the embeddings, but those of {new_vocabulary[len(vocabulary) :][:40]!r}, "
            f"which {path} does not have, are untrained: use --model.freeze_layers 0"
        )
    for name in {"wte.weight", "lm_head.weight"} & weights.keys():
        if extends and len(weights[name]) < len(fresh[name]) and weights[name].shape[1:] == fresh[name].shape[1:]:
            weights[name] = torch.cat((weights[name], fresh[name][len(weights[name]) :].to(weights[name])))
    if "wpe.weight" in weights and "wpe.weight" in fresh:
        weights["wpe.weight"] = weights["wpe.weight"][: len(fresh["wpe.weight"])]
    shapes, required = ({name: tuple(w.shape) for name, w in part.items()} for part in (weights, fresh))
    for name in sorted(shapes.keys() | required.keys()):
        if shapes.get(name) != required.get(name):
            raise ValueError(
                f"the weights of {path} do not fit this net: {name} is {shapes.get(name, 'missing')} in it and "
                f"{required.get(name, 'missing')} here; use the checkpoint's sizes"
            )
    return weights
