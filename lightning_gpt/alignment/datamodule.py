"""`PromptDataModule`: demonstrations, prompts with completions, as batches for supervised fine-tuning."""

import warnings
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Literal, cast

import lightning as L
import torch

from ..data.datamodule import TextDataModule
from ..data.tokenizers import TokenizerSettings, build_from_state
from ..errors import print_info
from .examples import RandomExamples, SequentialExamples, read_examples


class PromptDataModule(L.LightningDataModule):
    """JSON lines of prompts and completions; the loss is that of the completions.

    Args:
        corpus: a JSONL file; a line is {"prompt": ..., "completion": ...}, or {"messages": [{"role": ..., "content":
            ...}, ...]}, of which the assistant's contents are trained on.
        block_size: longest example, in tokens (its last token is a target only).
        batch_size: examples of one training batch over all devices together.
        split: fraction of the examples to train on; the last ones of the file validate.
        seed: decides the examples of batch k.
        vocabulary: of the tokenizer; comes from the checkpoint to start from.
        tokenizer: char, byte, bpe or gpt2; comes from the checkpoint to start from.
        on_unknown: what to do with characters without an id: error; drop; replace, by the vocabulary's token for them.
        vocab_size: vocabulary size; comes from the checkpoint to start from.
        template: the text of one message, with {role} and {content}.
    Raises:
        ValueError: a line is not an example; names file and line.
    """

    vocab_size: int  # read by the link from data to model
    fixed_shape = False  # batches are as long as their longest example

    def __init__(
        self,
        corpus: str | None = None,
        block_size: int = 256,
        batch_size: int = 32,
        split: float = 0.9,
        seed: int = 1337,
        vocabulary: str | None = None,
        tokenizer: Literal["char", "byte", "bpe", "gpt2"] | None = None,
        on_unknown: Literal["error", "drop", "replace"] = "error",
        vocab_size: int | None = None,
        template: str = "{role}:\n{content}\n\n",
    ):
        super().__init__()
        if corpus is None or not Path(corpus).is_file():
            found = "there is none" if corpus is None else f"{corpus} is not a file"
            raise ValueError(f"sft needs a file of JSON lines, and {found}: give --data.corpus FILE.jsonl")
        if not 0 < split < 1:
            raise ValueError(f"data.split={split} must be the fraction to train on, more than 0 and less than 1")
        if batch_size < 1:
            raise ValueError(f"data.batch_size={batch_size} must be at least 1")
        if (
            template.count("{role}") != 1
            or template.count("{content}") != 1
            or not template.index("{role}") < (template.index("{content}"))
        ):
            raise ValueError(f"data.template={template!r} must have {{role}} once and then {{content}} once")
        tokenizer = tokenizer or "char"
        if tokenizer in ("char", "bpe") and vocabulary is None:
            raise ValueError(
                f"data.tokenizer={tokenizer} has no vocabulary: start from a checkpoint, --model.init_from"
            )
        settings = TokenizerSettings(tokenizer, vocabulary, on_unknown, vocab_size)
        self.tokenizer = build_from_state(settings._asdict(), vocab_size)
        examples = read_examples(Path(corpus), self.tokenizer, block_size, template)
        n = int(split * len(examples))
        if not 0 < n < len(examples):
            raise ValueError(
                f"{corpus} has {len(examples)} examples, too few to train on and to validate with data.split={split}: "
                "give more"
            )
        self.train_examples, self.val_examples = examples[:n], examples[n:]
        self.train_tokens = self.text_tokens = torch.cat([example.ids for example in self.train_examples])
        self.val_tokens = torch.cat([example.ids for example in self.val_examples])
        vocabulary = "".join(self.tokenizer.vocabulary)
        vocab_size = self.vocab_size = len(self.tokenizer)
        self.save_hyperparameters()
        print_info(f"{n:,} examples to train on, {len(examples) - n:,} to validate, from {corpus}")

    def check_batch_size(self, devices: int) -> None:
        """Raises ValueError if the global batch can't be divided equally among the devices."""
        TextDataModule.check_batch_size(cast(TextDataModule, self), devices)

    def train_dataloader(self) -> RandomExamples:
        t, hp = self.trainer, self.hparams
        self.check_batch_size(t.world_size)
        warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")  # it resumes by batch number

        def numbers() -> Iterator[int]:
            return count(t.fit_loop.total_batch_idx + 1)

        return RandomExamples(self.train_examples, hp.batch_size, hp.seed, numbers, t.global_rank, t.world_size)

    def val_dataloader(self) -> SequentialExamples:
        t, hp = self.trainer, self.hparams
        return SequentialExamples(self.val_examples, max(1, hp.batch_size // t.world_size), t.global_rank, t.world_size)

    def test_dataloader(self) -> SequentialExamples:
        return self.val_dataloader()
