"""What the stages train on, as LightningDataModules: demonstrations, pairs of completions, prompts."""

import warnings
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import lightning as L
import torch
from torch import Tensor

from ..data.datamodule import TextDataModule, load_corpus
from ..data.tokenizers import TokenizerSettings, build_from_state
from ..data.windows import RandomWindows, SequentialWindows, derive_seed
from ..errors import print_info
from .examples import (
    Batches,
    ShuffledExamples,
    collate,
    collate_pairs,
    headings,
    read_examples,
    read_pairs,
    read_prompts,
    sequential_batches,
)
from .syllables import WORD


class ExamplesDataModule(L.LightningDataModule):
    """What the data of all stages have in common: a file of JSON lines and the tokenizer of the start.

    Args:
        corpus: a JSONL file.
        block_size: longest example, in tokens.
        batch_size: examples of one training batch over all devices together.
        split: fraction of the examples to train on; the last ones of the file validate.
        seed: decides the examples of batch k.
        vocabulary: of the tokenizer; comes from the checkpoint to start from.
        tokenizer: char, byte, bpe or gpt2; comes from the checkpoint to start from.
        on_unknown: what to do with characters without an id: error; drop; replace, by the vocabulary's token for them.
        vocab_size: vocabulary size; comes from the checkpoint to start from.
    Raises:
        ValueError: a line is not an example; names file and line.
    """

    vocab_size: int  # read by the link from data to model
    fixed_shape = False  # batches are as long as their longest example
    train_examples: list
    val_examples: list

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
    ):
        super().__init__()
        if corpus is not None and not Path(corpus).is_file():
            raise ValueError(f"data.corpus={corpus} is not a file: give a file of JSON lines")
        if not 0 < split < 1:
            raise ValueError(f"data.split={split} must be the fraction to train on, more than 0 and less than 1")
        if batch_size < 1:
            raise ValueError(f"data.batch_size={batch_size} must be at least 1")
        tokenizer = tokenizer or "char"
        if tokenizer in ("char", "bpe") and vocabulary is None:
            raise ValueError(
                f"data.tokenizer={tokenizer} has no vocabulary: start from a checkpoint, --model.init_from"
            )
        self.settings = TokenizerSettings(tokenizer, vocabulary, on_unknown, vocab_size)
        self.tokenizer = build_from_state(self.settings._asdict(), vocab_size)
        self.vocab_size = len(self.tokenizer)
        self.save_hyperparameters()
        # every checkpoint has to describe the tokenizer
        self.save_hyperparameters(
            {
                "vocabulary": "".join(self.tokenizer.vocabulary),
                "tokenizer": tokenizer,
                "vocab_size": self.vocab_size,
            }
        )

    def corpus_file(self, command: str) -> Path:
        if self.hparams.corpus is None:
            raise ValueError(f"{command} needs a file of JSON lines, and there is none: give --data.corpus FILE.jsonl")
        return Path(self.hparams.corpus)

    def split_examples(self, examples: list, kind: str) -> None:
        n = int(self.hparams.split * len(examples))
        if not 0 < n < len(examples):
            raise ValueError(
                f"there are {len(examples)} {kind}, too few to train on and to validate with "
                f"data.split={self.hparams.split}: give more"
            )
        self.train_examples, self.val_examples = examples[:n], examples[n:]
        source = "" if self.hparams.corpus is None else f", from {self.hparams.corpus}"
        print_info(f"{n:,} {kind} to train on, {len(examples) - n:,} to validate{source}")

    def check_batch_size(self, devices: int) -> None:
        """Raises ValueError if the global batch can't be divided equally among the devices."""
        TextDataModule.check_batch_size(cast(TextDataModule, self), devices)

    def batch_numbers(self) -> Iterator[int]:
        """The numbers of the remaining batches."""
        return count(self.trainer.fit_loop.total_batch_idx + 1)

    def shuffled(self, collate) -> ShuffledExamples:
        t, hp = self.trainer, self.hparams
        self.check_batch_size(t.world_size)
        warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")  # it resumes by batch number
        numbers, share = self.batch_numbers, (t.global_rank, t.world_size)
        return ShuffledExamples(self.train_examples, hp.batch_size, hp.seed, collate, numbers, *share)

    def sequential(self, collate) -> Batches:
        t = self.trainer
        per_rank = max(1, self.hparams.batch_size // t.world_size)
        return sequential_batches(self.val_examples, per_rank, collate, t.global_rank, t.world_size)

    def test_dataloader(self) -> Any:
        return self.val_dataloader()


class PromptDataModule(ExamplesDataModule):
    """Demonstrations, prompts with completions; the loss is that of the completions.

    A line of the corpus is {"prompt": ..., "completion": ...}, or {"messages": [{"role": ..., "content": ...}, ...]},
    of which the assistant's contents are trained on. An example may have block_size + 1 tokens: the last is a target
    only.

    Args:
        template: the text of one message, with {role} and {content}.
    Raises:
        ValueError: a line is not an example; names file and line.
    """

    def __init__(self, template: str = "{role}:\n{content}\n\n", **kwargs):
        super().__init__(**kwargs)
        self.save_hyperparameters("template")
        if (
            template.count("{role}") != 1
            or template.count("{content}") != 1
            or not template.index("{role}") < (template.index("{content}"))
        ):
            raise ValueError(f"data.template={template!r} must have {{role}} once and then {{content}} once")
        file = self.corpus_file("sft")
        self.split_examples(read_examples(file, self.tokenizer, self.hparams.block_size, template), "examples")
        self.train_tokens = self.text_tokens = torch.cat([example.ids for example in self.train_examples])
        self.val_tokens = torch.cat([example.ids for example in self.val_examples])

    def train_dataloader(self) -> ShuffledExamples:
        return self.shuffled(collate)

    def val_dataloader(self) -> Batches:
        return self.sequential(collate)


class PreferenceDataModule(ExamplesDataModule):
    """Pairs of completions, of which the chosen one is better; a line is {"prompt", "chosen", "rejected"}.

    Pairs of one prompt should stand together in the file, so that the pairs that validate have other prompts.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.split_examples(read_pairs(self.corpus_file("reward"), self.tokenizer, self.hparams.block_size), "pairs")
        self.train_tokens = self.text_tokens = torch.cat([pair.chosen.ids for pair in self.train_examples])
        self.val_tokens = torch.cat([pair.chosen.ids for pair in self.val_examples])

    def train_dataloader(self) -> ShuffledExamples:
        return self.shuffled(collate_pairs)

    def val_dataloader(self) -> Batches:
        return self.sequential(collate_pairs)


class TextBatch(NamedTuple):
    """Windows of the text, to validate on."""

    x: Tensor  # (B, T)
    y: Tensor  # (B, T)


class PromptBatch(NamedTuple):
    """The numbers of texts to generate, each from prompt number % len(prompts)."""

    numbers: Tensor  # (B,)


class BatchNumbers:
    """Batches that hold nothing but their number: GRPO makes its own."""

    def __init__(self, numbers):
        self.numbers = numbers

    def __iter__(self) -> Iterator[Tensor]:
        return map(torch.tensor, self.numbers())


class PolicyDataModule(ExamplesDataModule):
    """What the data of DPO and GRPO have in common: prompts to generate from, and a text that the policy should still
    predict.

    Args:
        text: a text as for `fit --data.corpus`; null is Tiny Shakespeare. val/lm_loss is the loss on its last tenth.
        text_batch_size: windows of it in a batch, if model.pretraining_coef is not 0.
        val_texts: texts to generate at each validation, over all devices together.
    """

    def __init__(self, text: str | None = None, text_batch_size: int = 32, val_texts: int = 256, **kwargs):
        super().__init__(**kwargs)
        self.save_hyperparameters("text", "text_batch_size", "val_texts")
        for name, value, least in ("text_batch_size", text_batch_size, 1), ("val_texts", val_texts, 0):
            if value < least:
                raise ValueError(f"data.{name}={value} must be at least {least}")
        loaded = load_corpus(text, (0.9, 1.0), 0, 0, self.settings)
        self.train_tokens, self.val_tokens, self.text_tokens = loaded[1:4]
        block_size = self.hparams.block_size
        if min(len(self.train_tokens), len(self.val_tokens)) <= block_size:
            raise ValueError(f"data.text={text} has too few tokens for block_size={block_size}: give a longer text")
        self.train_text = RandomWindows(self.train_tokens, block_size, text_batch_size, self.hparams.seed)
        self.words = set(WORD.findall(self.tokenizer.decode(self.text_tokens).lower()))
        self.val_prompts: list[str] = []

    def windows(self, k: int) -> tuple[Tensor, Tensor]:
        """This rank's share of the windows of batch k, as inputs and targets (B, T)."""
        source, t = self.train_text, self.trainer
        source.rank, source.world_size = t.global_rank, t.world_size
        window = source.batch(k).long()
        return window[:, :-1], window[:, 1:]

    def policy_batches(self) -> Batches:
        """The windows of the validation text, then the numbers of the texts to generate; all ranks have as many."""
        t, hp = self.trainer, self.hparams
        # 16 K tokens at once: validation needs no gradients
        per_rank = max(1, 2**14 // hp.block_size)
        found = SequentialWindows(self.val_tokens, hp.block_size, per_rank, t.global_rank, t.world_size)
        texts = [TextBatch(window[:, :-1].long(), window[:, 1:].long()) for window in found]
        return Batches([*texts, PromptBatch(torch.arange(t.global_rank, hp.val_texts, t.world_size))])


class DPODataModule(PolicyDataModule):
    """Pairs of completions as for a reward model; the policy is validated on the prompts of the last ones."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.split_examples(read_pairs(self.corpus_file("dpo"), self.tokenizer, self.hparams.block_size), "pairs")
        prompts = (pair.chosen.ids[~pair.chosen.trained] for pair in self.val_examples)
        self.val_prompts = list(dict.fromkeys(self.tokenizer.decode(ids) for ids in prompts))

    def train_dataloader(self) -> ShuffledExamples:
        return self.shuffled(collate_pairs)

    def val_dataloader(self) -> Batches:
        return self.sequential(collate_pairs) + self.policy_batches()


class GRPODataModule(PolicyDataModule):
    """Prompts to continue, of which the last ones of the file validate.

    A line of the corpus is {"prompt": ...}; other keys are ignored, so files of demonstrations and of pairs will do.
    Without a corpus, the prompts are the headings of the text: lines such as KING RICHARD: that name who speaks.

    Args:
        batch_size: prompts of one batch of rollouts, over all devices together.
    """

    def __init__(self, batch_size: int = 32, **kwargs):
        super().__init__(batch_size=batch_size, **kwargs)
        if self.hparams.corpus is not None:
            prompts = read_prompts(self.corpus_file("grpo"), self.tokenizer, self.hparams.block_size - 1)
        else:
            text = self.tokenizer.decode(torch.cat((self.text_tokens, self.val_tokens)))
            prompts = headings(text)
            if not prompts:
                raise ValueError("data.text has no headings to take as prompts: give --data.corpus FILE.jsonl")
        self.split_examples(prompts, "prompts")
        self.val_prompts = self.val_examples

    def prompts(self, rollout: int) -> list[str]:
        """The prompts of a batch of rollouts, a pure function of (seed, rollout); each comes once in an epoch."""
        n, size = len(self.train_examples), self.hparams.batch_size
        positions = range(rollout * size, (rollout + 1) * size)
        orders = {
            epoch: torch.randperm(n, generator=torch.Generator().manual_seed(derive_seed(self.hparams.seed, epoch)))
            for epoch in {position // n for position in positions}
        }
        return [self.train_examples[orders[position // n][position % n]] for position in positions]

    def train_dataloader(self) -> BatchNumbers:
        self.check_batch_size(self.trainer.world_size)
        warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")  # it resumes by batch number
        return BatchNumbers(self.batch_numbers)

    def val_dataloader(self) -> Batches:
        return self.policy_batches()
