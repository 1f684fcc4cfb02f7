"""frontier: best-of-n, the optimum, and runs beside them."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from lightning_gpt.alignment.frontier import (
    Series,
    best_of_n_kl,
    compare,
    draw,
    expected_maximum,
    find_optimum,
    read_series,
    rewards_of_texts,
)
from lightning_gpt.cli.main import main

START = Path(__file__).parents[1] / "lightning_gpt" / "inference" / "shakespeare.ckpt"


@pytest.fixture
def rewards():
    """Rewards of 4 prompts, 64 texts each, with ties."""
    return np.random.default_rng(0).normal(size=(4, 64)).round(1)


def write_run(folder, kl, reward, gold=None, dpo=False):
    """A run folder with these validations, at steps 10, 20, ..."""
    with SummaryWriter(str(folder)) as writer:
        for i in range(len(kl)):
            values = {"kl": kl[i], "reward": reward[i]} | ({} if gold is None else {"gold_reward": gold[i]})
            for name, value in (values | ({"margin": 0.0} if dpo else {})).items():
                writer.add_scalar(f"val/{name}", value, 10 * i + 9)
    return str(folder)


# --- best-of-n and the optimum ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(1, 8))
def test_the_expected_maximum_is_the_mean_over_all_subsets(n):
    groups = np.array([[3, 1, 4, 1, 5, 9, 2], [0, 0, 1, 1, 1, 0, 0.5]])  # with ties
    exact = [np.mean([max(subset) for subset in itertools.combinations(group, n)]) for group in groups.tolist()]
    assert expected_maximum(groups, n) == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize("n", [0, 8])
def test_best_of_more_than_there_are_is_refused(n):
    with pytest.raises(ValueError, match="at most 7"):
        expected_maximum(np.zeros((2, 7)), n)


@pytest.mark.parametrize("n", [1, 2, 8])
def test_the_kl_of_best_of_n_bounds_the_exact_one_and_is_near_without_ties(n):
    k = np.arange(1, 2001)
    p = (k / 2000) ** n - ((k - 1) / 2000) ** n  # that the k-th of 2,000 equally likely texts is the best
    exact = (p * np.log(p * 2000)).sum()
    assert exact <= best_of_n_kl(n) + 1e-9 and best_of_n_kl(n) == pytest.approx(exact, abs=1e-2)


def test_the_optimum_of_a_known_distribution_is_the_closed_form():
    beta, p, r = 0.5, np.array([0.5, 0.25, 0.125, 0.125]), np.array([0.0, 1, 2, 2.5])
    group = np.repeat(r, [32, 16, 8, 8])  # each text as often as it is likely
    policy = p * np.exp(r / beta) / (p * np.exp(r / beta)).sum()
    found = find_optimum(np.stack([group, group]), np.array([beta]))
    assert found.reward == pytest.approx([policy @ r]) and found.kl == pytest.approx([policy @ np.log(policy / p)])
    assert found.error == pytest.approx([0], abs=1e-12)  # the prompts are equal


def test_a_large_beta_leaves_the_reference_and_a_small_one_takes_the_best(rewards):
    rewards[:, :8] = 9  # enough of the best for the effective sample size
    found = find_optimum(rewards, np.array([1e9, 1e-3]))
    assert found.reward == pytest.approx([rewards.mean(), 9]) and found.kl == pytest.approx([0, math.log(64 / 8)])
    assert found.error[0] == pytest.approx(rewards.mean(1).std(ddof=1) / 2)


def test_no_other_weights_get_more_reward_at_the_same_kl(rewards):
    optimum = find_optimum(rewards, np.geomspace(1e4, 1e-2, 2000))
    generator, checked, nearest = np.random.default_rng(1), 0, math.inf
    for _ in range(3000):
        noise = generator.normal(size=rewards.shape) * generator.exponential(0.5)
        w = np.exp(rewards * generator.exponential(1.0) + noise)
        w /= w.sum(1, keepdims=True)
        kl, reward = (w * np.log(w * 64)).sum(1).mean(), (w * rewards).sum(1).mean()
        nearest = min(nearest, optimum.at(kl) - reward)  # beyond the curve the bound holds too
        checked += kl <= optimum.kl[-1]
    assert checked > 1000 and -1e-4 < nearest < 0.01


def test_the_curve_ends_where_few_samples_carry_the_weight(rewards):
    rewards = rewards + np.linspace(0, 1e-3, 64)  # no ties
    betas = np.geomspace(1e4, 1e-4, 400)
    found = find_optimum(rewards, betas)
    B = len(found.beta)
    w = [np.exp((rewards - rewards.max(1, keepdims=True)) / beta) for beta in betas[B - 1 : B + 1]]
    last, after = (1 / np.mean([(v**2).sum() / v.sum() ** 2 for v in weights]) for weights in w)
    assert 0 < B < 400 and last >= 5 > after
    assert (np.diff(found.kl) >= 0).all() and (np.diff(found.reward) >= 0).all()


def test_the_error_is_the_deviation_over_many_repetitions():
    generator, k, found, errors = np.random.default_rng(2), 0.5, [], []
    for _ in range(400):
        optimum = find_optimum(generator.normal(size=(8, 64)), np.geomspace(1e3, 0.1, 200))
        found.append(optimum.at(np.array(k)))
        errors.append(np.interp(k, optimum.kl, optimum.error))
    assert np.mean(errors) == pytest.approx(np.std(found), rel=0.15)


def test_the_bias_is_how_much_too_low_the_optimum_is_on_average():
    """Of standard normal rewards, the maximum of reward - beta * KL is 1 / (2 beta)."""
    beta, rewards = 2.0, np.random.default_rng(3).normal(size=(100_000, 64))
    found = find_optimum(rewards, np.array([beta]))
    assert found.bias == pytest.approx(1 / (2 * beta) - (found.reward - beta * found.kl), rel=0.3)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_versions_are_one_series_at_the_steps_they_share(tmp_path):
    runs = [
        write_run(tmp_path / "grpo" / "version_0", [1, 2, 3], [0.1, 0.2, 0.3]),
        write_run(tmp_path / "grpo" / "version_1", [2, 4], [0.3, 0.6]),
        write_run(tmp_path / "dpo" / "version_0", [5, 6], [0.5, 0.7], gold=[0.4, 0.3], dpo=True),
    ]
    grpo, dpo = read_series([*runs, runs[0]], "verse")  # the same folder twice is one version
    assert (grpo.name, dpo.name) == ("grpo", "dpo") and grpo.proxy is None
    assert grpo.kl.tolist() == [[1, 2], [2, 4]] and grpo.reward == pytest.approx(np.array([[0.1, 0.3], [0.2, 0.6]]))
    assert dpo.kl.tolist() == [[6]] and dpo.reward == pytest.approx(0.3) and dpo.proxy == pytest.approx(0.7)


def test_runs_without_the_curves_are_refused(tmp_path):
    with SummaryWriter(str(tmp_path / "fit" / "version_0")) as writer:
        writer.add_scalar("val/loss", 1.0, 1)
    with pytest.raises(ValueError, match="no val/kl and no val/reward"):
        read_series([str(tmp_path / "fit" / "version_0")], "verse")
    mixed = [
        write_run(tmp_path / "a" / "version_0", [1], [0.5]),
        write_run(tmp_path / "a" / "version_1", [1], [0.5], [0.5]),
    ]
    with pytest.raises(ValueError, match="only some versions of a"):
        read_series(mixed, "verse")


def test_a_run_of_another_reward_is_reported(tmp_path, capsys):
    folder = write_run(tmp_path / "a" / "version_0", [1], [0.5])
    Path(folder, "config.yaml").write_text("model:\n  reward: verse\n")
    read_series([folder], "verse")
    assert not capsys.readouterr().err
    read_series([folder], "rewards.py:rhyme")
    assert "measured verse" in capsys.readouterr().err


def test_only_what_is_clearly_above_the_optimum_is_called_so(rewards):
    optimum = find_optimum(rewards, np.geomspace(1e4, 1e-2, 400))
    kl, error, bias = (np.interp(0.5, optimum.kl, x) for x in (optimum.kl, optimum.error, optimum.bias))

    def row(above, kl=kl):
        kls = np.full((1, len(above)), kl)
        return compare([Series("a", kls, optimum.at(kls) + above, None)], optimum).split("\n")[1]

    below, over = 1.9 * error + bias, 2.1 * error + bias
    assert not row(np.array([below])).endswith("above the optimum")
    assert row(np.array([over])).endswith("above the optimum")
    apart = row(np.array([over - 1, over + 1]))
    assert "above" not in apart and apart.startswith("a, 2 seeds")
    assert "beyond" not in row(np.zeros(1)) and "beyond" in row(np.zeros(1), kl=50)


def test_the_right_picture_has_the_runs_with_a_gold_reward_in_the_colors_of_the_left(rewards):
    optimum = find_optimum(rewards, np.geomspace(1e4, 1e-2, 400))
    kl = np.array([[1.0, 1.2], [8, 9]])
    series = [Series("a", kl, kl / 9, None), Series("_b$", kl, kl / 10, 5 * kl)]
    left, right, proxies = draw(series, rewards, optimum, "verse").axes
    lines = {bar.get_label(): bar.lines[0] for ax in (left, right, proxies) for bar in ax.containers}
    runs = {label: line for label, line in lines.items() if "seeds" in label}
    assert list(runs) == [" a, 2 seeds", " _b$, 2 seeds", " _b$, 2 seeds: gold", " _b$, 2 seeds: proxy"]
    assert [line.get_color() for line in runs.values()] == ["C0", "C1", "C1", "C1"]
    assert runs[" _b$, 2 seeds: proxy"].get_xydata() == pytest.approx(np.array([[1.1, 5.5], [8.5, 42.5]]))
    best = next(line for label, line in lines.items() if "best of n" in label)
    assert best.get_ydata()[[0, -1]] == pytest.approx([rewards.mean(), rewards.max(1).mean()])
    assert len(draw(series[:1], rewards, optimum, "verse").axes) == 1


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path):
    return [
        write_run(tmp_path / "grpo" / "version_0", [0.1, 1, 9], [0.2, 0.4, 0.5]),
        write_run(tmp_path / "proxy" / "version_0", [0.1, 1], [0.2, 3.0], gold=[0.2, 0.9], dpo=True),
    ]


def length(prompts, completions):
    return [text.count("e") / 10 for text in completions]


def test_the_command_draws_and_prints_a_table(runs, tmp_path, capsys):
    picture = tmp_path / "frontier.svg"
    flags = ["--ckpt_path", str(START), "--texts", "24", "--group_size", "12", "--max_new_tokens", "20"]
    flags += ["--reward", f"{__file__}:length", "--device", "cpu", "--output", str(picture)]
    main(["frontier", *runs, *flags])
    table = capsys.readouterr().out
    header, grpo, proxy, *_ = table.split("\n")
    assert header.split() == ["series", "reward", "KL", "optimum", "difference"]
    assert grpo.split()[:4] == ["grpo", "0.500", "9.00", "beyond"]
    assert proxy.split()[:3] == ["proxy", "0.900", "1.00"]
    assert "from 24 texts of 2 prompts" in table
    assert picture.read_text().startswith("<?xml") and "</svg>" in picture.read_text()
    main(["frontier", *runs, *flags])
    assert capsys.readouterr().out == table


def test_the_texts_are_the_starts_and_depend_on_the_seed_and_not_on_their_batch(net, monkeypatch):
    from lightning_gpt.alignment import frontier
    from lightning_gpt.data.tokenizers import CharTokenizer

    tokenizer, seen = CharTokenizer("abcdefghijklmnopq"[: net.config.vocab_size]), []

    def reward(prompts, texts):
        seen.extend(zip(prompts, texts, strict=True))
        return [float(len(seen))] * len(texts)

    arguments = net.eval(), tokenizer, ["a", "b"], reward, 3, 4, 5, []
    rewards_of_texts(*arguments, 1)
    first, seen[:] = list(seen), []
    monkeypatch.setitem(frontier.TEXTS, "cpu", 5)
    rewards = rewards_of_texts(*arguments, 1)
    assert seen == first and rewards.tolist() == [[5, 5, 5, 5], [5, 10, 10, 10], [10, 10, 12, 12]]
    assert [len({prompt for prompt, _ in first[i : i + 4]}) for i in (0, 4, 8)] == [1, 1, 1]
    assert {prompt for prompt, _ in first} == {"a", "b"}
    seen.clear()
    rewards_of_texts(*arguments, 2)
    assert sorted(seen) != sorted(first)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--texts", "127"], "texts=127 must be at least 128"),
        (["--group_size", "9"], "group_size=9 must be at least 10"),
        (["--max_new_tokens", "0"], "max_new_tokens=0"),
        (["--output", "frontier.txt"], "must end in .svg"),
        (["--reward", "nonsense"], "give verse"),
        (["--reward", f"{__file__}:constant", "--texts", "20", "--group_size", "10"], "nothing can be gained"),
    ],
)
def test_what_cannot_be_drawn_is_refused(runs, fails, flags, message):
    start = ["--ckpt_path", str(START), "--device", "cpu"]
    start += [] if "--max_new_tokens" in flags else ["--max_new_tokens", "5"]
    assert message in fails("frontier", *runs, *start, *flags)


def constant(prompts, completions):
    return [1.0] * len(prompts)


def test_without_matplotlib_it_says_what_to_install(runs, fails, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.backend_bases", None)
    assert "frontier needs matplotlib" in fails("frontier", *runs, "--ckpt_path", START)
