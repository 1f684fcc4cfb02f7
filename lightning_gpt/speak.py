"""lightning-gpt generate: text from a checkpoint. Torch only, so that it speaks at once."""

import torch

from . import checkpoint
from .generation import stream
from .seeds import mix


def generate(
    ckpt_path: str = "best",
    prompt: str | None = None,
    max_new_tokens: int = 500,
    temperature: float = 0.8,
    top_k: int | None = None,
    num_samples: int = 1,
    seed: int = 1337,
    device: str = "auto",
) -> None:
    """Write text from a checkpoint, character by character as it comes.

    Args:
        ckpt_path: checkpoint to sample from; best or last is the newest file of that name below checkpoints/.
        prompt: the text to go on from; null is a new line, or the first character of a vocabulary without one.
        max_new_tokens: characters to write.
        temperature: below 1 safer, above 1 wilder; 0 takes the likeliest character.
        top_k: draw among the k likeliest characters only; null draws from all.
        num_samples: texts to write, each with dice of its own.
        seed: another seed gives another text, the same one the same text.
        device: auto, cpu, cuda, cuda:1, mps ...; auto takes the accelerator if there is one.
    """
    for name, value in {"max_new_tokens": max_new_tokens, "num_samples": num_samples}.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be 1 or more")
    if prompt == "":
        raise ValueError("the prompt is empty: give at least one character, such as a new line")
    if device == "auto":
        device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        dice = torch.Generator(device)
    except RuntimeError as error:
        raise ValueError(f"device={device} can't be used here: {str(error).splitlines()[0][:100]}") from None
    net, tokenizer = checkpoint.load(checkpoint.find(ckpt_path), device)
    if prompt is None:
        prompt = tokenizer.vocabulary[0] if tokenizer.unknown("\n") else "\n"
    idx = torch.as_tensor(tokenizer.encode(prompt), device=device)[None]
    for i in range(num_samples):
        if i:
            print("\n" + "-" * 40)
        print(tokenizer.decode(idx), end="", flush=True)
        dice.manual_seed(mix(seed, i))
        for token in stream(net, idx, max_new_tokens, temperature=temperature, top_k=top_k, generator=dice):
            print(tokenizer.decode(token), end="", flush=True)
    print()
