"""The stages after pre-training, run from the command line: reward, dpo, grpo and preferences."""

import json
import os
import random
import re
import shutil

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_gpt.checkpoint.io import read_checkpoint, write_checkpoint
from lightning_gpt.cli.main import main

CPU = ["--trainer.accelerator=cpu", "--trainer.devices=1"]
NEW = 6  # tokens of a generated text; the tiny net has a context of 16
WORDS = "cat mat sat who for quiz long years jumbo the on a".split()


def slow(*values):
    """Values of a parametrized test that is slow."""
    return pytest.param(*values, marks=pytest.mark.slow)


REWARDS = """
def share(prompts, completions):
    return [text.count("a") / 6 for text in completions]

def equal(prompts, completions):
    return [0.5] * len(completions)

def fails(prompts, completions):
    raise KeyError("no such\\nword")

def nan(prompts, completions):
    return [float("nan")] * len(completions)

def short(prompts, completions):
    return [1.0] * (len(completions) - 1)

number = 3
"""


def write(path, lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def random_pairs(count, swap=0.0):
    """Pairs of which the chosen text has an a where the rejected one has an o; the share `swap` is the other way."""
    rng, pairs = random.Random(7), []
    for _ in range(count):
        texts = ["".join(rng.choice(letters) for _ in range(4)) for letters in ("aamt", "oowh")]
        if rng.random() < swap:
            texts.reverse()
        pairs.append({"prompt": rng.choice(WORDS) + " ", "chosen": texts[0], "rejected": texts[1]})
    return pairs


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder with pairs.jsonl, shuffled.jsonl, prompts.jsonl and rewards.py."""
    folder = tmp_path_factory.mktemp("files")
    write(folder / "pairs.jsonl", random_pairs(300))
    write(folder / "shuffled.jsonl", random_pairs(300, swap=0.5))
    write(folder / "prompts.jsonl", [{"prompt": f"{word} "} for word in WORDS])
    (folder / "rewards.py").write_text(REWARDS)
    return folder


@pytest.fixture
def arguments(ckpt, text_file, files):
    """The command line of a stage, without steps and folder."""

    def arguments(name, *args):
        corpus = files / ("prompts.jsonl" if name == "grpo" else "pairs.jsonl")
        line = [name, *CPU, f"--model.init_from={ckpt}", f"--data.corpus={corpus}", "--sample.length=8"]
        line += ["--trainer.val_check_interval=2", "--data.batch_size=8", "--model.warmup_steps=0"]
        if name in ("dpo", "grpo"):
            line += [f"--data.text={text_file}", f"--model.max_new_tokens={NEW}", "--data.val_texts=24"]
            line += [f"--model.reward={files / 'rewards.py'}:share", "--data.text_batch_size=4"]
        return [*line, *args]

    return arguments


@pytest.fixture
def refused(capsys):
    """Run a command line that must fail, and return its error message, one line after what it tells before."""

    def refused(*args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in args])
        assert stop.value.code == 2
        *before, error = capsys.readouterr().err.strip().split("\n")
        assert all(line.startswith("lightning-gpt: ") and "error" not in line for line in before)
        assert error.startswith("lightning-gpt: error: ")
        return error

    return refused


def steps(root, count=2):
    return f"--trainer.default_root_dir={root}", f"--trainer.max_steps={count}"


def last(root):
    (found,) = root.glob("*/version_0/checkpoints/last.ckpt")
    return found


@pytest.fixture
def stage(arguments):
    """Runs a stage in a folder, from the tiny checkpoint or, with --ckpt_path, from another, and returns last.ckpt."""

    def stage(name, root, steps, *args):
        resumes = any(str(arg).startswith("--ckpt_path") for arg in args)
        line = [name, *args] if resumes else arguments(name, *args)
        main([*map(str, line), f"--trainer.default_root_dir={root}", f"--trainer.max_steps={steps}"])
        return last(root)

    return stage


def assert_equal_weights(a, b):
    a, b = (read_checkpoint(path)["state_dict"] for path in (a, b))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def scalars(run, tag):
    """The values of a curve that a run has logged."""
    board = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return [event.value for event in board.Scalars(tag)]


CONSTANT = "--model.min_lr_ratio=1"  # with a falling learning rate, the last step would decide all others


@pytest.mark.parametrize(
    "name, stop_at, settings",
    [
        ("reward", 3, []),
        ("dpo", 3, []),
        slow("dpo", 2, ["--model.pretraining_coef=0", "--model.loss=ipo"]),
        slow("grpo", 3, []),
        ("grpo", 3, ["--model.updates=2", "--model.ema_decay=0.9"]),  # in the middle of a batch of rollouts
        slow("grpo", 2, ["--model.updates=2"]),  # between two batches of rollouts
    ],
)
def test_a_resumed_stage_ends_with_the_weights_of_an_unbroken_run(stage, tmp_path, name, stop_at, settings):
    unbroken = stage(name, tmp_path / "a", 5, CONSTANT, *settings)
    stopped = stage(name, tmp_path / "b", stop_at, CONSTANT, *settings)
    before = read_checkpoint(stopped)["state_dict"]
    assert_equal_weights(unbroken, stage(name, tmp_path / "b", 5, f"--ckpt_path={stopped}"))
    after = read_checkpoint(unbroken)["state_dict"]
    assert not torch.equal(after["net.h.0.attn.c_attn.weight"], before["net.h.0.attn.c_attn.weight"])
    assert all(torch.equal(after[key], before[key]) for key in after if key.startswith("reference."))


@pytest.mark.parametrize("name", ["reward", "dpo", "grpo"])
def test_validate_prints_the_loss_of_a_stages_checkpoint(stage, tmp_path, capsys, name):
    path = stage(name, tmp_path, 2)
    capsys.readouterr()
    main(["validate", f"--ckpt_path={path}", *CPU])
    (loss,) = re.findall(r"val/loss .*?(-?[0-9.]+(?:e-[0-9]+)?) ", capsys.readouterr().out)
    assert float(loss) == pytest.approx(read_checkpoint(path)["val_loss"], abs=1e-5)


@pytest.mark.parametrize(
    "name, settings",
    [
        ("dpo", []),
        slow("reward", ["--model.dropout=0"]),
        ("grpo", ["--model.updates=2"]),
    ],
)
def test_two_processes_train_the_weights_of_one(launcher, arguments, tmp_path, name, settings):
    flags = [*settings, "--trainer.precision=64-true", "--trainer.max_steps=3", "--data.val_texts=5"]
    found = {}
    for processes in 1, 2:
        (folder := tmp_path / str(processes)).mkdir()
        line = arguments(name, *(flag for flag in flags if name != "reward" or "val_texts" not in flag))
        assert launcher.run(folder, *line, processes=processes) == 0, launcher.log.read_text()
        found[processes] = read_checkpoint(last(folder / "checkpoints"))
    one, two = found.values()
    assert one["val_loss"] == pytest.approx(two["val_loss"], rel=1e-5)
    for key, weight in one["state_dict"].items():
        assert weight.dtype == torch.float64
        torch.testing.assert_close(weight, two["state_dict"][key], rtol=0, atol=1e-9)


@pytest.fixture(scope="module")
def mid_batch(run, files, text_file, tmp_path_factory):
    """A checkpoint of grpo in the middle of a batch of rollouts."""
    root = tmp_path_factory.mktemp("grpo")
    line = ["grpo", *CPU, f"--model.init_from={run / 'checkpoints' / 'best.ckpt'}", f"--data.text={text_file}"]
    line += [f"--data.corpus={files / 'prompts.jsonl'}", f"--model.max_new_tokens={NEW}", "--data.val_texts=8"]
    line += [f"--model.reward={files / 'rewards.py'}:share", "--model.updates=2", "--data.batch_size=8"]
    main([*line, f"--trainer.default_root_dir={root}", "--trainer.max_steps=1"])
    return last(root)


# --- reward models are no language models -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_model(run, files, tmp_path_factory):
    """The checkpoint of a reward model trained in a few steps."""
    root = tmp_path_factory.mktemp("reward")
    line = ["reward", *CPU, f"--model.init_from={run / 'checkpoints' / 'best.ckpt'}"]
    line += [f"--data.corpus={files / 'pairs.jsonl'}", "--trainer.max_steps=4", "--trainer.val_check_interval=4"]
    main([*line, f"--trainer.default_root_dir={root}", "--data.batch_size=8", "--model.warmup_steps=0"])
    return last(root)


def test_a_reward_model_is_refused_where_a_language_model_is_needed(
    reward_model, arguments, tmp_path, text_file, refused
):
    needed = "is a reward model, and a language model is needed here"
    assert needed in refused("generate", "--ckpt_path", reward_model)
    assert needed in refused("score", "--ckpt_path", reward_model, "--text_file", text_file)
    assert needed in refused("export", "--to", "safetensors", "--ckpt_path", reward_model, "--output", tmp_path / "x")
    assert needed in refused("preferences", "--ckpt_path", reward_model, "--output", tmp_path / "pairs.jsonl")
    assert needed in refused(*arguments("dpo"), f"--model.init_from={reward_model}", *steps(tmp_path))
    assert needed in refused(*arguments("grpo"), f"--model.init_from={reward_model}", *steps(tmp_path))
    assert not list(tmp_path.rglob("*.ckpt")) and not (tmp_path / "pairs.jsonl").exists()


def test_a_language_model_is_refused_as_a_reward(ckpt, arguments, files, tmp_path, refused):
    needed = "is a language model, and a reward model is needed here"
    assert needed in refused("score", "--text_file", files / "pairs.jsonl", "--reward", ckpt)
    assert needed in refused("generate", "--ckpt_path", ckpt, "--best_of", 2, "--reward", ckpt)
    for setting in "reward", "gold_reward":
        assert needed in refused(*arguments("grpo"), f"--model.{setting}={ckpt}", *steps(tmp_path))


def test_best_is_the_newest_language_model_and_skips_newer_reward_models(
    ckpt, reward_model, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for age, (name, file) in enumerate({"reward": reward_model, "gpt": ckpt}.items()):
        path = tmp_path / "checkpoints" / name / "version_0" / "checkpoints" / "best.ckpt"
        path.parent.mkdir(parents=True)
        shutil.copy(file, path)
        os.utime(path, (1e9 - age, 1e9 - age))
    main(["generate", "--prompt", "the", "--max_new_tokens", "4", "--device", "cpu"])
    output = capsys.readouterr()
    assert "checkpoints/gpt/version_0/checkpoints/best.ckpt" in output.err + output.out and "\nthe" in "\n" + output.out


def test_a_reward_model_scores_pairs_and_is_a_reward_of_grpo(reward_model, stage, files, tmp_path, capsys):
    main(["score", "--text_file", str(files / "pairs.jsonl"), "--reward", str(reward_model), "--device", "cpu"])
    assert len(capsys.readouterr().out.splitlines()) >= 300
    path = stage("grpo", tmp_path, 2, f"--model.reward={reward_model}", f"--model.gold_reward={files}/rewards.py:share")
    assert all(w.isfinite().all() for w in read_checkpoint(path)["state_dict"].values())
    rewards = scalars(path.parents[1], "val/reward")
    assert len(rewards) == len(scalars(path.parents[1], "val/gold_reward")) and max(map(abs, rewards)) > 0


# --- bad input --------------------------------------------------------------------------------------------------------

PAIR = {"prompt": "the ", "chosen": "cat", "rejected": "mat"}


@pytest.mark.parametrize("name", ["reward", slow("dpo")])
@pytest.mark.parametrize(
    "line, message",
    [
        ({"prompt": "the ", "chosen": "cat"}, "has no 'rejected', only 'prompt', 'chosen'"),
        slow({"Prompt": "the ", "chosen": "cat", "rejected": "mat"}, "has no 'prompt', only 'Prompt', 'chosen'"),
        (PAIR | {"chosen": ""}, "has an empty chosen"),
        slow(PAIR | {"rejected": ""}, "has an empty rejected"),
        (PAIR | {"chosen": "mat"}, "chosen and rejected are the same text"),
        slow(PAIR | {"chosen": ["cat"]}, "'chosen' is a list, not a text"),
        (PAIR | {"rejected": "long years on a"}, "has 19 tokens, more than block_size = 16"),
        (PAIR | {"chosen": "c{t"}, "'{'"),
        ('{"prompt": "the ", "chosen":', "is not JSON"),
        slow("[]", "is a list, not an object"),
    ],
)
def test_a_bad_pair_is_named_with_file_and_line(arguments, refused, tmp_path, name, line, message):
    path = write(tmp_path / "bad.jsonl", [PAIR] * 16 + [line, PAIR])
    error = refused(*arguments(name), f"--data.corpus={path}", *steps(tmp_path))
    assert f"line 17 of {path}" in error and message in error
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "lines, message",
    [
        ([{"prompt": "the "}, {"text": "the "}], "line 2 of {} has no 'prompt', only 'text'"),
        slow([{"prompt": "the "}, {"prompt": ""}], "line 2 of {} has an empty prompt"),
        slow([{"prompt": "the "}, {"prompt": "t{e"}], "line 2 of {}: "),
        ([{"prompt": "the "}, {"prompt": "a" * 16}], "line 2 of {} has 1"),
        ([], "{} has no prompts"),
        slow([{"prompt": "the "}] * 9, "there are 1 prompts, too few"),
        ([{"prompt": "the "}] * 3 + [{"prompt": f"on a {x}mat"} for x in "abc"], "take 7 new tokens or less"),
    ],
)
def test_bad_prompts_are_named(arguments, refused, tmp_path, lines, message):
    path = write(tmp_path / "bad.jsonl", lines)
    error = refused(*arguments("grpo"), f"--data.corpus={path}", "--model.max_new_tokens=8", *steps(tmp_path))
    assert message.format(path) in error
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_prompt_that_only_training_has_must_leave_room_for_the_new_tokens(arguments, refused, tmp_path):
    path = write(tmp_path / "long.jsonl", [{"prompt": "on a mat. who?"}, {"prompt": "cat"}])
    error = refused(*arguments("grpo"), f"--data.corpus={path}", "--data.split=0.5", *steps(tmp_path))
    assert "max_new_tokens=6" in error and "14 tokens" in error and "take" in error and "2 new tokens" in error
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("grpo", ["--model.reward=null"], "grpo needs a reward"),
        ("grpo", ["--model.reward=poem"], "the reward poem is none"),
        ("grpo", ["--model.dropout=0.1"], "dropout would make random"),
        ("dpo", ["--model.dropout=0.1"], "dropout would make random"),
        ("dpo", ["--model.beta=0"], "beta=0 leaves dpo without a loss"),
        (
            "dpo",
            ["--model.max_new_tokens=14"],
            "max_new_tokens=14 and a prompt of 6 tokens do not fit into block_size=16",
        ),
        ("grpo", ["--model.group_size=1"], "group_size=1 must be at least 2"),
        ("grpo", ["--model.updates=3"], "a batch has 64 texts"),
        ("grpo", ["--data.val_texts=0"], "data.val_texts=0"),
        ("grpo", ["--model.stop="], "stop is an empty string"),
        ("grpo", ["--model.beta=-1"], "beta=-1.0 must be 0 or more"),
    ],
)
def test_a_setting_that_a_stage_cannot_have_is_named(arguments, refused, tmp_path, name, settings, message):
    assert message in refused(*arguments(name, *settings), *steps(tmp_path))
    assert not list(tmp_path.rglob("*.ckpt"))


BAD_REWARDS = {
    "fails": "failed: KeyError: 'no such",
    "nan": "returned nan for completion 0",
    "short": "values for 64 completions",
    "nothing": "can't be loaded",
    "number": "is a int, not a function",
}


@pytest.mark.parametrize("function", BAD_REWARDS)
def test_a_bad_reward_function_is_named_and_what_was_trained_before_stays(
    mid_batch, refused, files, tmp_path, function
):
    shutil.copytree(mid_batch.parents[3], root := tmp_path / "runs")
    before = (path := last(root)).read_bytes()
    name = f"{files / 'rewards.py'}:{function}"
    error = refused("grpo", f"--ckpt_path={path}", f"--model.reward={name}", *steps(root, 4))
    assert f"the reward {'function ' * (function == 'nothing')}{name}" in error and BAD_REWARDS[function] in error
    if function in ("nothing", "number"):  # found before the first step
        assert path.read_bytes() == before
    else:
        assert read_checkpoint(path)["global_step"] == 2  # the second batch of rollouts had the bad rewards
        assert f"The last good checkpoint is {os.path.relpath(path)}, of step 2" in error


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "No such file"),
        slow("def share(:", "invalid syntax"),
        slow("import nothing_like_this", "No module named"),
        ("1 / 0", "division by zero"),
        slow("raise SystemExit(7)", "7"),
    ],
)
def test_a_file_without_a_reward_is_named(arguments, refused, tmp_path, content, message):
    if content is not None:
        (tmp_path / "broken.py").write_text(content)
    name = f"{tmp_path / 'broken.py'}:share"
    error = refused(*arguments("grpo"), f"--model.reward={name}", *steps(tmp_path))
    assert f"the reward function {name} can't be loaded" in error and message in error


@pytest.mark.slow
def test_a_run_whose_reward_failed_goes_on_with_a_good_one_as_if_it_had_not(mid_batch, stage, files, tmp_path):
    for name in "a", "b":
        shutil.copytree(mid_batch.parents[3], tmp_path / name)
    with pytest.raises(SystemExit):
        stage(
            "grpo", tmp_path / "b", 5, f"--ckpt_path={last(tmp_path / 'b')}", f"--model.reward={files}/rewards.py:nan"
        )
    for name in "a", "b":
        good = f"--model.reward={files}/rewards.py:share"
        stage("grpo", tmp_path / name, 5, f"--ckpt_path={last(tmp_path / name)}", good)
    assert_equal_weights(last(tmp_path / "a"), last(tmp_path / "b"))


# --- equal rewards ----------------------------------------------------------------------------------------------------


def test_with_equal_rewards_grpo_says_so_and_moves_nothing(stage, ckpt, files, tmp_path, capsys):
    settings = ["--model.beta=0", "--model.pretraining_coef=0", f"--model.reward={files / 'rewards.py'}:equal"]
    path = stage("grpo", tmp_path, 3, *settings)
    output = capsys.readouterr()
    assert output.err.count("the texts of each prompt all have the same reward, which teaches nothing") == 3
    weights, start = (read_checkpoint(file)["state_dict"] for file in (path, ckpt))
    assert all(torch.equal(weights[name], start[name]) for name in start)


def test_with_equal_rewards_the_divergence_and_the_text_still_teach(stage, ckpt, files, tmp_path):
    path = stage("grpo", tmp_path, 3, "--model.beta=0.1", f"--model.reward={files / 'rewards.py'}:equal")
    weights, start = (read_checkpoint(file)["state_dict"] for file in (path, ckpt))
    assert all(w.isfinite().all() for w in weights.values())
    assert not all(torch.equal(weights[name], start[name]) for name in start)


# --- preferences ------------------------------------------------------------------------------------------------------


@pytest.fixture
def preferences(ckpt, files, tmp_path, capsys):
    """Writes pairs of the tiny net's own texts, and returns the lines and what was told."""

    def preferences(*args):
        path = tmp_path / "written.jsonl"
        line = ["preferences", "--output", path, "--ckpt_path", ckpt, "--prompts", files / "prompts.jsonl"]
        line += ["--reward", f"{files / 'rewards.py'}:share", "--max_new_tokens", NEW, "--device", "cpu"]
        main([str(arg) for arg in [*line, "--pairs", 120, *args]])
        return path.read_text().splitlines(), capsys.readouterr().err

    return preferences


def test_preferences_depend_on_the_seed_alone(preferences):
    (first, _), (second, _), (other, _) = preferences(), preferences(), preferences("--seed", 7)
    assert first == second and len(first) == len(other) == 120
    texts = [{json.loads(line)[key] for line in lines for key in ("chosen", "rejected")} for lines in (first, other)]
    assert len(texts[0] & texts[1]) < 0.1 * len(texts[0])  # not the same texts for other prompts


def test_the_chosen_text_has_the_higher_reward_by_min_gap(preferences):
    gaps = {}
    for min_gap in 0, 0.3:
        pairs = [json.loads(line) for line in preferences("--min_gap", min_gap)[0]]
        assert {pair["prompt"] for pair in pairs} <= {f"{word} " for word in WORDS}
        assert all(len(pair[key]) == NEW for pair in pairs for key in ("chosen", "rejected"))
        gaps[min_gap] = [(pair["chosen"].count("a") - pair["rejected"].count("a")) / NEW for pair in pairs]
    assert min(gaps[0]) == pytest.approx(1 / NEW) and min(gaps[0.3]) == pytest.approx(2 / NEW)


def test_shuffled_labels_swap_half_of_the_pairs(preferences):
    straight, shuffled = (
        [json.loads(line) for line in preferences("--min_gap", 0, *args)[0]] for args in ([], ["--shuffle_labels=true"])
    )
    swapped = [
        a["chosen"] == b["rejected"] and a["rejected"] == b["chosen"] for a, b in zip(straight, shuffled, strict=True)
    ]
    assert all(a == b or swap for a, b, swap in zip(straight, shuffled, swapped, strict=True))
    assert 0.3 < sum(swapped) / len(swapped) < 0.7


def test_ties_are_counted(preferences):
    told = [preferences("--min_gap", min_gap, "--group_size", 4)[1] for min_gap in (0, 0.3)]
    (some, drawn), (more, drawn_too) = (
        map(int, re.search(r"([0-9,]+) of ([0-9,]+) pairs drawn were dropped", text.replace(",", "")).groups())
        for text in told
    )
    assert 0 < some / drawn < more / drawn_too < 1


def test_preferences_without_a_large_enough_gap_say_so(ckpt, files, tmp_path, refused):
    line = ["preferences", "--output", tmp_path / "none.jsonl", "--ckpt_path", ckpt, "--device", "cpu"]
    line += ["--prompts", files / "prompts.jsonl", "--max_new_tokens", NEW, "--min_gap", "1.5"]
    error = refused(*line, "--reward", f"{files / 'rewards.py'}:share")
    assert "had no two rewards that differ by min_gap=1.5 or more: give a smaller one" in error
    assert not list(tmp_path.iterdir())


# --- learning ---------------------------------------------------------------------------------------------------------


def test_grpo_raises_the_reward(stage, tmp_path):
    settings = [
        "--model.optimizer=adamw",
        "--model.learning_rate=0.03",
        "--data.val_texts=128",
        "--model.group_size=16",
    ]
    path = stage("grpo", tmp_path, 15, *settings, "--trainer.val_check_interval=15", "--trainer.log_every_n_steps=1")
    rewards = scalars(path.parents[1], "train/reward")
    (end,) = scalars(path.parents[1], "val/reward")
    assert len(rewards) == 15 and end > rewards[0] + 0.2 and rewards[-1] > rewards[0] + 0.2


@pytest.mark.parametrize("file, least, most", [("pairs", 0.9, 1.0), ("shuffled", 0.3, 0.7)])
def test_a_reward_model_learns_what_pairs_teach_and_nothing_from_shuffled_ones(
    stage, files, tmp_path, file, least, most
):
    settings = [f"--data.corpus={files / file}.jsonl", "--data.split=0.7", "--trainer.val_check_interval=40"]
    path = stage("reward", tmp_path, 40, *settings, "--model.learning_rate=0.01", "--data.batch_size=32")
    (accuracy,) = scalars(path.parents[1], "val/accuracy")
    assert least <= accuracy <= most


def test_dpo_raises_the_margin_of_pairs_that_it_has_not_seen(stage, tmp_path):
    settings = ["--model.learning_rate=0.01", "--trainer.val_check_interval=1", "--data.val_texts=0"]
    path = stage(
        "dpo",
        tmp_path,
        12,
        *settings,
        "--model.pretraining_coef=0",
        "--data.split=0.7",
        "--trainer.log_every_n_steps=1",
    )
    margins, accuracies = (scalars(path.parents[1], f"val/{name}") for name in ("margin", "accuracy"))
    assert scalars(path.parents[1], "train/margin")[0] == pytest.approx(0, abs=1e-5)  # the policy is the reference
    assert margins[0] < 2 and margins[-1] > 6 and accuracies[-1] > 0.95


@pytest.mark.parametrize("shuffled", [False, True])
def test_reward_yaml_stops_a_run_that_no_longer_gets_better(stage, files, tmp_path, capsys, shuffled):
    settings = ["--model.learning_rate=0.03", "--trainer.val_check_interval=1", "--data.split=0.7"]
    file = files / ("shuffled.jsonl" if shuffled else "pairs.jsonl")
    steps = 60 if shuffled else 8
    path = stage("reward", tmp_path, steps, *settings, f"--data.corpus={file}", "--data.batch_size=32")
    losses = scalars(path.parents[1], "val/loss")
    assert ("EarlyStopping with patience=5" in capsys.readouterr().out) == shuffled
    best = read_checkpoint(path.with_name("best.ckpt"))
    assert best["val_loss"] == pytest.approx(min(losses)) and best["global_step"] == losses.index(min(losses)) + 1
    assert read_checkpoint(path)["global_step"] == len(losses) == (best["global_step"] + 5 if shuffled else 8)


# --- hostile checkpoints ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("found", [["grpo"], slow("poetry")])
def test_a_checkpoint_of_no_stage_is_refused(ckpt, tmp_path, refused, found):
    write_checkpoint(read_checkpoint(ckpt) | {"stage": found}, path := tmp_path / "x.ckpt")
    for line in ("generate",), ("validate", *CPU), ("grpo", *CPU):
        assert "its stage is" in refused(*line, f"--ckpt_path={path}")


DAMAGE = {
    "ids": [
        lambda ids: ids[:, :-1],
        lambda ids: ids + 10**6,
        lambda ids: ids.tolist(),
        lambda ids: ids.float(),
        lambda ids: ids[0],
        lambda ids: ids[:32],
        lambda ids: ~ids,
        lambda ids: ids[:0],
    ],
    "completion": [lambda mask: mask & False, lambda mask: mask.long(), lambda mask: mask[:, 1:]],
    "logprobs": [lambda x: x * float("nan"), lambda x: x.long(), lambda x: x[:32], lambda x: x.sum()],
    "advantages": [lambda x: x[:, None], lambda x: x / 0, lambda x: x > 0, lambda x: 1.0],
    "metrics": [
        lambda x: {"reward": torch.zeros(3)},
        lambda x: {"reward": 1.0},
        lambda x: None,
        lambda x: {3: torch.zeros(())},
        lambda x: {"loss": torch.zeros(())},
        lambda x: {"reward": torch.zeros((), dtype=torch.int64)},
    ],
}


@pytest.mark.parametrize(
    "key, number",
    [slow(key, i) if i else (key, i) for key, changes in DAMAGE.items() for i in range(len(changes))],
)
def test_damaged_rollouts_are_refused(mid_batch, tmp_path, refused, key, number):
    checkpoint = read_checkpoint(mid_batch)
    checkpoint["rollouts"][key] = DAMAGE[key][number](checkpoint["rollouts"][key])
    write_checkpoint(checkpoint, path := tmp_path / "x.ckpt")
    error = refused("grpo", f"--ckpt_path={path}", *steps(tmp_path, 3))
    assert "the checkpoint's rollouts are damaged: start from its weights" in error


@pytest.mark.parametrize("rollouts", [[], slow({})])
def test_rollouts_that_are_none_are_refused(mid_batch, tmp_path, refused, rollouts):
    write_checkpoint(read_checkpoint(mid_batch) | {"rollouts": rollouts}, path := tmp_path / "x.ckpt")
    error = refused("grpo", f"--ckpt_path={path}", *steps(tmp_path, 3))
    assert "the checkpoint's rollouts are damaged: start from its weights" in error


@pytest.mark.parametrize("rows", [1, slow(63)])
def test_rollouts_that_the_steps_of_a_batch_can_not_share_are_refused(mid_batch, tmp_path, refused, rows):
    checkpoint = read_checkpoint(mid_batch)
    saved = checkpoint["rollouts"]
    checkpoint["rollouts"] = {key: part if key == "metrics" else part[:rows] for key, part in saved.items()}
    write_checkpoint(checkpoint, path := tmp_path / "x.ckpt")
    assert "rollouts are damaged" in refused("grpo", f"--ckpt_path={path}", *steps(tmp_path, 3))
