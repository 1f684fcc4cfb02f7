"""Group relative policy optimization: reinforcement learning on the policy's own texts."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import MetricCollection

from ..errors import print_info
from .datamodule import GRPODataModule
from .losses import clipped_policy_loss, group_advantages, kl_divergence, next_token_logprobs, of_tokens
from .policy import Policy


class Batch(NamedTuple):
    """Rollouts of all devices with their advantages; several optimizer steps take a part of it each."""

    ids: Tensor  # (B, T)
    completion: Tensor  # (B, T), bool
    logprobs: Tensor  # (B, T)
    advantages: Tensor  # (B,)


class GRPO(Policy):
    """Group relative policy optimization, Shao et al. 2024 (DeepSeekMath), section 4.1, equations 3 and 4.

    Each prompt gets a group of texts; a text's advantage is its reward relative to its group's. The loss of a text is
    divided by max_new_tokens, not by its own length, which would favour long bad texts (Liu et al. 2025, section 3).
    The KL divergence from the reference is that of the whole next-token distribution, and its gradient is taken at
    the positions of the texts, without what an earlier token changes for later ones. The ratio's denominator has
    the log-probabilities of the sampler, so it also corrects its rounding. val/loss is minus val/reward, so best.ckpt
    has the highest reward.

    Args:
        group_size: texts for each prompt.
        updates: optimizer steps for a batch of rollouts; each takes an equal part of it.
        clip: the ratio of a token's probability to that when it was drawn is clipped to 1 - clip ... 1 + clip.
    """

    stage = "grpo"

    def __init__(self, *, group_size: int = 8, updates: int = 1, clip: float = 0.2, **kwargs):
        super().__init__(**kwargs)
        self.save_hyperparameters("group_size", "updates", "clip")
        for name, value, least in ("group_size", group_size, 2), ("updates", updates, 1):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        if not 0 < clip < 1:
            raise ValueError(f"clip={clip} must be more than 0 and less than 1; 0.2 is usual")
        if self.hparams.reward is None:
            raise ValueError("grpo needs a reward: give --model.reward verse, a .ckpt or file.py:function")
        self.batch_of_rollouts: Batch | None = None
        self.rollout_metrics: dict[str, Tensor] = {}
        self.saved_rollouts: dict | None = None

    @property
    def grpo_data(self) -> GRPODataModule:
        return self.trainer.datamodule

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.data.hparams.val_texts < 1:
            raise ValueError("data.val_texts=0 leaves grpo without a validation: give at least 1")
        texts = self.data.hparams.batch_size * self.hparams.group_size
        if texts % (self.hparams.updates * self.trainer.world_size):
            raise ValueError(
                f"a batch has {texts} texts (data.batch_size x model.group_size), which model.updates="
                f"{self.hparams.updates} steps on {self.trainer.world_size} devices can't share equally: change one"
            )

    # --- rollouts -----------------------------------------------------------------------------------------------------

    def gather(self, part: Tensor) -> Tensor:
        """The rows of all ranks, of which rank r has those numbered r, r + world_size, ..."""
        if self.trainer.world_size == 1:
            return part
        return self.all_gather(part).transpose(0, 1).flatten(0, 1)  # type: ignore[union-attr]

    def new_batch(self, rollout: int) -> Batch:
        """Rollouts number `rollout`; every rank generates a part and gets them all."""
        t, size = self.trainer, self.hparams.group_size
        prompts = [prompt for prompt in self.grpo_data.prompts(rollout) for _ in range(size)]
        numbers = list(range(t.global_rank, len(prompts), t.world_size))
        mine = [prompts[number] for number in numbers]
        rollouts, texts = self.roll_out(self.net, mine, rollout, numbers)
        T = self.longest_prompt + self.hparams.max_new_tokens
        ids, completion, logprobs = (
            torch.nn.functional.pad(part, (0, T - part.size(1))) for part in rollouts
        )  # the same T on all ranks
        values = {"reward": self.reward(mine, texts), "known_words": self.known_words(texts)}  # type: ignore[misc]
        if self.gold_reward is not None:
            values["gold_reward"] = self.gold_reward(mine, texts)
        of_texts = {
            name: self.gather(torch.tensor(part, dtype=torch.float64, device=self.device).to(torch.float32))
            for name, part in values.items()
        }
        rewards = of_texts["reward"].double().view(-1, size)
        advantages = group_advantages(rewards).flatten().to(logprobs.dtype)
        batch = Batch(self.gather(ids), self.gather(completion), self.gather(logprobs), advantages)
        self.rollout_metrics = {name: part.mean() for name, part in of_texts.items()}
        self.rollout_metrics["length"] = batch.completion.sum(1).float().mean()
        self.rollout_metrics["equal_groups"] = (rewards.amax(1) == rewards.amin(1)).float().mean()
        return batch

    @property
    def longest_prompt(self) -> int:
        return max(len(self.data.tokenizer.encode(prompt)) for prompt in self.grpo_data.train_examples)

    # --- a training step ----------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.train_loss(int(batch))
        self.bad_losses += ~loss.detach().isfinite()
        return loss

    def train_loss(self, k: int) -> Tensor:  # type: ignore[override]
        """The loss of step k: a part of the rollouts number k // updates."""
        hp, t = self.hparams, self.trainer
        rollout, update = divmod(k, hp.updates)
        if update == 0 or self.batch_of_rollouts is None:
            self.batch_of_rollouts = self.new_batch(rollout)
            if not self.batch_of_rollouts.advantages.any() and t.is_global_zero:
                print_info(f"step {k + 1}: the texts of each prompt all have the same reward, which teaches nothing")
        n = len(self.batch_of_rollouts.ids) // hp.updates  # texts of this step, on all devices
        mine = slice(update * n + t.global_rank, (update + 1) * n, t.world_size)
        part = Batch(*(each[mine] for each in self.batch_of_rollouts))
        longest = int((part.completion.any(0)).nonzero().max()) + 1
        ids, mask = part.ids[:, :longest], part.completion[:, 1:longest]
        policy = next_token_logprobs(self.net, ids)
        with torch.no_grad():
            reference = next_token_logprobs(self.reference, ids)
        logprobs, old = of_tokens(policy, ids), part.logprobs[:, 1:longest]
        losses = clipped_policy_loss(logprobs, old, part.advantages, hp.clip)
        kl = kl_divergence(policy, reference)
        loss = ((losses + hp.beta * kl) * mask).sum() * t.world_size / (n * hp.max_new_tokens)
        self.step_metrics = self.rollout_metrics | self.describe(policy, logprobs.detach(), old, kl.detach(), mask)
        return loss + self.pretraining_loss(k)

    @torch.no_grad()
    def describe(self, policy: Tensor, logprobs: Tensor, old: Tensor, kl: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """KL in nats per text; entropy, clipped share and distance to the sampler's log-probabilities per token."""
        count, ratio = mask.sum(), (logprobs - old).exp()
        clipped = (ratio - 1).abs() > self.hparams.clip
        return {
            "kl": (kl * mask).sum(1).mean(),
            "entropy": -((policy.exp() * policy).sum(-1) * mask).sum() / count,
            "clipped": (clipped * mask).sum() / count,
            "sampler_gap": ((logprobs - old).abs() * mask).sum() / count,
        }

    def batch_tokens(self, batch: Any) -> int:
        return (
            self.data.hparams.batch_size
            * self.hparams.group_size
            * self.hparams.max_new_tokens
            // (self.hparams.updates * self.trainer.world_size)
        )

    # --- validate, save and resume ------------------------------------------------------------------------------------

    def measure_texts(self, metrics: MetricCollection, numbers: list[int]) -> dict[str, list[float]]:
        values = super().measure_texts(metrics, numbers)
        metrics["loss"].update(-sum(values["reward"]) / len(numbers), len(numbers))  # the best has the highest reward
        return values

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.batch_of_rollouts is not None and self.hparams.updates > 1:  # the policy that drew them is gone
            checkpoint["rollouts"] = self.batch_of_rollouts._asdict() | {"metrics": self.rollout_metrics}

    def on_load_checkpoint(self, saved: dict) -> None:
        super().on_load_checkpoint(saved)
        self.saved_rollouts = saved.get("rollouts")

    def on_train_start(self) -> None:
        super().on_train_start()
        if (saved := self.saved_rollouts) is not None:
            try:
                metrics, batch = saved["metrics"], Batch(*(saved[name] for name in Batch._fields))
                parts = self.hparams.updates * self.trainer.world_size
                valid = metrics_are_valid(metrics) and batch_is_valid(
                    batch, parts, self.hparams.block_size, self.data.vocab_size
                )
            except (KeyError, TypeError, AttributeError):
                valid = False
            if not valid:
                raise ValueError("the checkpoint's rollouts are damaged: start from its weights")
            self.rollout_metrics = {name: value.to(self.device) for name, value in metrics.items()}
            self.batch_of_rollouts = Batch(*(part.to(self.device) for part in batch))


def metrics_are_valid(metrics: dict[str, Tensor]) -> bool:
    """Whether the metrics of rollouts from a checkpoint are numbers with the names that `new_batch` gives."""
    return metrics.keys() <= {"reward", "gold_reward", "known_words", "length", "equal_groups"} and all(
        isinstance(value, Tensor) and value.is_floating_point() and not value.dim() for value in metrics.values()
    )


def batch_is_valid(batch: Batch, parts: int, block_size: int, vocab_size: int) -> bool:
    """Whether the tensors of a batch from a checkpoint fit together and can be shared by so many parts."""
    ids, completion, logprobs, advantages = batch
    shapes = completion.shape == logprobs.shape == ids.shape and advantages.shape == ids.shape[:1] and ids.dim() == 2
    types = ids.dtype == torch.int64 and completion.dtype == torch.bool
    numbers = all(part.is_floating_point() and part.isfinite().all() for part in (logprobs, advantages))
    if not (shapes and types and numbers and len(ids) and len(ids) % parts == 0 and 2 <= ids.size(1) <= block_size):
        return False
    return bool(0 <= ids.min() <= ids.max() < vocab_size and completion[:, 1:].any(1).all())
