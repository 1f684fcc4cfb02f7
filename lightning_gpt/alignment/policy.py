"""What DPO and GRPO have in common: a policy beside its frozen start, and what a validation measures."""

from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric, MetricCollection

from ..data.windows import derive_seed
from ..model.gpt import GPT
from ..training.losses import next_token_loss
from ..training.module import LanguageModel
from .datamodule import PolicyDataModule, PromptBatch, TextBatch
from .losses import kl_divergence, next_token_logprobs
from .rewards import Reward, find_reward
from .rollouts import Rollouts, roll_out
from .stages import check_gpt, check_not_sharded
from .syllables import WORD

VALIDATION = -1  # in place of a rollout's number, in the seeds of the texts that validate
CHUNK = 2**16  # tokens of rollouts whose logits are computed at once in validation


class Policy(LanguageModel):
    """A language model that is trained to be preferred, beside its start as the frozen reference.

    A validation generates data.val_texts texts at temperature 1 and logs val/reward and val/gold_reward (means over
    texts), val/kl (nats per text, from the reference), val/entropy (nats per token), val/length (tokens),
    val/known_words (the share of generated words that occur in the training text), and val/lm_loss, the loss on the
    last tenth of data.text.

    Args:
        beta: weight of the KL divergence from the reference.
        reward: verse, the .ckpt of a reward model, or module:function or file.py:function; see rewards.py.
        gold_reward: what `reward` stands in for, only measured, in the same form.
        max_new_tokens: length of a generated text.
        stop: a string before which a generated text ends.
        pretraining_coef: weight of the loss on windows of data.text, which keeps the policy a language model: the
            pretraining mix of Ouyang et al. 2022, equation 2. 0 leaves it out.
    """

    reference: GPT

    def __init__(
        self,
        *,
        beta: float = 0.1,
        reward: str | None = None,
        gold_reward: str | None = None,
        max_new_tokens: int = 200,
        stop: str | None = None,
        pretraining_coef: float = 0.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.save_hyperparameters("beta", "reward", "gold_reward", "max_new_tokens", "stop", "pretraining_coef")
        for name, value in ("beta", beta), ("pretraining_coef", pretraining_coef):
            if not 0 <= value <= 1e6:
                raise ValueError(f"{name}={value} must be 0 or more, and at most 1e6")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
        if stop == "":
            raise ValueError("stop is an empty string, which would end every text immediately: leave it out")
        config = check_gpt(self).config
        if config.dropout or config.ngram_dropout and config.ngram_max > 1:
            raise ValueError(
                f"{self.stage} compares log-probabilities, which dropout would make random: set model.dropout and "
                "model.ngram_dropout to 0"
            )
        self.reference = deepcopy(self.net).requires_grad_(False)
        self.reward: Reward | None = None
        self.gold_reward: Reward | None = None

    @property
    def data(self) -> PolicyDataModule:
        return self.trainer.datamodule

    def setup(self, stage: str) -> None:
        super().setup(stage)
        check_not_sharded(self)
        if stage == "fit" and self.init_from:
            self.reference.load_state_dict(self.net.state_dict())
        longest = max((len(self.data.tokenizer.encode(prompt)) for prompt in self.data.val_prompts), default=0)
        block_size, new = self.hparams.block_size, self.hparams.max_new_tokens
        if self.data.hparams.val_texts and longest + new > block_size:
            raise ValueError(
                f"model.max_new_tokens={new} and a prompt of {longest} tokens do not fit into block_size={block_size}: "
                f"take {block_size - longest} new tokens or less"
            )
        device = self.trainer.strategy.root_device
        self.reward, self.gold_reward = (
            None if name is None else find_reward(name, device)
            for name in (self.hparams.reward, self.hparams.gold_reward)
        )

    def on_load_checkpoint(self, saved: dict) -> None:
        if not any(name.startswith("reference.") for name in saved["state_dict"]):
            raise ValueError(f"the checkpoint has no reference, as quantized ones don't: {self.stage} needs it")
        super().on_load_checkpoint(saved)

    def pretraining_loss(self, k: int) -> Tensor | float:
        """The weighted loss on the windows of batch k; 0 without `pretraining_coef`."""
        if not self.hparams.pretraining_coef:
            return 0.0
        x, y = (part.to(self.device) for part in self.data.windows(k))
        loss = next_token_loss(self.net, x, y)
        self.step_metrics["lm_loss"] = loss.detach()
        return self.hparams.pretraining_coef * loss

    def metrics_of_step(self, loss: Tensor, batch: Any) -> dict[str, Tensor]:
        return self.step_metrics

    # --- rollouts -----------------------------------------------------------------------------------------------------

    def roll_out(self, net: GPT, prompts: list[str], rollout: int, numbers: list[int]) -> tuple[Rollouts, list[str]]:
        """Texts from these prompts, each a function of (weights, seed, rollout, its number)."""
        seeds = [derive_seed(self.hparams.seed, rollout, number) for number in numbers]
        stop = [] if self.hparams.stop is None else [self.hparams.stop]
        return roll_out(net, self.data.tokenizer, prompts, seeds, self.hparams.max_new_tokens, stop)

    def known_words(self, texts: list[str]) -> list[float]:
        """For each text the share of its words that occur in the training text; the cut last word does not count."""
        found = [WORD.findall(text.lower())[:-1] for text in texts]
        return [sum(word in self.data.words for word in part) / max(1, len(part)) for part in found]

    # --- validation ---------------------------------------------------------------------------------------------------

    def validation_metrics(self) -> dict[str, Metric | MetricCollection]:
        names = ["loss", "lm_loss"]
        if self.data.hparams.val_texts:
            names += ["kl", "entropy", "length", "known_words"]
            names += [name for name in ("reward", "gold_reward") if self.hparams[name] is not None]
        return {name: MeanMetric() for name in names}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.measure(self.val_metrics, batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.measure(self.test_metrics, batch)

    def measure(self, metrics: MetricCollection, *batches: Any) -> None:
        (batch,) = batches
        if isinstance(batch, TextBatch) and batch.y.numel():
            metrics["lm_loss"].update(next_token_loss(self.eval_net, batch.x, batch.y), batch.y.numel())
        elif isinstance(batch, PromptBatch) and len(batch.numbers):
            self.measure_texts(metrics, batch.numbers.tolist())

    def measure_texts(self, metrics: MetricCollection, numbers: list[int]) -> dict[str, list[float]]:
        """Generates texts and adds what they are to the metrics; returns their rewards and KL."""
        prompts = [self.data.val_prompts[number % len(self.data.val_prompts)] for number in numbers]
        net = cast(GPT, self.eval_net)
        rollouts, texts = self.roll_out(net, prompts, VALIDATION, numbers)
        kl, entropy = self.divergence(net, rollouts)
        values = {"kl": kl.tolist(), "length": rollouts.completion.sum(1).tolist()}
        values["known_words"] = self.known_words(texts)
        for name, reward in ("reward", self.reward), ("gold_reward", self.gold_reward):
            if reward is not None:
                values[name] = reward(prompts, texts)
        for name, of_texts in values.items():
            metrics[name].update(torch.tensor(of_texts, dtype=torch.float64).mean().float(), len(of_texts))
        metrics["entropy"].update(entropy, int(rollouts.completion.sum()))
        self.log_texts(prompts, texts, values)
        return values

    def divergence(self, net: GPT, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """The KL divergence from the reference of each text (B,), and the mean entropy of a token, in nats."""
        kl, entropy = [], []
        for ids, completion in zip(
            *(x.split(max(1, CHUNK // rollouts.ids.size(1))) for x in rollouts[:2]), strict=True
        ):
            policy, reference = (next_token_logprobs(one, ids) for one in (net, self.reference))
            mask = completion[:, 1:]
            kl.append((kl_divergence(policy, reference) * mask).sum(1))
            entropy.append((-(policy.exp() * policy).sum(-1) * mask).sum())
        return torch.cat(kl), torch.stack(entropy).sum() / rollouts.completion.sum()

    def log_texts(self, prompts: list[str], texts: list[str], values: dict[str, list[float]]) -> None:
        """Logs the first of the texts that validate, with their rewards."""
        for logger in self.trainer.loggers if self.trainer.is_global_zero else []:
            if hasattr(logger.experiment, "add_text") and self.trainer.state.fn == "fit":
                lines = []
                for i in range(min(3, len(texts))):
                    of_text = ", ".join(f"{name} {part[i]:.3g}" for name, part in values.items())
                    text = (prompts[i] + texts[i]).replace("`", "'")
                    lines.append(f"{of_text}\n\n```\n{text}\n```")
                logger.experiment.add_text("rollouts", "\n\n".join(lines), self.trainer.global_step - 1)
