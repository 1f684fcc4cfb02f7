"""The reward model: the trunk of a GPT with a scalar in place of the next token's logits."""

from torch import Tensor, nn

from .gpt import GPT, GPTConfig


class RewardModel(GPT):
    """Token ids in, one number per text out: how good the completion is.

    The last block's output gives a scalar at every position, and the reward is the mean over the completion's tokens.
    InstructGPT (Ouyang et al. 2022), section 3.5, takes the scalar at the last token instead; a mean also learns from
    rewards that are shares, as of the lines that are right.
    """

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        del self.lm_head
        self.reward_head = nn.Linear(config.n_embd, 1, bias=False)
        nn.init.zeros_(self.reward_head.weight)  # all rewards are 0, so that the first loss is ln 2

    def forward(self, idx: Tensor, completion: Tensor) -> Tensor:  # type: ignore[override]
        """The rewards (B,) of texts.

        Args:
            idx: token ids (B, T), padded at the end; T is at most block_size.
            completion: (B, T), True for the tokens after the prompt; at least one of each row.
        """
        scalars = self.reward_head(self.ln_f(self.features(idx))).squeeze(-1)  # (B, T)
        return (scalars * completion).sum(1) / completion.sum(1)
