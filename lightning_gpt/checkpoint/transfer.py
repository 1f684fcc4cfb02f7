"""The weights of a checkpoint for a run on another text: fine-tuning."""

from pathlib import Path

import torch
from torch import Tensor

from ..data.tokenizers import CharTokenizer, Tokenizer
from .io import find_checkpoint, load_net


def transfer_weights(
    path: str | Path, fresh: dict[str, Tensor], tokenizer: Tokenizer | None, frozen: bool = False
) -> dict[str, Tensor]:
    """The weights of a checkpoint, its average where it has one, for a net that another text is to fine-tune.

    Characters that the checkpoint does not know keep their fresh embeddings; positions beyond the last are left out.

    Args:
        fresh: the weights of the new net, which say what shapes are wanted.
        tokenizer: of the new text; it may know more characters, and be no other in anything else.
        frozen: the embeddings are not to be trained, so there can be no new ones.
    Raises:
        ValueError: a shape or the tokenizer differs; says both. OSError: the file can't be read.
    """
    net, old = load_net(find_checkpoint(path))
    weights, same_kind = net.state_dict(), type(old) is type(tokenizer)
    words, new_words = old.vocabulary, () if tokenizer is None else tokenizer.vocabulary
    longer = isinstance(old, CharTokenizer) and same_kind and "".join(new_words).startswith("".join(words))
    if tokenizer is not None and not longer and (not same_kind or words != new_words):
        unlike = f", which lack {''.join(set(words) - set(new_words))[:40]!r}" if isinstance(old, CharTokenizer) else ""
        raise ValueError(
            f"the checkpoint {path} has the {len(old)} tokens of its {type(old).__name__}, and the text has others, "
            f"the {len(tokenizer)} of a {type(tokenizer).__name__}{unlike}: give data.vocabulary and data.tokenizer as "
            "there"
        )
    if longer and frozen and len(words) < len(new_words):
        raise ValueError(
            f"model.freeze_layers freezes the embeddings, and the characters {new_words[len(words) :][:40]!r} that "
            f"{path} does not know have yet to learn theirs: take --model.freeze_layers 0"
        )
    for name in "wte.weight", "lm_head.weight":
        if longer and len(weights[name]) < len(fresh[name]) and weights[name].shape[1:] == fresh[name].shape[1:]:
            weights[name] = torch.cat((weights[name], fresh[name][len(weights[name]) :].to(weights[name])))
    if "wpe.weight" in weights and "wpe.weight" in fresh:
        weights["wpe.weight"] = weights["wpe.weight"][: len(fresh["wpe.weight"])]
    shapes, wanted = ({name: tuple(w.shape) for name, w in part.items()} for part in (weights, fresh))
    for name in sorted(shapes.keys() | wanted.keys()):
        if shapes.get(name) != wanted.get(name):
            raise ValueError(
                f"the weights of {path} do not fit: {name} is {shapes.get(name, 'not there')} in it and "
                f"{wanted.get(name, 'not there')} here; take the sizes that it has"
            )
    return weights
