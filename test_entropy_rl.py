"""Tests, each of them a claim: the algorithm, by the names of its functions; the command line, problems,
policies, training, runs that are stopped, reports; the verifier; the handout.

    python -m pytest -q                                             # all
    ENTROPY_RL=handout python -m pytest -x -q -k token_covariance   # grade one exercise of a handout.py
"""
import contextlib
import copy
import importlib
import io
import itertools
import json
import logging
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from datetime import date
from decimal import Decimal
from pathlib import Path
from statistics import fmean, linear_regression, pvariance, stdev

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import datasets
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import pad
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import AutoConfig, AutoModelForCausalLM

torch.set_num_threads(1)  # everything here is small
er = importlib.import_module(os.environ.get("ENTROPY_RL", "entropy_rl"))
HANDOUT = "sed '/### BEGIN SOLUTION/,/### END/{s/### BEGIN SOLUTION/raise NotImplementedError/p;d;}' entropy_rl.py"
METHODS = ["grpo", "clip_higher", "clip_cov", "kl_cov", "entropy_bonus", "ref_kl", "pg"]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def agree(found, expected, what, tolerance=1e-6):
    expected = torch.as_tensor(expected, dtype=found.dtype)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance, msg=lambda text: f"{what}: {text}")


def agree_with_gradients(found, expected, inputs, tolerance=1e-6):
    """Equal, and so are the gradients by each of the named inputs."""
    agree(found, expected, "value", tolerance)
    weights = torch.randn(found.shape, generator=seeded(0), dtype=found.dtype)
    slopes = []
    for x in [found, expected]:
        slopes.append(torch.autograd.grad((x * weights).sum(), list(inputs.values()), retain_graph=True,
                                          allow_unused=True, materialize_grads=True))
    for name, slope, expected_slope in zip(inputs, slopes[0], slopes[1]):
        agree(slope, expected_slope, f"gradient by {name}", tolerance)


@contextlib.contextmanager
def on_call(name, number, act, owner=er):
    """Let act(arguments) run before a function's call of this number; 0: before every call."""
    real = getattr(owner, name)
    calls = []

    def wrapped(*arguments, **more):
        calls.append(1)
        if number in (0, len(calls)):
            act(*arguments)
        return real(*arguments, **more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, wrapped)
        yield


# The algorithm


def example(seed=0, rows=6, width=9, dtype=torch.float64):
    """Many ratios leave [0.8, 1.2]; row 0 has ratio 1, row 1 advantage 0; off the mask stands junk."""
    random = torch.rand(4, rows, width, generator=seeded(seed), dtype=dtype)
    old = -3 * random[0]
    logprobs = old + 1.4 * random[1] - 0.7
    logprobs[0] = old[0]
    advantages = torch.randn(rows, generator=seeded(seed), dtype=dtype)
    advantages[1:2] = 0
    mask = torch.arange(width) < torch.randint(1, width + 1, (rows, 1), generator=seeded(seed))
    logprobs[~mask] -= 7
    reference = logprobs + random[2] - 0.5
    return types.SimpleNamespace(logprobs=logprobs.requires_grad_(), old_logprobs=old, advantages=advantages,
                                 mask=mask, entropy=random[3].requires_grad_(), ref_logprobs=reference)


def places(mask):
    return {tuple(at) for at in mask.nonzero().tolist()}


def covariance_loop(data):
    """Eq. 10: {(row, token): Cov} over the tokens of the mask."""
    tokens = places(data.mask)
    mean_logprob = fmean(data.logprobs[at].item() for at in tokens)
    mean_advantage = fmean(data.advantages[i].item() for i, _ in tokens)
    covariance = {}
    for i, t in tokens:
        advantage = data.advantages[i].item() - mean_advantage
        covariance[i, t] = (data.logprobs[i, t].item() - mean_logprob) * advantage
    return covariance


def select(config, data, seed=0):
    args = data.logprobs, data.old_logprobs, data.advantages, data.mask
    return er.select_tokens(config, *args, seeded(seed))


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "reinforce_pp"])
def test_group_advantages(estimator):
    """Each estimator is its definition; the second group shows the + 1e-6 of the unbiased std."""
    rewards = [1, 0, 0, 1, 0, 0, 2e-6, 2e-6, 0.5, 0, 1, 1, 1, 1, 1, 1]
    expected = []
    for i, r in enumerate(rewards):
        pool = rewards if estimator == "reinforce_pp" else rewards[i // 4 * 4:][:4]
        scaled = (r - fmean(pool)) / (stdev(pool) + 1e-6)
        expected.append(r - (sum(pool) - r) / 3 if estimator == "rloo" else scaled)
    found = er.group_advantages(torch.tensor(rewards, dtype=torch.float64), 4, estimator)
    agree(found, expected, "advantages", 1e-9)


@pytest.mark.parametrize("junk", [math.nan, -math.inf])
def test_token_covariance(junk):
    """It is Eq. 10 whatever stands off the mask, 0 there, and without gradient."""
    data = example()
    expected = torch.zeros(6, 9)
    for at, value in covariance_loop(data).items():
        expected[at] = value
    logprobs = data.logprobs.masked_fill(~data.mask, junk)
    found = er.token_covariance(logprobs, data.advantages, data.mask.long())
    agree(found, expected, "covariance")
    assert not found.requires_grad


def clip_cov(share, low=0.2, high=1.5):
    return er.Config(method="clip_cov", clip_cov_ratio=share, clip_cov_low=low, clip_cov_high=high,
                     clip_low=0.2, clip_high=0.3)


def clip_cov_candidates(data):
    """What the window holds and PPO's clip has not stopped, by rising covariance."""
    inside = {at: value for at, value in covariance_loop(data).items() if 0.2 < value < 1.5}
    found = []
    for i, t in sorted(inside, key=inside.get):
        ratio = (data.logprobs[i, t] - data.old_logprobs[i, t]).exp()
        if (ratio <= 1.3 if data.advantages[i] > 0 else ratio >= 0.8):
            found.append((i, t))
    assert 20 < len(found) < len(inside)
    return found


def test_select_tokens_select_clip_cov():
    """Candidates: inside the open window, on the mask, not stopped by PPO's clip; r = 1 takes them all."""
    data = example(1, 20, 20)
    expected = clip_cov_candidates(data)
    assert places(select(clip_cov(1.0), data)) == set(expected)
    covariance = er.token_covariance(data.logprobs, data.advantages, data.mask)
    bounds = [covariance[at].item() for at in expected]
    found = places(select(clip_cov(1.0, bounds[0], bounds[-1]), data))
    assert found == set(expected[1:-1]), "the bounds are outside"
    assert not select(clip_cov(1.0, -1e9, 1e9), data)[~data.mask].any(), "off the mask, where Cov is 0"
    for share in [1e-9, 0.05, 0.0099]:
        found = places(select(clip_cov(share), data))
        assert len(found) == max(1, math.floor(share * int(data.mask.sum()))), "floor(r M), at least one"
        assert found <= set(expected)
    assert not select(clip_cov(1.0, 90, 91), data).any(), "an empty window"


def test_select_tokens_select_clip_cov_is_random():
    """The generator decides, fairly: in 300 draws of 3, to 5 standard errors."""
    data = example(1, 20, 20)
    candidates = clip_cov_candidates(data)
    config = clip_cov(3.5 / int(data.mask.sum()))
    times = sum(select(config, data, seed).int() for seed in range(300))
    assert times.sum() == 900 and torch.equal(select(config, data, 7), select(config, data, 7))
    p = 3 / len(candidates)
    for at in candidates:
        assert abs(times[at] - 300 * p) < 5 * math.sqrt(300 * p * (1 - p))


@pytest.mark.parametrize("share", [1e-9, 0.0999, 0.3, 1])
def test_select_tokens_select_kl_cov(share):
    """The floor(k M) tokens of the highest covariance, at least one."""
    data = example(2)
    covariance = covariance_loop(data)
    ranked = sorted(covariance, key=covariance.get, reverse=True)
    count = max(1, math.floor(share * len(ranked)))
    found = select(er.Config(method="kl_cov", kl_cov_fraction=share), data)
    assert found.dtype == torch.bool and places(found) == set(ranked[:count])


def test_a_share_of_0_takes_none():
    """r = 0 and k = 0 select nothing."""
    assert not select(er.Config(method="kl_cov", kl_cov_fraction=0), example(2)).any()
    assert not select(er.Config(method="clip_cov", clip_cov_ratio=0), example(2)).any()


def losses_loop(config, data, selected):
    """Eq. 4, 12, 14 and the baselines with plain branches, token by token: [N, T]."""
    losses = []
    for i, t in itertools.product(range(data.mask.shape[0]), range(data.mask.shape[1])):
        advantage = data.advantages[i]
        difference = data.logprobs[i, t] - data.old_logprobs[i, t]
        ratio = difference.exp()
        loss = -ratio * advantage
        if config.method not in ("pg", "kl_cov"):
            if advantage > 0 and ratio > 1 + config.clip_high:
                loss = -(1 + config.clip_high) * advantage
            if advantage < 0 and ratio < 1 - config.clip_low:
                loss = -(1 - config.clip_low) * advantage
        if config.method == "clip_cov" and selected[i, t]:
            loss = 0 * advantage
        if config.method == "kl_cov" and selected[i, t]:
            kl = {"abs": abs(difference), "k2": difference ** 2 / 2, "k3": ratio - 1 - difference}
            loss = loss + config.kl_cov_coef * kl[config.kl_estimator]
        if config.method == "entropy_bonus":
            loss = loss - config.entropy_coef * data.entropy[i, t]
        if config.method == "ref_kl":
            difference = data.ref_logprobs[i, t] - data.logprobs[i, t]
            loss = loss + config.ref_kl_coef * (difference.exp() - 1 - difference)
        losses.append(loss)
    return torch.stack(losses).view(data.mask.shape)


@pytest.fixture(params=METHODS + ["kl_cov k2", "kl_cov k3"])
def case(request):
    """Settings that clip and select, a mini-batch, and what policy_loss shall select."""
    method, estimator = (request.param + " abs").split()[:2]
    clip = 0.2 if method == "clip_cov" else None
    config = er.Config(method=method, kl_estimator=estimator, kl_cov_fraction=0.2, clip_cov_ratio=0.2,
                       clip_cov_low=0.05, clip_low=clip, clip_high=clip)
    data = example(6, 12, 12)
    selected = select(config, data, 7)
    assert selected.any() == ("cov" in method), "the other methods select nothing"
    return config, data, selected


def test_token_losses(case):
    """Values and gradients are those of the scalar equations."""
    config, data, selected = case
    found = er.token_losses(config, data.logprobs, data.old_logprobs, data.advantages, selected, data.entropy,
                            data.ref_logprobs)
    inputs = {"logprobs": data.logprobs, "entropy": data.entropy}
    agree_with_gradients(found, losses_loop(config, data, selected), inputs)


def test_policy_loss(case):
    """The mean over the mask, also over what its generator selects; the gradient as well."""
    config, data, selected = case
    found = er.policy_loss(config, **vars(data), generator=seeded(7))
    expected = losses_loop(config, data, selected)[data.mask].sum() / data.mask.sum()
    agree_with_gradients(found, expected, {"logprobs": data.logprobs, "entropy": data.entropy})


@pytest.mark.parametrize("limit, settings", [
    ("grpo", dict(method="clip_cov", clip_cov_ratio=0.0)),
    ("pg", dict(method="kl_cov", kl_cov_fraction=0.5))])
def test_policy_loss_limits(limit, settings):
    """To the bit: Clip-Cov without picks, at clip 0.2, is GRPO; KL-Cov at ratio 1 is policy gradient."""
    data = example(8, dtype=torch.float32)
    if limit == "pg":
        data.logprobs = data.old_logprobs.clone().requires_grad_()
    found = er.policy_loss(er.Config(clip_low=0.2, clip_high=0.2, **settings), **vars(data))
    expected = er.policy_loss(er.Config(method=limit), **vars(data))
    agree_with_gradients(found, expected, {"logprobs": data.logprobs}, 0)


# The law and the theorems


def test_fit_entropy_law():
    """a, b, r2 and rmse are those of ordinary least squares."""
    entropy = [0.05 + 0.1 * i for i in range(12)]
    y = [0.9 - 0.3 * math.exp(h) + 0.1 * math.sin(9 * h) for h in entropy]
    slope, b = linear_regression([math.exp(h) for h in entropy], y)
    fitted = [b + slope * math.exp(h) for h in entropy]
    mse = fmean((one - other) ** 2 for one, other in zip(y, fitted))
    law = er.fit_entropy_law(entropy, y)
    expected = [-slope, b, b + slope, 1 - mse / pvariance(y), math.sqrt(mse)]
    assert [law.a, law.b, law.ceiling, law.r2, law.rmse] == pytest.approx(expected, abs=1e-6)
    agree(law.predict(entropy), fitted, "predictions")


@pytest.mark.parametrize("entropy", [[], [0.5, 0.5, 0.5]])
def test_fit_entropy_law_without_a_law(entropy):
    """Fewer than two different entropies are refused."""
    with pytest.raises(er.UserError):
        er.fit_entropy_law(entropy, [0.1] * len(entropy))


@pytest.mark.parametrize("rule", ["pg", "npg"])
def test_tabular_entropy_change(rule):
    """Actual: entropy after a step less before. Predicted: the step along its gradient."""
    logits, rewards = torch.randn(2, 5, 7, generator=seeded(0), dtype=torch.float64)
    policy = torch.distributions.Categorical(logits=logits.requires_grad_())
    value = (policy.probs * rewards).sum(-1, keepdim=True)
    slopes = []
    for target in [value, policy.entropy()]:
        slopes.append(torch.autograd.grad(target.sum(), logits, retain_graph=True)[0])
    step = 0.05 * (slopes[0] if rule == "pg" else rewards - value)  # natural: eta A
    after = torch.distributions.Categorical(logits=logits + step)
    actual, predicted = er.tabular_entropy_change(logits, rewards, 0.05, rule)
    agree(actual, after.entropy() - policy.entropy(), "actual", 1e-12)
    agree(predicted, (slopes[1] * step).sum(-1), "predicted", 1e-12)


# Rollouts and log-probabilities

BASIC = dict(vocab_size=40, hidden_size=32, num_attention_heads=4, n_layer=2, eos_token_id=1, pad_token_id=0)
COMMON = dict(BASIC, intermediate_size=64, num_hidden_layers=2, num_key_value_heads=2, head_dim=8)
WINDOW = dict(COMMON, sliding_window=8)
KINDS = {
    "gemma3_text": dict(WINDOW, layer_types=["sliding_attention", "full_attention"]),
    "mixtral": dict(WINDOW, num_local_experts=4),
    "gpt_neo": dict(BASIC, attention_types=[[["local"], 2]], num_layers=2, num_heads=4, window_size=8),
    "phi3": WINDOW, "qwen3": COMMON, "gpt_neox": COMMON, "smollm3": COMMON, "gpt2": BASIC, "bloom": BASIC,
}
PROMPTS = [[5], [4, 6, 8, 10, 9, 11, 2, 5, 7, 30, 31, 32], [7, 7, 3]]
STOPS = [1, 14]


def random_model(kind="qwen3", spread=0.3, **changes):
    """A small causal language model of random weights, less uniform with a larger spread."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **dict(KINDS.get(kind, COMMON), **changes))
        model = AutoModelForCausalLM.from_config(config).eval()
        for p in model.parameters():
            p.data.add_(spread * torch.randn_like(p))
    return model


def roll(model, prompts=PROMPTS, seed=0, **settings):
    values = dict(group_size=4, max_new_tokens=24, temperature=1.0, eos_token_ids=STOPS, pad_token_id=0)
    return er.sample_rollouts(model, prompts, generator=seeded(seed), **dict(values, **settings))


def own_logprobs(model, rollouts, temperature=1.0):
    """Log-probabilities and entropy by a plain forward pass over each unpadded row: [2, N, T]."""
    rows = []
    for ids, mask, response in zip(rollouts.input_ids, rollouts.attention_mask, rollouts.response_mask):
        ids = ids[mask.bool()]
        count = int(response.sum())
        table = (model(input_ids=ids[None]).logits[0, -count - 1:-1] / temperature).log_softmax(-1)
        values = torch.stack([table.gather(1, ids[-count:, None])[:, 0], -(table.exp() * table).sum(-1)])
        rows.append(pad(values, (0, len(response) - count)))
    return torch.stack(rows, dim=1)


def trained_logprobs(model, rollouts, **settings):
    T = rollouts.response_mask.shape[1]
    return er.response_logprobs(model, rollouts.input_ids, rollouts.attention_mask, T, **settings)


LOG2 = math.log(2)


@pytest.mark.parametrize("logits, logprob, entropy, gradient", [
    ([LOG2, 2 * LOG2, 0, 0], -2 * LOG2, 1.75 * LOG2,
     [0.75 + LOG2 / 16, -0.5 - 0.375 * LOG2, (1.25 * LOG2 - 1) / 8, (1.25 * LOG2 - 1) / 8]),
    ([0, 400, 0, 0], -400, 0, [1, -1, 0, 0]),
    ([2, -math.inf, 2, -math.inf], -LOG2, LOG2, [0.5, 0, -0.5, 0]),
])
def test_token_logprobs(logits, logprob, entropy, gradient):
    """Values and gradients by hand: logits 400 apart lose nothing; at -inf 0 log 0 is 0."""
    logits = torch.tensor([logits], requires_grad=True, dtype=torch.float32)
    found = er.token_logprobs(logits, torch.tensor([0]), lambda hidden: 0.7 * hidden, 0.7)
    agree(torch.cat(found), [logprob, entropy], "values")
    agree(torch.autograd.grad(sum(found), logits)[0], [gradient], "gradient")


@pytest.fixture(scope="module", params=KINDS)
def sampled(request):
    """A model of each kind, and rollouts that go past its window."""
    model = random_model(request.param)
    return model, roll(model, temperature=0.8)


@torch.no_grad()
def test_sample_rollouts_and_response_logprobs(sampled):
    """Sampled and trained log-probabilities and entropies are the model's own, 0 off the mask."""
    model, rollouts = sampled
    assert rollouts.response_mask.sum(1).max() > 10
    own = own_logprobs(model, rollouts, 0.8)
    logprobs, entropy = trained_logprobs(model, rollouts, temperature=0.8)
    agree(rollouts.logprobs, own[0], "sampled logprobs", 1e-4)
    agree(rollouts.entropy, own_logprobs(model, rollouts)[1], "sampled entropy, at temperature 1", 1e-4)
    agree(torch.stack([logprobs, entropy]), own, "trained logprobs and entropy", 1e-4)
    without = trained_logprobs(model, rollouts, temperature=0.8, with_entropy=False)
    assert torch.equal(without[0], logprobs) and without[1] is None


class Letters:
    convert_ids_to_tokens = list  # a tokenizer
    decode = str

    def __call__(self, text):
        return types.SimpleNamespace(input_ids=[3 + ord(character) % 30 for character in text])


def policy_of(model):
    return er.Policy(model=model, tokenizer=Letters(), end_ids=STOPS, stop_ids=STOPS, stop="")


def test_response_logprobs_check_policy_accepts(sampled):
    """The check at the start lets these models pass."""
    er.check_policy(er.Config(), policy_of(sampled[0]))


@pytest.mark.parametrize("kind, changes", [("granite", {"logits_scaling": 2.0}), ("mamba", {})])
def test_response_logprobs_check_policy_refuses(kind, changes):
    """A model that scales its logits, or has no cache, is refused in one line."""
    with pytest.raises(er.UserError, match=f"^--model {kind}: .*$") as error:
        er.check_policy(er.Config(model=kind), policy_of(random_model(kind, **changes)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_response_logprobs_in_chunks(kind, rows, monkeypatch):
    """Values and gradients are the plain way's; never more rows of logits at once than allowed."""
    model = random_model(kind, spread=0.1)
    rollouts = roll(model, max_new_tokens=9)
    own = own_logprobs(model, rollouts, 0.7)
    projected = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, hidden, logits: projected.append(len(logits)))
    monkeypatch.setattr(er, "LOGITS_AT_ONCE", rows * 40)
    ours = torch.stack(trained_logprobs(model, rollouts, temperature=0.7))
    agree_with_gradients(ours, own, dict(model.named_parameters()), 1e-4)
    assert max(projected) <= rows and sum(projected) == 2 * rollouts.response_mask.sum()  # backward too


def test_sample_rollouts():
    """Padded on both sides, true up to and including the stop token, even if that is the padding."""
    found = roll(random_model(spread=0.05), eos_token_ids=[1, 14, 20], pad_token_id=14)
    lengths = []
    for row, ids in enumerate(found.input_ids.tolist()):
        prompt = PROMPTS[row // 4]
        left = 12 - len(prompt)
        n = min([t + 1 for t in range(24) if ids[12 + t] in (1, 14, 20)] + [24])
        lengths.append(n)
        assert ids == [14] * left + prompt + ids[12:12 + n] + [14] * (24 - n)
        assert found.attention_mask[row].tolist() == [0] * left + [1] * (len(prompt) + n) + [0] * (24 - n)
        assert found.response_mask[row].tolist() == [True] * n + [False] * (24 - n)
    assert len(lengths) == 12 and min(lengths) < 10 and lengths.count(24) > 1


@torch.no_grad()
def test_sample_rollouts_greedy(sampled):
    """Greedy tokens are the argmax of a plain forward pass, whatever other rows do."""
    prompts = PROMPTS + [[i, i + 1] for i in range(2, 12)]
    found = roll(sampled[0], prompts, greedy=True, group_size=1, eos_token_ids=[1, 7, 14, 21, 28, 35])
    for prompt, ids, mask in zip(prompts, found.input_ids, found.attention_mask):
        ids = ids[mask.bool()]
        best = sampled[0](input_ids=ids[None]).logits[0].argmax(-1)
        assert ids.tolist() == prompt + best[len(prompt) - 1:-1].tolist()


def test_sample_rollouts_frequencies():
    """The first two tokens come as often as the model says (chi-square)."""
    model = random_model(spread=0.15, vocab_size=6)
    found = roll(model, [[4, 5], [2]], group_size=6000, max_new_tokens=2, temperature=1.5, eos_token_ids=[])
    seen = (6 * found.input_ids[:6000, -2] + found.input_ids[:6000, -1]).bincount(minlength=36)
    chances = (model(input_ids=torch.tensor([[4, 5, token] for token in range(6)])).logits / 1.5).softmax(-1)
    expected = 6000 * (chances[0, 1][:, None] * chances[:, 2]).flatten()
    assert expected.min() > 5
    assert ((seen - expected) ** 2 / expected).sum() < 35 + 4 * math.sqrt(2 * 35)


def spoilt(value):
    """A model with a value for the logits of tokens above 20."""
    model = random_model(spread=0.05)
    model.get_output_embeddings().register_forward_hook(
        lambda head, hidden, logits: logits.masked_fill(torch.arange(40) > 20, value))
    return model


def test_sample_rollouts_of_impossible_tokens():
    """Logits of -inf are never sampled, and all numbers stay finite."""
    found = roll(spoilt(-math.inf))
    assert found.input_ids[:, 12:].max() <= 20 and (found.logprobs + found.entropy).isfinite().all()


@pytest.mark.parametrize("logit", [math.nan, math.inf])
def test_sample_rollouts_refuses_what_is_no_number(logit):
    """Such logits end in a line for the user."""
    with pytest.raises(er.UserError, match="--lr"):
        roll(spoilt(logit))


# The update


def test_mini_batches():
    """Whole mixed groups in an order by seed and step, sorted by length; their advantages alone."""
    rewards = torch.tensor([[1.0, 0, 1], [1, 1, 1], [0, 0, 1], [0, 0, 0]]).repeat(6, 1)
    lengths = torch.randint(1, 30, (72, 1), generator=seeded(0))
    mask = torch.arange(30) < lengths
    orders = []
    for seed, step in [(0, 1), (0, 1), (0, 2), (1, 1)]:
        config = er.Config(prompts=24, group_size=3, updates=5, advantage="reinforce_pp", seed=seed)
        batches, advantages = er.mini_batches(config, er.Rollouts(mask, mask.long(), mask, mask, mask),
                                              rewards.flatten(), step)
        orders.append(torch.cat(batches).tolist())
    assert orders[0] == orders[1] and orders[0] not in orders[2:]
    assert sorted(orders[0]) == [row for row in range(72) if row % 6 < 3]
    for batch in batches:
        assert len(set((batch // 3).tolist())) == len(batch) // 3 in (2, 3), "whole groups"
        assert lengths[batch].equal(lengths[batch].sort(dim=0).values), "sorted by length"
    expected = er.group_advantages(rewards[::2].flatten(), 3, "reinforce_pp")
    agree(advantages.view(24, 3)[::2].flatten(), expected, "advantages")


REWARDS = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 1, 0, 0, 0, 1, 0, 1, 1, 0, 1, 0, 1, 1, 0])


@pytest.fixture(scope="module")
def start():
    model = random_model(spread=0.1)
    return model, roll(model, PROMPTS + [[9, 8], [4] * 6, [20, 21, 22]], max_new_tokens=10)


def update_config(method="kl_cov", **changes):
    values = dict(method=method, prompts=6, group_size=4, updates=3, micro_batch=100, lr=0.3, clip_low=0.01,
                  clip_high=0.03 if method == "clip_higher" else 0.01, clip_cov_ratio=0.1, clip_cov_low=0.1,
                  kl_cov_fraction=0.1, ref_kl_coef=1.0, temperature=0.9)
    return er.Config(**dict(values, **changes))


def learn(start, config):
    """update() on a copy of the model by SGD, a linear optimizer: its row and the weights."""
    model = copy.deepcopy(start[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr)
    row = er.update(config, policy_of(model), random_model(spread=0.12), optimizer, start[1], REWARDS, 1)
    return row, parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("method", METHODS)
def test_update_micro_batches(method, start):
    """At any micro-batch the steps are those of policy_loss on whole mini-batches."""
    config = update_config(method)
    model = copy.deepcopy(start[0])
    reference = random_model(spread=0.12)
    batches, advantages = er.mini_batches(config, start[1], REWARDS, 1)
    parts = [er.Rollouts(*[value[batch] for value in vars(start[1]).values()]) for batch in batches]
    old = [own_logprobs(model, part, 0.9)[0].detach() for part in parts]
    losses = []
    norms = []
    for number, part in enumerate(parts):
        logprobs, entropy = own_logprobs(model, part, 0.9)
        loss = er.policy_loss(config, logprobs, old[number], advantages[batches[number]], part.response_mask,
                              er.seeded("cpu", 0, 1, number, "selection"), entropy=entropy,
                              ref_logprobs=own_logprobs(reference, part, 0.9)[0])
        losses.append(loss.item())
        gradient = parameters_to_vector(torch.autograd.grad(loss, list(model.parameters())))
        norms.append(gradient.norm().item())
        weights = parameters_to_vector(model.parameters()) - config.lr * gradient / max(1, norms[-1])
        vector_to_parameters(weights.detach(), model.parameters())
    for size in [1, 3, 100]:
        row, found = learn(start, update_config(method, micro_batch=size))
        assert row["updates"] == 3 and bool(row["selected_tokens"]) == ("cov" in method)
        assert (row["clip_fraction"] > 0) == (method not in ("pg", "kl_cov"))
        assert row["loss"] == pytest.approx(fmean(losses), abs=1e-4)
        assert row["grad_norm"] == pytest.approx(fmean(norms), rel=1e-3)
        agree(found, weights, f"micro_batch {size}: weights", 1e-4)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_update_ratio_one(size, start):
    """At unmoved weights every ratio is exactly 1."""
    equal = []

    def look(config, logprobs, old_logprobs, *rest):
        equal.append(logprobs.requires_grad and torch.equal(logprobs, old_logprobs))

    with on_call("token_losses", 0, look):
        learn(start, update_config(micro_batch=size, lr=1e-12))  # three steps that move nothing
    assert len(equal) >= 3 and all(equal)


@pytest.mark.parametrize("fault", [lambda x: x.detach() * math.inf, lambda x: (x - x.detach()).abs().sqrt()],
                         ids=["loss", "gradient"])
def test_update_without_a_finite_number(fault, start, monkeypatch):
    """A step of no finite loss or gradient is counted and leaves the weights; the next one is made."""
    losses = er.token_losses
    calls = []

    def faulty(config, logprobs, *rest):
        calls.append(1)
        return losses(config, logprobs, *rest) + (fault(logprobs) if len(calls) == 1 else 0)

    monkeypatch.setattr(er, "token_losses", faulty)
    for updates in [1, 3]:
        calls.clear()
        row, weights = learn(start, update_config("pg", updates=updates))
        unmoved = torch.equal(weights, parameters_to_vector(start[0].parameters()))
        assert row["skipped_updates"] == 1 and weights.isfinite().all() and unmoved == (updates == 1)


def test_update_by_a_new_method(start, monkeypatch):
    """Its selection gets the entropy of the rollout, its loss that of the policy."""
    rows = er.mini_batches(update_config(updates=1), start[1], REWARDS, 1)[0][0]
    part = er.Rollouts(*[value[rows] for value in vars(start[1]).values()])
    seen = []
    monkeypatch.setitem(er.METHODS, "mine", ["selection", "entropy"])
    monkeypatch.setitem(er.CHOICES, "method", ["mine"])
    with on_call("select_tokens", 1, lambda *arguments: seen.append(arguments[6])):
        with on_call("token_losses", 1, lambda *arguments: seen.append(arguments[5].detach())):
            learn(start, update_config("mine", updates=1))
    expected = [part.entropy, own_logprobs(start[0], part, 0.9)[1].detach()]
    for found, entropy in zip(seen, expected, strict=True):
        agree(found * part.response_mask, entropy * part.response_mask, "entropy", 1e-4)


def test_update_token_statistics():
    """Table 1's means, quadrants, the clipped share and KL of a mini-batch."""
    data = example(3, 20, 20)
    selected = data.mask & (torch.rand(20, 20, generator=seeded(0)) < 0.2)
    found = er.token_statistics(er.Config(method="grpo"), data.logprobs.detach(), data.old_logprobs,
                                data.advantages, data.mask, selected)
    covariance = covariance_loop(data)
    ranked = sorted(covariance.values(), reverse=True)
    M = len(ranked)
    logprob = data.logprobs.detach()[data.mask]
    advantage = data.advantages[:, None].expand(20, 20)[data.mask]
    ratio = (logprob - data.old_logprobs[data.mask]).exp()
    clipped = torch.where(advantage > 0, ratio > 1.2, ratio < 0.8) & (advantage != 0)
    quadrants = torch.zeros(3, 4)
    for (i, t), value in covariance.items():
        quadrant = 2 * (data.advantages[i] <= advantage.mean()) + (data.logprobs[i, t] <= logprob.mean())
        quadrants[:, int(quadrant)] += torch.tensor([1 / M, value / M, selected[i, t]])
    expected = dict(zip(["quadrant_tokens", "quadrant_cov", "quadrant_selected"], quadrants.tolist()))
    expected.update(cov_mean=fmean(ranked), selected_tokens=int(selected.sum()),
                    selected_fraction=int(selected.sum()) / M, clip_fraction=clipped.sum().item() / M,
                    approx_kl=(ratio - 1 - ratio.log()).mean().item())
    for name in ["0.02", "0.2", "2", "20", "50"]:
        expected["cov_top_" + name] = fmean(ranked[:max(1, int(M * float(name) / 100))])
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


# The evaluation


def test_pass_at_k():
    """The share of the k-subsets with a right response, for all n up to 6."""
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            right = [any(subset) for subset in itertools.combinations([True] * c + [False] * (n - c), k)]
            assert er.pass_at_k(n, c, k) == pytest.approx(fmean(right), abs=1e-12), f"n {n}, c {c}, k {k}"


RIGHT = [[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1]]  # four responses a problem
GREEDY = [[1], [0], [1], [1], [0]]


def test_evaluate(monkeypatch):
    """avg@k, its standard error, pass@k and greedy of known responses, by hand."""
    def known_rollouts(model, prompts, *, group_size, temperature, greedy, generator, **rest):
        assert len(prompts) * group_size <= 8, "no more at once than in training"
        assert greedy or (temperature == 0.6 and generator.initial_seed() == seed)
        tokens = []
        for ids in prompts:
            tokens += [[20 * right + ids[0], 9, 9] for right in (GREEDY if greedy else RIGHT)[ids[0]]]
        mask = torch.tensor([[True, True, False]] * len(tokens))
        return er.Rollouts(torch.tensor(tokens), None, mask, None, None)

    seed = er.seeded("cpu", 3, "evaluation").initial_seed()  # the same at every evaluation
    monkeypatch.setattr(er, "sample_rollouts", known_rollouts)
    monkeypatch.setattr(er, "math_reward", lambda text, answer: float(text == answer))
    problems = []
    for i in range(5):
        problems.append({"problem": i, "answer": f"[{20 + i}, 9]", "prompt_ids": [i], "in_thought": False})
    config = er.Config(eval_samples=4, prompts=2, group_size=4, updates=1, seed=3)
    row, samples = er.evaluate(config, policy_of(types.SimpleNamespace(device=torch.device("cpu"))), problems)
    error = math.sqrt((0.36 + 0.0225 + 0.16 + 0.01 + 0.0225) / 4 / 5)  # about 0.4, of 1, 1/4, 0, 1/2, 1/4
    assert row.pop("eval_pass_at") == pytest.approx({1: 0.4, 2: (1 + 1 / 2 + 0 + 5 / 6 + 1 / 2) / 5, 4: 0.8})
    expected = {"eval_avg": 0.4, "eval_avg_se": error, "eval_pass": 0.8, "eval_greedy": 0.6, "eval_k": 4}
    assert row == pytest.approx(expected)
    firsts = ["[20, 9]", "[21, 9]", "[2, 9]", "[23, 9]", "[4, 9]"]
    assert [sample["response"] for sample in samples] == firsts, "the first of each problem"


# -----------------------------------------------------------------------------
# Training, trust, data, reports

CLOCKS = ["seconds", "sampling_seconds", "tokens_per_second", "peak_memory_mb"]
SMALL = {"steps": 4, "prompts": 2, "group_size": 4, "updates": 2, "micro_batch": 8, "max_new_tokens": 4,
         "lr": 1e-2, "eval_every": 2, "eval_problems": 4, "eval_samples": 2, "checkpoint_every": 1,
         "threads": 1, "device": "cpu"}
FLAGS = """method advantage model data eval-data prompt-template eval-every eval-problems eval-samples
    steps prompts group-size updates micro-batch max-new-tokens temperature lr seed clip-low clip-high
    clip-cov-ratio clip-cov-low clip-cov-high kl-cov-fraction kl-cov-coef kl-estimator out resume compare
    seeds report check-theory eval-only threads""".split()
ROW = """step seconds reward entropy response_length truncated zero_std_groups loss grad_norm clip_fraction
    approx_kl cov_mean cov_top_0.02 cov_top_0.2 cov_top_2 cov_top_20 cov_top_50 selected_tokens
    selected_fraction tokens tokens_per_second peak_memory_mb""".split()
EVALUATION = ["eval_avg", "eval_avg_se", "eval_pass", "eval_greedy", "eval_k"]


# --- Runs of half a second: an untrained policy, a reward that any text can earn


def toy(patch):
    """Reward by a coin that the response's text is, so that there is something to learn."""
    patch.setattr(er, "math_reward", lambda response, gold: float(sum(map(ord, response)) % 2))
    patch.setattr(er, "TRAIN_PROBLEMS", 64)


@pytest.fixture
def toys(monkeypatch):
    toy(monkeypatch)
    return monkeypatch


def saved(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def policy(tmp_path_factory):
    return saved(*er.tiny_policy(0, width=32), tmp_path_factory.mktemp("policy"))


def flags(settings):
    arguments = []
    for name, value in settings.items():
        values = value if isinstance(value, list) else str(value).split(" ")
        arguments += [er.flag(name)] + ([str(v) for v in values] if value is not True else [])
    return arguments


@pytest.fixture(scope="session")
def make(policy):
    """make(out, setting=value, ...) trains with small settings, as main would. Returns the folder."""
    def run(out, **changes):
        er.train(er.Config(**er.parse(flags({"model": policy, "out": out, **SMALL, **changes}))))
        return Path(out)
    return run


@pytest.fixture(scope="session")
def runs(make, tmp_path_factory):
    """Unbroken runs by name: two steps, and the four that they are the first half of."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        toy(patch)
        return {"half": make(folder / "half", steps=2), "whole": make(folder / "whole")}


@pytest.fixture
def half(runs, tmp_path):
    """A copy of the run of two steps, to break."""
    return shutil.copytree(runs["half"], tmp_path / "half")


@pytest.fixture
def cli(policy, toys, tmp_path, capsys):
    """cli("--steps 2", out=...) runs main with small settings: (status, stdout, lines of stderr)."""
    def call(text="", picture=False, **changes):
        settings = {"model": policy, "out": tmp_path / "run", **SMALL, **changes}
        capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            for library in ["datasets", "transformers", "huggingface_hub"]:
                for handler in logging.getLogger(library).handlers:
                    if type(handler) is logging.StreamHandler:
                        patch.setattr(handler, "stream", sys.stderr)  # where a user would see it
            if not picture:  # a second each
                patch.setattr(er, "draw", lambda *arguments: None)
            status = er.main(flags(settings) + shlex.split(text))
        out, err = capsys.readouterr()
        return status, out, err.splitlines()
    return call


def refused(result, *words):
    """Exit status 2, and one line on stderr that has the words."""
    status, _, errors = result
    assert status == 2 and len(errors) == 1, result
    assert not [word for word in words if word not in errors[0]], errors[0]
    return True


def rows_of(run, name="metrics.jsonl"):
    """A log but for times, from strict JSON."""
    def strict(token):
        raise AssertionError(f"{token} in the log")
    rows = [json.loads(line, parse_constant=strict) for line in Path(run, name).read_text().splitlines()]
    return [{key: row[key] for key in row if key not in CLOCKS} for row in rows]


def state_of(run):
    return torch.load(Path(run, "checkpoint.pt"), weights_only=True)


def same(a, b):
    """Equal to the last bit: tensors and numbers in dicts and lists."""
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    return True


def weights_of(folder):
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict())


def files_of(run):
    paths = [path for path in sorted(Path(run).rglob("*")) if path.is_file()]
    return {path.relative_to(run): path.read_bytes() for path in paths}


def assert_same_run(run, other):
    """Rows, samples, weights, optimizer and saved policy agree to the last bit."""
    for name in ["metrics.jsonl", "samples.jsonl"]:
        assert rows_of(run, name) == rows_of(other, name)
    for key in ["step", "model", "optimizer"]:
        assert same(state_of(run)[key], state_of(other)[key])
    assert files_of(run / "policy") == files_of(other / "policy")


def in_child(work):
    """Fork a process that does the work in silence, and exits with 0 if nothing is raised; its id."""
    pid = os.fork()
    if pid == 0:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        os.dup2(null, 2)
        with contextlib.suppress(BaseException):
            work()
            os._exit(0)
        os._exit(1)
    return pid


def interrupt(*arguments):
    signal.raise_signal(signal.SIGINT)


def damage(run, name, edit):
    """Replace a file of a run by what edit makes of its bytes."""
    path = run / name
    path.write_bytes(edit(path.read_bytes()))


# --- The module and its command line


def test_import_starts_nothing(tmp_path):
    """No thread, no connection, no file, no other setting of torch."""
    def settings():
        return [torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
                threading.active_count(), torch.random.get_rng_state().tolist()]

    def work():
        os.chdir(tmp_path)
        os.environ.update(HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path), HF_HOME=str(tmp_path))
        sys.modules["resource"] = sys.modules["fcntl"] = None  # as on Windows
        sys.addaudithook(lambda event, arguments: os._exit(1) if event == "socket.connect" else None)
        for name in [er.__name__, "datasets", "matplotlib"]:
            sys.modules.pop(name, None)
        torch.set_num_threads(2)
        before = settings()
        importlib.import_module(er.__name__)
        assert settings() == before and not {"datasets", "matplotlib"} & set(sys.modules)
    assert os.waitpid(in_child(work), 0)[1] == 0 and not list(tmp_path.iterdir())


def test_flags(capsys):
    """--help has every flag of the contract, in groups with the modes first, with its defaults."""
    with pytest.raises(SystemExit):
        er.main(["--help"])
    text = capsys.readouterr().out
    assert not [name for name in FLAGS if not re.search(rf"^  --{name}\b", text, re.M)]
    groups = re.findall(r"^(\w[\w ]*):\n +-", text, re.M)
    assert groups[-6:] == ["modes", "method", "model and data", "training", "evaluation", "machine"]
    assert "[kl_cov]" in text and re.search(r"\[real\s+model:\s+1e-06\]", text)


def test_settings_of_a_real_model():
    """A real model gets the paper's settings, what is given wins; clips by method."""
    real = er.Config(**er.parse(["--model", "org/x", "--updates", "2"]))
    assert (real.updates, real.lr, real.kl_cov_fraction, real.clip_cov_high) == (2, 1e-6, 2e-3, 5.0)
    assert er.Config(**er.parse([])) == er.Config()
    found = [er.Config(method=name) for name in ["grpo", "clip_higher", "clip_cov"]]
    assert [(config.clip_low, config.clip_high) for config in found] == [(0.2, 0.2), (0.2, 0.28), (1.0, 1.0)]
    assert er.Config(method="clip_cov", clip_low=0.0).clip_low == 0.0
    assert er.Config(seed=3).out == "runs/kl_cov-seed3"


NAMED = """--no-such-flag 1; --step 3; --steps 0; --steps 2.5; --group-size 1; --temperature nan;
    --seed -1; --eval-problems 30000; --clip-cov-ratio 1.5; --report; --report nowhere; --report damaged;
    --report foreign; --device nope; --stop Q; --out good.txt/run; --model nobody/no-such-model;
    --model torn; --model wordless; --model coded; --data nowhere.jsonl; --data zero.jsonl;
    --data prose.jsonl; --data prose.parquet; --data binary.csv; --data scalars.jsonl; --data ragged.csv;
    --data answerless.jsonl; --data chat.jsonl; --data nobody/no-such-data"""  # the line has the last word
BAD = r"""
    --method ppo | --method grpo kl_cov
    --prompt-template What? | --prompt-template {problem}
    --updates 3 | --updates --prompts 2
    --clip-cov-low 5 --clip-cov-high 1 | --clip-cov-low below --clip-cov-high
    --seeds 0,1 | --seeds --compare
    --compare --seeds 0,x | --seeds 0,x
    --compare grpo ppo | ppo grpo
    --compare --method grpo | --compare
    --compare --eval-only | --compare --report --eval-only
    --data half.jsonl | half.jsonl
    --data letters.jsonl | --model write w
    --model shallow | shallow weights h.2
    --max-new-tokens 2000 | --max-new-tokens
    --prompts 100 | --prompts 100 64 lower
    --model tiny --data good.txt | --data --model
    --model tiny --eval-data good.txt | -data --model
    --data good.txt | good.txt .jsonl .csv .parquet
    --data columns.jsonl | columns.jsonl problem answer colour shape
"""  # arguments | words of the line
CASES = {" ".join(case.split()): case.split()[-1] for case in NAMED.split(";")}
CASES.update(line.strip().split(" | ") for line in BAD.strip().splitlines())


@pytest.fixture(scope="session")
def wrong(tmp_path_factory, policy):
    """A folder of files and folders, each wrong in its own way."""
    root = tmp_path_factory.mktemp("wrong")
    for name in ["damaged", "foreign"]:
        (root / name).mkdir()
        (root / name / "config.json").write_text('{"method": "grpo"}')
    texts = {
        "zero.jsonl": "", "prose.jsonl": "once upon\n", "prose.parquet": "upon a time", "good.txt": "1+1?",
        "columns.jsonl": '{"colour": 1, "shape": "2"}\n', "scalars.jsonl": '5\n"text"\n',
        "ragged.csv": "colour\n1,2,3\n", "letters.jsonl": '{"problem": "Why?", "answer": "2"}\n',
        "half.jsonl": '{"problem": "\\ud800", "answer": "2"}\n',
        "answerless.jsonl": '{"problem": "1", "answer": ""}\n{"problem": "2", "answer": ["1", "2"]}\n',
        "chat.jsonl": '{"prompt": [{"role": "user", "text": "1"}], "answer": 1}\n{"problem": [1]}\n',
        "damaged/metrics.jsonl": '{"step": 0}\n{"step"\n{"step": 2}\n',
        "foreign/metrics.jsonl": '{"loss": "low"}\n{"step": "one"}\n',
    }
    for name, text in texts.items():
        (root / name).write_text(text)
    (root / "binary.csv").write_bytes(b"\xff\xfe\x00\n" * 9)
    for name in ["torn", "wordless", "coded", "shallow"]:
        shutil.copytree(policy, root / name)
    damage(root, "shallow/config.json", lambda old: old.replace(b'"n_layer": 2', b'"n_layer": 3'))
    damage(root, "torn/model.safetensors", lambda old: old[:5000])
    for path in (root / "wordless").glob("tokenizer*"):
        path.unlink()
    own = {"model_type": "own", "auto_map": {"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.Own"}}
    (root / "coded" / "config.json").write_text(json.dumps(own))
    (root / "coded" / "code.py").write_text(f"open({str(root / 'boom')!r}, 'w')\nclass Own: pass\n")
    return root


@pytest.mark.parametrize("arguments", CASES)
def test_bad_input_ends_with_one_line(cli, wrong, toys, arguments):
    """It names what is wrong, before any long work, nothing executed."""
    for name in ["rollout_step", "evaluate", "imitate"]:
        toys.setattr(er, name, None)  # too late for a refusal
    toys.chdir(wrong)
    toys.setattr("builtins.input", lambda *question: "y")  # to whatever might ask
    assert refused(cli(arguments), *CASES[arguments].split())
    assert not (wrong / "boom").exists()


def test_out_of_memory_is_told_and_a_defect_is_not_hidden(cli):
    """Out of memory is one line; any other RuntimeError keeps its traceback."""
    def fail(*arguments):
        raise RuntimeError(message)
    with on_call("rollout_step", 0, fail):
        for message in ["CUDA out of memory. Tried 2 GiB", "DefaultCPUAllocator: can't allocate memory: you"]:
            assert refused(cli("--resume"), "out of memory", "--micro-batch", "--prompts")
        message = "a defect"
        with pytest.raises(RuntimeError, match="defect"):
            cli("--resume")


def test_check_theory_prints_second_order_errors(cli):
    """Halving eta quarters the error, for both theorems, at every step printed."""
    status, out, errors = cli("--check-theory")
    ratios = [float(line.split()[-1]) for line in out.splitlines() if line.strip()[:1].isdigit()]
    assert status == 0 and not errors and out.count("Theorem") == 2 and len(ratios) == 18
    assert ratios == pytest.approx([4] * 18, abs=0.4)


def test_a_closed_pipe(monkeypatch, capsys):
    """Output into a `head` that has gone, or into nothing, ends without a word."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "w") as pipe:  # closed at its end, as the interpreter does
        monkeypatch.setattr(sys, "stdout", pipe)
        assert er.main(["--check-theory"]) == 1
    monkeypatch.setattr(sys, "stdout", None)
    assert er.main(["--check-theory"]) == 0 and capsys.readouterr().err == ""


def test_a_terminal_without_unicode(monkeypatch, tmp_path):
    """A plus-minus sign becomes a question mark."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert er.main(["--report", *map(str, with_seeds(tmp_path, "grpo", [0.2, 0.4]))]) == 0
    assert b"0.300 ? 0.100" in sys.stdout.buffer.getvalue()


# --- Problems


def write(path, rows):
    """Rows as a data file of the name's suffix. Returns its path."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    else:
        getattr(datasets.Dataset.from_list(rows), f"to_{path.suffix[1:]}")(path)
    return path


def reader(chat_template=None):
    """An untrained policy that reads any text: each byte is a token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(er, "TINY_CHARACTERS", "".join(sorted(ByteLevel.alphabet())))
        model, tokenizer = er.tiny_policy(0, width=32)
    tokenizer.chat_template = chat_template
    return er.Policy(model, tokenizer, [1], [1], "")


@pytest.fixture
def read(toys):
    """read(data, ...): what is trained on and what is held out, for a policy that reads any text."""
    loaded = reader()
    toys.setattr(er, "load_policy", lambda config: loaded)

    def call(data, **changes):
        config = er.Config(**{"model": "reader", "data": str(data), "prompts": 1, "updates": 1,
                              "max_new_tokens": 4, **changes})
        return er.prepare(config)[1:]
    return call


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "é 'x' [1]*?.parquet"])
def test_data_files(read, tmp_path, name):
    """The same rows from every kind of file, whatever its name or the line ends inside a text."""
    rows = [{"problem": f"p{n}, \u2028é\u0085?", "answer": f"{n}/2"} for n in range(20)]
    train, held_out = read(write(tmp_path / name, rows + [{"problem": "q", "answer": None}]))
    found = [{"problem": row["problem"], "answer": row["answer"]} for row in train + held_out]
    assert sorted(map(str, found)) == sorted(map(str, rows)) and len(held_out) == 2


GOLDS = r"""
    9223372036854775808 | 9223372036854775808
    -0.10 | -0.10
    "2024-01-05" | 2024-01-05
    "nan" | nan
    ["4"] | 4
    [9007199254740993] | 9007199254740993
    "[\"4\"]" | 4
    "[\"x]" | ["x]
    "so\n#### \\frac{1}{2}" | \frac{1}{2}
    NaN |
    null |
    " " |
    ["4", "5"] |
    {"a": 1} |
    "#### Step 1\n LONG" |
"""  # in JSON | the gold; nothing: the row is skipped


def test_golds_are_the_text_of_the_file(read, tmp_path, capsys):
    """A gold is the text as it stands. What has no text, or no room, is skipped and counted."""
    pairs = [line.replace("LONG", 300 * "x").split(" |") for line in GOLDS.strip("\n").splitlines()]
    rows = [f'{{"problem": "p{number}", "answer": {pair[0]}}}\n' for number, pair in enumerate(pairs)]
    rows.append(f'{{"problem": "long{"x" * 300}", "answer": "1"}}\n')
    rows.append('{"problem": " ", "answer": "1"}\n')
    (tmp_path / "a.jsonl").write_text("".join(rows))
    found = {row["problem"]: row["answer"] for row in sum(read(tmp_path / "a.jsonl"), [])}
    assert found == {f"p{number}": pair[1].strip() for number, pair in enumerate(pairs) if pair[1]}
    assert f" 8 of {len(rows)} rows " in "".join(capsys.readouterr())


@pytest.mark.parametrize("values, golds", [
    ([9007199254740993, None, 7], ["7", "9007199254740993"]),
    ([math.nan, 0.5, 0.25], ["0.25", "0.5"]), ([["4"], None, ["5"]], ["4", "5"]),
    ([date(2024, 1, 5), date(2023, 12, 31)], ["2023-12-31", "2024-01-05"]),
    ([Decimal("0.10"), Decimal("2.50")], ["0.10", "2.50"])])
def test_golds_of_a_table(read, tmp_path, values, golds):
    """The types of a parquet file change no gold."""
    rows = [{"problem": f"p{n}", "answer": value} for n, value in enumerate(values)]
    found = sum(read(write(tmp_path / "a.parquet", rows)), [])
    assert sorted(row["answer"] for row in found) == golds


@pytest.mark.parametrize("row", [
    {"problem": "1+1?", "answer": "2"}, {"question": "1+1?", "solution": "so #### 2"},
    {"prompt": [{"role": "system", "content": "Add"}, {"role": "user", "content": "1+1?"}],
     "ground_truth": "2"},
    {"problem": "1+1?", "answer": "", "solution": "\\boxed{2}"},
    {"prompt": "1+1?", "reward_model": {"style": "rule", "ground_truth": "2"}, "answer": None}])
def test_columns(read, tmp_path, row):
    """Question and answer columns by any of their names, at the top or one level down; a chat."""
    path = write(tmp_path / "d.jsonl", [{"id": 1, **row}])
    _, held_out = read("arithmetic", eval_data=str(path))
    assert (er.problem_text(held_out[0]["problem"]), held_out[0]["answer"]) == ("1+1?", "2")


def test_train_and_held_out_are_disjoint(read, tmp_path):
    """The built-in splits; one file for both, under two names too; repeated rows are one."""
    splits = [er.arithmetic_problems(name, 500) for name in ["train", "dev", "test"]]
    assert len({row["problem"] for row in sum(splits, [])}) == 1500
    path = write(tmp_path / "one.jsonl", [{"problem": f"p{n // 2}", "answer": "1"} for n in range(80)])
    other = f"{tmp_path}/../{tmp_path.name}/one.jsonl"
    for changes, count in [({}, 4), ({"eval_data": str(path)}, 4), ({"eval_data": other}, 9)]:
        train, held_out = read(path, eval_problems=9, **changes)
        problems = {row["problem"] for row in train + held_out}
        assert len(problems) == len(train) + len(held_out) == 40 and len(held_out) == count


@pytest.mark.parametrize("other", [
    lambda p: "  " + p.replace(" ", "\n\u00a0 ") + "\n",
    lambda p: [{"role": "system", "content": "Think."}, {"role": "user", "content": p + " "}],
    lambda p: [{"role": "user", "content": p + er.INSTRUCTION}]],
    ids=["blanks", "chat", "instruction"])
def test_held_out_problems_are_never_trained_on(read, tmp_path, other):
    """Though blanks or the form of a chat differ; the other problems stay."""
    asked = [f"What is {n} ?" for n in range(8)]
    data = write(tmp_path / "train.jsonl", [{"problem": problem, "answer": "1"} for problem in asked])
    rows = [{"problem": other(problem), "answer": "1"} for problem in asked[:4]]
    train, held_out = read(data, eval_data=str(write(tmp_path / "test.jsonl", rows)))
    assert sorted(row["problem"] for row in train) == asked[4:] and len(held_out) == 4


@pytest.mark.parametrize("layout, train, test", [
    ({"socratic": ["train", "test"], "main": ["train", "test"]}, "main train", "main test"),
    ({"default": ["validation", "train"]}, "default train", "default validation"),
    ({"default": ["test"]}, "default test", "default test")])
def test_hub_data_sets(monkeypatch, layout, train, test):
    """Which configuration and split of a hub data set is read, and whether one serves both."""
    def load(source, config):
        return {split: [f"{config} {split}"] for split in layout[config]}
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda source: list(layout))
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert er.read_rows("org/name", "train") == ([train], train == test)
    assert er.read_rows("org/name", "test") == ([test], train == test)


def test_the_order_of_the_data_depends_on_the_seed_alone(make, toys, tmp_path):
    """Every method sees the same problems; an epoch has each of them once."""
    toys.setattr(er, "TRAIN_PROBLEMS", 6)

    def order(name, **changes):
        seen = []
        with on_call("sample_and_reward", 0, lambda *arguments: seen.append(arguments[2])):
            make(tmp_path / name, steps=6, eval_every=0, **changes)
        return [[problem["problem"] for problem in batch] for batch in seen[1:]]  # step 0 looks only
    batches = order("a")
    assert batches == order("b", method="clip_cov", advantage="rloo") != order("c", seed=1)
    first = sum(batches[:3], [])
    second = sum(batches[3:], [])
    assert sorted(first) == sorted(second) and len(set(first)) == 6 and first != second


# --- Policies and prompts

PLAIN = "<{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}>"
PARTS = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}="
RAISES = PARTS.replace("part.text", "'' + part.text")  # for a text in place of parts
CHAT = [{"role": "user", "content": "1+1?"}]
SENTENCE = "1+1?" + er.INSTRUCTION


@pytest.mark.parametrize("problem, chat_template, template, prompt", [
    ("1+1?", None, "", SENTENCE + "\n"), (CHAT, None, "", SENTENCE + "\n"),
    ("1+1?", PLAIN, "Q: {problem}", "Q: 1+1?"),
    ("1+1?", PLAIN, "", f"<user:{SENTENCE}>"), (CHAT, PLAIN, "", "<user:1+1?>"), (CHAT, PARTS, "", "1+1?="),
    (CHAT, RAISES, "", "1+1?="), ("{x} {problem}", None, "{problem}!", "{x} {problem}!")])
def test_prompts(problem, chat_template, template, prompt):
    """A text and a chat, with a template, the model's own, one over content parts, or none."""
    policy = reader(chat_template)
    assert policy.tokenizer.decode(policy.encode(problem, template)) == prompt


@pytest.mark.parametrize("chat_template", [
    "hello", "{{ raise_exception('no') }}", "{{ messages[1].content[:2] }}", "{{ messages[1].content }}"])
def test_a_template_that_loses_the_problem_is_refused(chat_template):
    """One that gives something else, an error, a part, or the last message alone."""
    with pytest.raises(er.UserError, match="--prompt-template"):
        reader(chat_template).encode([{"role": "system", "content": "Base 2."}, *CHAT], "")


@pytest.mark.parametrize("writes, template, prompt", [
    ("<eos> $A <eos> <eos>", "{problem}", "<eos>1+1?"), ("<eos> $A", "<eos>{problem}", "<eos>1+1?"),
    ("<eos> $A <eos>", "", f"<user:{SENTENCE}>")])
def test_what_a_tokenizer_adds(writes, template, prompt):
    """No </s> at the end of a prompt, one <s> where both write it, none beside a chat template."""
    policy = reader(None if template else PLAIN)
    policy.tokenizer.bos_token = "<eos>"
    added = TemplateProcessing(single=writes, special_tokens=[("<eos>", 1)])
    policy.tokenizer.backend_tokenizer.post_processor = added
    assert policy.tokenizer.decode(policy.encode("1+1?", template)) == prompt


@pytest.mark.parametrize("opening, open_thought", [("<think>\n", True), ("<think></think>", False)])
def test_thoughts(toys, opening, open_thought):
    """<think> stays in the text; where the prompt opens a thought, so the response."""
    policy = reader()
    policy.tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    policy.model.resize_token_embeddings(len(policy.tokenizer))
    assert policy.response_text(policy.tokenizer("<think>5").input_ids + [1]) == "<think>5"
    seen = []
    toys.setattr(er, "math_reward", lambda response, gold: seen.append(response) or 0.0)
    toys.setattr(er, "load_policy", lambda config: policy)
    config = er.Config(max_new_tokens=4, prompt_template="{problem}" + opening, eval_only=True)
    _, _, samples = er.sample_and_reward(config, policy, er.prepare(config)[2][:1], 2, 1.0, seeded(0))
    texts = [sample["response"] for sample in samples]
    assert seen == texts and all(text.startswith("<think>") == open_thought for text in texts)


def test_models_of_others(cli, toys, tmp_path):
    """--stop ends a response and is no part of it; an id without an embedding pads, ends and asks nothing."""
    model, tokenizer = er.tiny_policy(0, width=32)
    tokenizer.add_special_tokens({"pad_token": "<p>", "additional_special_tokens": ["<new>"]})
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    folder = saved(model, tokenizer, tmp_path / "model")
    assert er.load_policy(er.Config(model=str(folder))).end_ids == [1]
    texts = []
    toys.setattr(er, "math_reward", lambda response, gold: texts.append(response) or 0.0)
    assert cli(model=folder, steps=1, stop="=")[0] == 0
    assert not any("=" in text for text in texts) and rows_of(tmp_path / "run")[1]["truncated"] < 1
    result = cli(model=folder, prompt_template="<new>{problem}", out=tmp_path / "no")
    assert refused(result, "--model", "embedding")


def test_dropout_is_off(policy):
    """So that the ratio can be 1 before an update."""
    assert not er.load_policy(er.Config(model=policy, device="cpu")).model.training


def other_crowd(expression, rng, brief):
    return "\\boxed{5}"


def test_warm_policies(toys, tmp_path):
    """Made once a seed; another seed, or other code, is another folder."""
    real = er.imitate
    steps = [1]
    toys.setattr(er, "imitate", lambda *arguments: real(*arguments, steps=steps[0], batch_size=4))
    toys.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = er.warm_policy(0)
    again = Path(first).rename(tmp_path / "first")
    assert er.warm_policy(0) == first and same(weights_of(first), weights_of(again))
    folders = [first, er.warm_policy(1)]
    for name, value in [("crowd_solution", other_crowd), ("CROWD", {**er.CROWD, "slip": 0.3}),
                        ("TRAIN_PROBLEMS", 65), ("TINY_CHARACTERS", er.TINY_CHARACTERS + "!")]:
        toys.setattr(er, name, value)
        folders.append(er.warm_policy(0))
    steps.clear()  # now nothing can be trained
    assert er.warm_policy(0) == folders[-1] and len(set(folders)) == 6
    weights = [weights_of(folder)["transformer.wte.weight"] for folder in folders[:2]]
    assert not torch.equal(weights[0], weights[1])


def test_two_processes_that_warm_up_at_once(toys, tmp_path):
    """The slower one takes the other's policy, and leaves no draft."""
    first = []

    def imitate(*arguments):
        if not first:
            first.append("")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "getpid", lambda: 1)
                first.append(er.warm_policy(0))
    toys.setattr(er, "imitate", imitate)
    toys.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert er.warm_policy(0) == first[1] and os.listdir(tmp_path / "entropy_rl") == [Path(first[1]).name]


def test_a_cache_that_cannot_be_written(cli, toys, tmp_path):
    """A cache under a file, or no home at all: one line, before the warm-up."""
    toys.setattr(er, "imitate", lambda *arguments: 1 / 0)
    (tmp_path / "file").touch()
    toys.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert refused(cli(model="tiny"), str(tmp_path / "file"))
    toys.delenv("XDG_CACHE_HOME")
    toys.setattr(os.path, "expanduser", lambda path: path)
    assert refused(cli(model="tiny"), "home", "XDG_CACHE_HOME")


# --- Training


def test_train_rows(runs):
    """The keys of the contract; step 0 evaluated, not updated; config, samples, a policy that loads."""
    run = runs["whole"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert not [key for row in rows for key in ROW if key not in row]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4] and rows[0]["loss"] is None
    assert [row["step"] for row in rows if set(EVALUATION) <= set(row)] == [0, 2, 4]
    assert rows[1]["selected_tokens"] > 0 and rows[1]["peak_memory_mb"] > 50
    assert json.loads((run / "config.json").read_text())["lr"] == 1e-2
    samples = rows_of(run, "samples.jsonl")
    assert {sample["step"] for sample in samples} == {0, 2, 4}
    assert set(samples[0]) == {"step", "problem", "response", "extracted", "answer", "reward"}
    assert same(weights_of(run / "policy"), state_of(run)["model"])


def test_one_seed_gives_one_run(policy, make, toys, runs, tmp_path):
    """One seed, one run, without the global random state; another seed, another run."""
    before = random.getstate(), torch.get_rng_state().tolist()
    toys.setattr(er, "resource", None)  # as on Windows: its key is null
    again = tmp_path / "again"
    rows = er.train(er.Config(**er.parse(flags({"model": policy, "out": again, **SMALL}))))
    lines = (again / "metrics.jsonl").read_text().splitlines()
    assert rows == [json.loads(line) for line in lines] and rows[1]["peak_memory_mb"] is None
    assert before == (random.getstate(), torch.get_rng_state().tolist())
    assert_same_run(again, runs["whole"])
    assert rows_of(make(tmp_path / "other", seed=1))[0] != rows_of(again)[0]


def test_eval_only_prints_numbers_and_trains_nothing(cli, runs, toys, tmp_path):
    """JSON with a run's last evaluation, from its saved policy; no folder, no update."""
    toys.setattr(er, "rollout_step", None)
    status, out, _ = cli("--eval-only", model=runs["whole"] / "policy")
    last = rows_of(runs["whole"])[-1]
    expected = {key: last[key] for key in last if "eval_" in key}
    assert status == 0 and json.loads(out) == {"eval_problems": 4, **expected}
    assert set(last["eval_pass_at"]) == {"1", "2"} and not (tmp_path / "run").exists()


def test_a_run_without_updates_says_so(cli, toys):
    """All groups all wrong: no law is drawn of nothing."""
    toys.setattr(er, "math_reward", lambda response, gold: 0.0)
    toys.setattr(er, "fit_entropy_law", lambda *arguments: 1 / 0)
    status, out, _ = cli(steps=10, eval_every=1, eval_problems=1, eval_samples=1, method="grpo", picture=True)
    assert status == 0 and "no update was made" in out and "law" not in out


def test_steps_without_a_finite_number_end_the_run(cli, toys, half):
    """One line at the first such step, weights and optimizer as before it."""
    before = state_of(half)
    losses = er.token_losses
    toys.setattr(er, "token_losses", lambda *arguments: losses(*arguments) * math.nan)
    assert refused(cli("--resume", out=half, steps=50), "finite", "--lr") and len(rows_of(half)) <= 6
    after = state_of(half)
    assert same(after["model"], before["model"]) and same(after["optimizer"], before["optimizer"])


# --- A run that is stopped, and its folder


def test_a_run_killed_at_random_moments_is_the_unbroken_run(make, toys, tmp_path):
    """kill -9 at random moments, each time resumed, changes nothing."""
    settings = {"method": "ref_kl", "checkpoint_every": 2, "steps": 40, "eval_every": 5, "ref_kl_coef": 1.0}
    started = time.perf_counter()
    whole = make(tmp_path / "whole", **settings)
    seconds = time.perf_counter() - started
    rng = random.Random(0)
    broken = tmp_path / "broken"
    for _ in range(8):
        child = in_child(lambda: make(broken, resume=True, **settings))
        time.sleep(rng.uniform(0, seconds / 4))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert 0 < len(rows_of(broken)) < 41, "killed before its end"
    assert_same_run(make(broken, resume=True, **settings), whole)


def test_what_a_crash_left_is_mended_at_resume(make, toys, runs, half):
    """Torn lines, later rows and drafts go; a longer run goes on from a shorter one."""
    (half / "config.json").write_text("[]")
    (half / "checkpoint.tmp").write_text("half a checkpoint")
    damage(half, "metrics.jsonl", lambda old: old + b'{"step": 3, "rew')
    damage(half, "samples.jsonl", lambda old: old + b'{"step": 4, "problem": ""}\n{"st')
    assert_same_run(make(half, resume=True), runs["whole"])


class Bomb:
    """What unpickles it calls this."""

    def __reduce__(self):
        return pytest.fail, ("the checkpoint was executed",)


def resaved(**changes):
    """An edit of a checkpoint: other entries; None: without it."""
    def edit(old):
        state = {**torch.load(io.BytesIO(old)), **changes}
        new = io.BytesIO()
        torch.save({key: state[key] for key in state if state[key] is not None}, new)
        return new.getvalue()
    return edit


@pytest.mark.parametrize("name, edit", [
    ("checkpoint.pt", lambda old: old[:5000]), ("checkpoint.pt", resaved(more=Bomb())),
    ("checkpoint.pt", resaved(config=None)), ("checkpoint.pt", resaved(model={})),
    ("metrics.jsonl", lambda old: old[:40]), ("metrics.jsonl", lambda old: b"not JSON\n" + old),
    ("samples.jsonl", lambda old: b"[]\n")],
    ids=["torn", "bomb", "no config", "no model", "short log", "no JSON", "samples"])
def test_a_damaged_run_is_refused(cli, half, name, edit):
    """One line names the damaged file; the checkpoint stays, and nothing in it is executed."""
    damage(half, name, edit)
    before = (half / "checkpoint.pt").read_bytes()
    assert refused(cli("--resume", out=half), name, "damaged")
    assert (half / "checkpoint.pt").read_bytes() == before


def test_a_lost_checkpoint_is_refused(cli, half):
    """A log without its checkpoint is not begun anew."""
    before = (half / "metrics.jsonl").read_bytes()
    (half / "checkpoint.pt").unlink()
    assert refused(cli("--resume", out=half), "checkpoint.pt", "missing")
    assert (half / "metrics.jsonl").read_bytes() == before


def test_a_run_is_never_overwritten(cli, half):
    """Without --resume, with settings that change the rows, with fewer steps: refused, nothing changed."""
    before = files_of(half)
    assert refused(cli(out=half), "--resume", "--out")
    for name, value in [("method", "pg"), ("kl_cov_coef", 3.0), ("seed", 1), ("eval_every", 1)]:
        assert refused(cli("--resume", out=half, **{name: value}), er.flag(name), "--resume")
    assert refused(cli("--resume --steps 1", out=half), "--steps 1", "2")
    assert files_of(half) == before
    assert cli("--resume --steps 3 --checkpoint-every 2", out=half)[0] == 0  # neither changes a row


def test_a_model_folder_is_not_a_run_folder(cli, policy):
    """--out that names somebody's model changes nothing in it."""
    before = files_of(policy)
    for more in ["", "--resume"]:
        assert refused(cli(more, out=policy), str(policy))
    assert files_of(policy) == before


def test_a_failed_start_does_not_block_the_next(cli, make, tmp_path):
    """What it left behind needs no --resume, and no other --out."""
    assert refused(cli(data="missing.jsonl"), "missing.jsonl")
    assert len(rows_of(make(tmp_path / "run", steps=1))) == 2


def test_two_processes_on_one_folder(cli, make, tmp_path):
    """A second process in a run's folder is refused in one line, also before the first row."""
    def wait(*arguments):
        (tmp_path / "started").touch()
        while not (tmp_path / "go").exists():
            time.sleep(0.002)
    with on_call("load_policy", 1, wait):
        child = in_child(lambda: make(tmp_path / "run", steps=1))
    while not (tmp_path / "started").exists():
        time.sleep(0.002)
    result = cli()
    (tmp_path / "go").touch()
    os.waitpid(child, 0)
    assert refused(result, "another process", "--out")
    assert len(rows_of(tmp_path / "run")) == 2


@pytest.mark.parametrize("name, number", [("token_losses", 3), ("append", 6)], ids=["update", "log"])
def test_ctrl_c_finishes_the_step(cli, make, runs, tmp_path, name, number):
    """SIGINT in a step: it is finished, the checkpoint written, 130; resumed, the unbroken run."""
    with on_call(name, number, interrupt):
        status, out, _ = cli(checkpoint_every=3)
    rows = rows_of(tmp_path / "run")
    assert status == 130 and "--resume" in out and 1 < len(rows) < 5
    assert state_of(tmp_path / "run")["step"] == rows[-1]["step"]
    assert_same_run(make(tmp_path / "run", resume=True), runs["whole"])


def test_a_second_ctrl_c_stops_at_once(cli, make, runs, tmp_path):
    """130 without finishing the step, and the run can be gone on with."""
    with on_call("token_losses", 0, interrupt):
        assert cli()[0] == 130
    assert len(rows_of(tmp_path / "run")) == 1
    assert_same_run(make(tmp_path / "run", resume=True), runs["whole"])


def test_ctrl_c_is_as_before_after_an_error(make, toys, tmp_path):
    """A run that fails leaves Ctrl-C to whoever had it before."""
    toys.setattr(er, "rollout_step", lambda *arguments: er.check(False, "no"))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(er.UserError):
        make(tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("name, number, word", [("save_checkpoint", 3, "checkpoint.pt"),
                                                ("save_pretrained", 1, "policy")])
def test_a_disk_that_fills_up_leaves_the_last_checkpoint(cli, make, runs, tmp_path, name, number, word):
    """A write that fails half-way: one line, exit 2, and the run can be gone on with."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(*arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, old[1]))
    with on_call(name, number, fill, er.GPT2LMHeadModel if name == "save_pretrained" else er):
        try:
            result = cli()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert refused(result, word)
    assert_same_run(make(tmp_path / "run", resume=True), runs["whole"])


# --- Reports


def synthetic(folder, points, **changes):
    """A run folder with a log of (entropy, accuracy) points."""
    update = {"cov_mean": 0.5, "most_selected": {"\x1b[2J": 2, "=": 6}, "updates": 1, "skipped_updates": 0,
              "selected_tokens": 8, "quadrant_tokens": [0.1, 0.2, 0.3, 0.4],
              "quadrant_selected": [6, 0, 0, 2],
              "quadrant_cov": [0.5, -0.25, -0.25, 0.5], **{f"cov_top_{p:g}": 50.0 - p for p in er.COV_TOP}}
    rows = []
    for step, (entropy, accuracy) in enumerate(points):
        row = {"step": step, "entropy": entropy, "response_length": 9.0, "seconds": 1.0, "eval_avg": accuracy,
               "eval_pass": accuracy and 1 - accuracy}
        rows.append({**row, **update} if step else row)
    folder.mkdir(parents=True)
    config = {"method": "grpo", "model": "m", "data": "d", "seed": 0, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    write(folder / "metrics.jsonl", rows)
    sample = {"step": 0, "problem": "\x1b[31m1", "response": "\u202e\r", "answer": "2\x07", "reward": 1.0}
    write(folder / "samples.jsonl", [sample, sample])
    return folder


def decay(n):
    """n points that follow the law R = -0.25 exp(H) + 0.875."""
    return [(h, -0.25 * math.exp(h) + 0.875) for h in (1.2 * 0.9 ** i for i in range(n))]


def test_report_of_a_known_law(cli, tmp_path):
    """The law; Fig. 2's shares; Table 1; quadrants; tokens and samples, escaped; a picture."""
    points = decay(31)
    run = synthetic(tmp_path / "grpo-seed0", points)
    status, out, errors = cli(report=run, picture=True)
    assert status == 0 and not errors and all(c.isprintable() or c == "\n" for c in out)
    assert "a 0.2500, b 0.8750, ceiling b - a 0.625; R2 1.000, RMSE 0.0000 on 31 points" in out
    for at, name in [(2, "1/12"), (10, "1/3")]:
        spent = (points[at][0] - points[0][0]) / (points[-1][0] - points[0][0])
        gained = (points[at][1] - points[0][1]) / (points[-1][1] - points[0][1])
        assert re.search(f"{name} of the run.* {spent:.0%} of the entropy.* {gained:.0%} of the gain", out)
    mean_entropy = sum(h for h, _ in points[-3:]) / 3  # over the last tenth
    assert re.search(rf"grpo +{mean_entropy:.3f} +9.000 +{points[-1][1]:.3f} ", out)
    assert "top 0.02 % 49.980" in out and "all 0.500" in out and r"= 180, \x1b[2J 60" in out
    assert re.search(r"share of the tokens +0.100 +0.200 +0.300 +0.400\n +part of the mean Cov +0.500 ", out)
    assert re.search(r"share of the selected +0.750 +0.000 +0.000 +0.250", out) and r"\u202e\r" in out
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("points, method, words", [
    (decay(9), "grpo", "no law: it needs ten"), (decay(10), "pg", " law (Eq. 6)"),
    (decay(12), "kl_cov", "no law: the paper"),
    ([(0.5, 0.1)] * 12, "grpo", "no law"), ([(h, None) for h, _ in decay(12)], "grpo", "no law")])
def test_reports_that_have_no_law(cli, tmp_path, points, method, words):
    """No law under ten points, of one entropy, of a method that intervenes; a dash for what is not known."""
    status, out, errors = cli(report=synthetic(tmp_path / "run", points, method=method))
    assert status == 0 and not errors and "nan" not in out
    assert words in out and out.count(" law") == 1


def test_prediction_of_a_law_that_is_broken(cli, tmp_path):
    """RMSE and last error, by hand: off by 0.1 where the log leaves the law."""
    points = decay(12)
    points[-1] = (points[-1][0], points[-1][1] - 0.1)
    out = cli(report=synthetic(tmp_path / "run", points))[1]
    rmse = math.sqrt(0.01 / 8)
    assert re.search(rf"first 4 points: RMSE {rmse:.4f} over the .*, \+0.1000 at the last", out)
    assert "first 3 points: RMSE 0.0333" in out


def test_report_of_a_run_whose_loss_was_no_number(cli, tmp_path):
    """A step of which nothing finite is known is left out of Table 1."""
    run = synthetic(tmp_path / "run", decay(12))
    damage(run, "metrics.jsonl", lambda old: old.replace(b'"cov_mean": 0.5', b'"cov_mean": null', 1))
    assert cli(report=run)[0] == 0


def test_report_of_a_killed_run_without_matplotlib(cli, toys, tmp_path):
    """A torn last line is left out; one line says what to install."""
    run = synthetic(tmp_path / "run", decay(12))
    for name in ["metrics.jsonl", "samples.jsonl"]:
        damage(run, name, lambda old: old + b'{"step": 1')
    toys.setitem(sys.modules, "matplotlib.figure", None)
    status, out, errors = cli(report=run, picture=True)
    assert status == 0 and not errors and "a 0.2500, b 0.8750" in out
    assert out.count("pip install matplotlib") == 1


def with_seeds(folder, method, values):
    """A run folder a seed: 0.5 is avg@k at the start, the value at the end."""
    return [synthetic(folder / f"{method}-seed{seed}", [(1.0, 0.5), (0.5, value)], seed=seed, method=method)
            for seed, value in enumerate(values)]


def test_table_of_replicates(cli, tmp_path):
    """Means and standard errors over seeds, and differences in pairs, by hand."""
    runs = with_seeds(tmp_path, "grpo", [0.2, 0.4, 0.6]) + with_seeds(tmp_path, "kl_cov", [0.3, 0.7])
    out = cli(report=runs)[1]
    assert re.search(r"before +1.000 ± 0.000 +9.000 ± 0.000 +0.500 ± 0.000 +0.500 ± 0.000 +- ", out)
    assert re.search(r"grpo +0.500 ± 0.000 +9.000 ± 0.000 +0.400 ± 0.115 ", out)
    assert re.search(r"kl_cov +0.500 ± 0.000 +9.000 ± 0.000 +0.500 ± 0.200 ", out)
    assert re.search(r"kl_cov: avg@k less grpo's.*: 0.2000 ± 0.1000 \(positive on 2 of 2", out)
    assert re.search(r"kl_cov: pass@k less grpo's.*: -0.2000 ± 0.1000 \(positive on 0 of 2", out)
    assert "nan" not in out


def test_a_run_is_one_replicate(cli, tmp_path):
    """Not two: a folder given twice; not seeds of one group: runs of one name in two folders."""
    run = with_seeds(tmp_path / "one", "grpo", [0.5])[0]
    other = with_seeds(tmp_path / "two", "grpo", [0.7])[0]
    for again in [f"{run}/", other]:
        assert "±" not in cli(report=[run, again])[1]


def test_compare_trains_each_run_once(cli, toys, tmp_path):
    """The named methods on each seed, from one start; stopped, it goes on."""
    out = tmp_path / "all"
    settings = {"steps": 2, "compare": "grpo kl_cov", "seeds": "0,1,01", "out": out}
    with on_call("update", 8, interrupt):
        assert cli(**settings)[0] == 130
    assert len(os.listdir(out)) == 3
    assert cli(**settings)[0] == 0
    names = ["grpo-seed0", "grpo-seed1", "kl_cov-seed0", "kl_cov-seed1"]
    assert sorted(os.listdir(out)) == names
    assert rows_of(out / "grpo-seed0")[0] == rows_of(out / "kl_cov-seed0")[0]
    before = {path: path.read_bytes() for path in out.rglob("*.jsonl")}
    toys.setattr(er, "rollout_step", None)
    assert "kl_cov: avg@k less grpo's" in cli(**settings)[1]
    assert {path: path.read_bytes() for path in before} == before


def test_picture_of_several_runs(cli, toys, tmp_path):
    """Four panels with titles, a colour for each group, no law of a method that intervenes."""
    from matplotlib.figure import Figure
    figures = []
    toys.setattr(Figure, "savefig", lambda figure, path, **more: figures.append(figure))
    runs = [synthetic(tmp_path / name, decay(12), method=name) for name in ["grpo", "kl_cov", "mine"]]
    assert cli(report=runs, picture=True)[0] == 0
    axes = figures[0].axes
    assert len(axes) == 4 and all(axis.get_title() and axis.get_xlabel() for axis in axes)
    assert len({line.get_color() for line in axes[0].get_lines()}) == 3
    laws = [line for line in axes[2].get_lines() if line.get_linestyle() == "-"]
    assert len(laws) == 1, "a law for kl_cov and mine"


# -----------------------------------------------------------------------------
# The verifier (section 8)

SAME = [  # prediction, gold: the same answer
    ("42", "42"), ("−17", "-17"), (r"\mathbf{\frac{5}{12}}", r"\frac{5}{12}"), ("x÷y", "x/y"),
    ("1,234,567", "1234567"), ("1, 234, 567", "1234567"), (r"\$1,234.50", "1234.5"), (".5", "0.5"),
    (r"\dfrac{3}{4}", r"\frac34"), (r"2\frac{1}{3}", r"\frac73"), ("2 1/3", r"\frac73"),
    (r"-2\frac{1}{2}", "-2.5"), (r"\frac{1}{2}(3^{2024}-1)", r"\frac{3^{2024}-1}{2}"),
    ("2*sqrt(3)", r"2\sqrt3"), (r"3 \times 10^5", "300000"), (r"\log_2 8", "3"), (r"\sec x", r"1/\cos x"),
    ("|x-3|", "|3-x|"), (r"\frac{\hbar^2k^2}{2m}", r"\frac{(\hbar k)^{2}}{2 m}"),
    (r"\sqrt{1-x^2}", "(1-x^2)^{1/2}"), ("x = 5", "5"), (r"\sqrt{3^2 + 4^2} = \sqrt{25} = 5", "5"),
    (r"\frac{x^2}{4}+y^2=1", "x^2+4y^2=4"), (r"s^2-8r^2 \le 0", r"s^2 \le 8r^2"), (r"2x \le 4", r"x \le 2"),
    (r"x \leqslant 4", r"x \le 4"), (r"\left( 1 , \frac12 \right)", "(1,0.5)"), ("(x,y) = (1,2)", "(1,2)"),
    (r"[0, +\infty)", r"[0,\infty)"), ("(2,3) U (0,1]", r"(0,1] \cup (2,3)"),
    ("(-∞,1)∪(3,∞)", r"(3,\infty)\cup(-\infty,1)"), ("1, 2, and 3", "3,2,1"), ("120,150", "120, 150"),
    ("1,000, 2,000", "1,000, 2,000"), ("1,234 and 5", "5, 1234"), (r"\$1,200, \$300", r"\$1,200, \$300"),
    (r"\pm 3", "3,-3"), (r"x = \pm 2", "-2, 2"),
    (r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"),
    ("(1,2)", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"), (r"i\sqrt{2}", r"\sqrt{-2}"), ("-i", r"\frac{1}{i}"),
    (r"4.5 \times 10^{3} \text{ J}", r"4.5\cdot 10^3"), ("5", r"5 \text{ cm}"),
    (r"5\hbox{ cm}", r"5\text{ cm}"), (r"5^\circ\text{C}", "5"), ("30°", r"30^{\circ}"), ("25", r"25\%"),
    ("25 percent", r"25\%"), ("0.25", r"25\%"), (r"\$5", "5"), ("5 dollars", r"\$5"),
    (r"\$1{,}000", r"1000\text{ dollars}"), (r"52_{\text{eight}}", "52_8"), ("42_{10}", "42"),
    (r"3\!:\!4", "3:4"), ("3 to 2", "3:2"), (r"\textbf{(C)}\ 12", r"\text{(C)}"), (r"\text{Option B}", "B"),
    ("Even", r"\text{even}"), ("no", "No"),
]

DIFFERENT = [  # prediction, gold: another answer
    ("3 fifths", "3"), ("3 quarters", "3"), ("5 root", "5"), ("5 or more", "5"), ("5 or less", "5"),
    ("5 fewer", "5"), ("5 negative", "5"), ("5 factorial", "5"),
    ("42", "43"), ("2{3}", "6"), ("(1,234)", "1234"), ("0.33", r"\frac{1}{3}"),
    (r"0.\overline{36}", r"0.\overline{63}"), ("3.14159...", r"\pi"), (r"\frac{1}{0}", "0"), ("2½", "21/2"),
    ("1e999999", "1"), (r"\sin 30", r"\frac12"), (r"\cot 10^\circ", r"\cot 10"), ("f(x)+f(y)", "f(x+y)"),
    (r"7 \times 6 = 43", "43"), ("5=6", "5"), ("xy=7", "x=7"), ("-x < 2", "x < -2"), ("x > 2", r"[2,\infty)"),
    ("(2,1)", "(1,2)"), ("(0,1)", "[0,1)"), ("1,1", "1,2"), (r"75\text{ mph}", r"75\text{ kph}"),
    ("5 never", "5"), (r"5^\circ\text{C}", r"5^\circ\text{F}"), (r"2.5\%", r"25\%"),
    (r"5\text{ cents}", r"\$5"), ("52_8", "52"), ("52_9", "52_8"), ("8_{10}", "8_9"), ("5:00 am", "5:00 pm"),
    ("odd", r"\text{even}"), (r"0.\overline{3}", "0.3"), (r"2\sqrt[3]{3}", r"2\sqrt3"), ("|x|", "x"),
    (r"\tan^{-1} 2", r"\cot 2"), ("x^2+2x-1", "(x+1)^2"), ("1", "1,2"), ("3", r"\pm 3"), ("1,2", "(1,2)"),
    (r"(0,1] \cap (2,3)", r"(0,1] \cup (2,3)"), ("(2,1), (3,4)", "(1,2),(3,4)"), ("C", "B"),
    (r"\begin{pmatrix}1&2\\3&5\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"), ("P(1,2)", "(1,2)"),
]

EXTRACT = [  # response, its answer
    (r"so \boxed{5}.", "5"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{1} then \boxed{2}", "2"),
    (r"\fbox{7}", "7"), (r"$\boxed 7$", "7"), (r"\boxed{5} and \boxed{6", "5"), (r"\boxed{}", ""),
    (r"<think>\boxed{1}</think> \boxed{2}", "2"), (r"<think>\boxed{1}</think> none", None),
    (r"\boxed{1}</think>", None), ('#### 5\n#### 7', "7"), ("The answer is 3. No, the answer is 4.", "4"),
    ('The answer is 4.\n#### 5', "5"), ('#### 5\nThe answer is 4.', "5"), (r"\boxed{5\}}", r"5\}"),
    (r"\boxed{\{5}", r"\{5"), ("The answer is $5$, since $2+3=5$.", "$5$"),
    ("The answer is 5 because 2+3=5.", "5"), ("#### 1,234", "1,234"), ("**Final Answer**: 12", "12"),
    ("The answer isn't 5", None), ('#### Step 1\nThe answer is 7.', "7"), ("Final Answer: **12**", "12"),
    ("", None), ('The answer is:\n$$\n5\n$$', "5"), ('The answer is:\n\\begin{align*}\n5\n', "5"),
    ("#### Monday", "Monday"), ("#### x = 5", "x = 5"), (r"\boxed5", "5"),
]

HACKS = [  # response, gold: not to be rewarded
    (r"\boxed{}", "5"), (r"\boxed{5 \text{ or } 6}", "5"), (r"\boxed{5, 6}", "5"), (r"\boxed{5 \pm 1}", "6"),
    (r"\boxed{1 \text{ or } 300}", "1300"), (r"\boxed{5=6}", "6"), (r"\boxed{3+4-2}", "5"),
    (r"\boxed{2*3}", "6"), (r"\boxed{\frac13+\frac14}", r"\frac{7}{12}"), (r"\boxed{?}", "5"),
    (r"\boxed{x}", "5"), (r"\boxed{x=x}", "5"), (r"<think>\boxed{5}", "5"), (r"\boxed{5", "5"),
    (r"\boxed{5\text{ and not }6}", "5"), (r"\boxed{\text{(A) (B)}}", "A"), (r"\boxed{(5, 6)}", "5"),
    (r"\boxed{x = 5 \text{ or } x = 6}", "5"), (r"\boxed{24_{10}}", "11000_2"), (r"\boxed{5} \boxed{6}", "5"),
    (r"\boxed{4x-5y=-50}", "-10"), (r"\boxed{1,2,3,4,5,6,7,8,9}", "5"), (r"\boxed{\mathbb{R}}", "[0,1]"),
]

HOSTILE = [     # refused or read as plain text, each within 0.1 s
    "9^9^9^9", "^".join(["9"] * 500), "9" * 10 ** 5, "-" * 10 ** 4 + "1", "(" * 10 ** 4 + "1" + ")" * 10 ** 4,
    "{" * 10 ** 4 + "}" * 10 ** 4, "[" * 900 + "1" + "]" * 900, "{" * 900 + "1" + "}" * 900, "\\frac{1}{" * 10 ** 4,
    "\\frac" * 300, "\\sqrt{" * 10 ** 4 + "2" + "}" * 10 ** 4, "\\sqrt" * 300 + "2", "99999!", "9!!!!!!!",
    "1e99999999", "10^{10^{10}}", "2^{-99999999}", "\\binom{10^9}{5\\cdot 10^8}", "\\pm" * 10 ** 4 + "1",
    "\\pm 1" * 300, ",".join(["1"] * 900), ",".join(["\\pm 1"] * 200), ",".join(["\\pm 1 \\pm 2 \\pm 3"] * 45),
    "1" + ",000" * 400, "1" + " 000" * 450 + "x", "\\begin{pmatrix}" + "&".join(["1"] * 900) + "\\end{pmatrix}",
    "f(C)" * 21, "f(x)" * 21 + "y", "(C)(C)" * 90, "v_{\\text{max}}" * 35,
    "\\begin{pmatrix}" * 120, "\\boxed{" * 10 ** 5, "\\boxed" * 10 ** 5, "<think>" * 10 ** 5, "</think>" * 10 ** 5,
    "<think></think>" * 10 ** 5, "#" * 10 ** 5, "answer is " * 10 ** 5, "answer is 5" + " " * 10 ** 5 + "x", "answer is 5" + ",;" * 10 ** 5 + "x",
    "answer: " * 10 ** 5, "####1" + " " * 10 ** 5 + "x", "answer" + "* " * 10 ** 5, "\\text{" * 300, " " * 10 ** 5,
    " " * 1990 + "x", "\\" * 1999, "$" * 1999, "\"" * 1999, "0." + "3" * 1990 + "...", "0." + "12" * 900 + "x",
    "|" * 999 + "1", "x" * 1999, "x^" * 999, "!" * 999, "\ud800", "\udfff\\boxed{\ud800}", "\x00\x01",
    "".join(map(chr, range(1, 1500))), "\\overline{" * 190, "1/" * 900 + "1", "sin " * 400, "a." * 900, "m." * 990,
    "=" * 1900, "x=" * 900, "<" * 1900, ":" * 1900, "∞" * 1900, "_" * 1900, "1_" * 900, "^°" * 900, "[0,1)∪" * 300,
    "((1,2)," * 280, "(97/89)^" * 20 + "1", "*".join(["(97/89)^{999}"] * 60),
    "+".join(f"1/{n}" for n in range(100, 400)), "+".join(f"x^{{{n}}}/{n+1}" for n in range(90)),
    "*".join(["2003!"] * 99), "+".join(["2999!"] * 60), "(x+1)^{99}" * 60, "\\sqrt{x}^{99}" * 60,
    "\\frac{(x+y)^{99}}{(x-y)^{98}}+" * 30 + "1", "1.0.0" * 300, "½" * 1900, "²" * 1900, "٣" * 9, "𝟓",
    "e^{e^{e^{e^{e^e}}}}", "\\tan(\\pi/2)", "0^{-1}", "0^0", "1/0", "\\log 0", "\\ln(-1)", "\\infty-\\infty",
]


@pytest.mark.parametrize("prediction, gold", SAME)
def test_answers_match(prediction, gold):
    """Two spellings of one answer match, and each matches itself."""
    assert er.answers_match(prediction, gold)
    assert er.answers_match(gold, gold)


@pytest.mark.parametrize("prediction, gold", DIFFERENT)
def test_answers_match_refuses(prediction, gold):
    """Another answer does not match."""
    assert not er.answers_match(prediction, gold)


@pytest.mark.parametrize("text, answer", EXTRACT)
def test_extract_answer(text, answer):
    """The final answer of a response is found."""
    assert er.extract_answer(text) == answer


def test_extract_answer_takes_anything():
    """No text, no answer."""
    assert er.extract_answer(None) is None
    assert er.extract_answer("") is None


@pytest.mark.parametrize("response, gold", HACKS)
def test_math_reward_refuses_hacks(response, gold):
    """What only looks like an answer earns nothing, and the answer itself does."""
    assert er.math_reward(response, gold) == 0.0
    assert er.math_reward(f"\\boxed{{{gold}}}", gold) == 1.0


def test_math_reward_on_pairs_written_blind():
    """Of 992 true and 1,047 false pairs by a writer who had not seen the verifier at most 12 % and 0.3 % go wrong."""
    path = Path(er.__file__).with_name(".github") / "blind_pairs.jsonl"
    wrong = {True: 0, False: 0}
    for line in path.read_text("utf-8").splitlines():
        pair = json.loads(line)
        wrong[pair["label"]] += er.math_reward(pair["text"], pair["gold"]) != pair["label"]
    assert wrong[True] <= 119
    assert wrong[False] <= 3


def test_math_reward_is_safe_and_fast():
    """No string raises or takes longer than a quarter of a second of this process's own time."""
    junk = random.Random(0)
    letters = "\\{}()[]^_.,;0123456789+-*/=<>|!&$% abcxyzfrsqtpi"
    hostile = HOSTILE + ["".join(junk.choices(letters, k=400)) for _ in range(200)]
    for text in hostile:
        box = f"\\boxed{{{text}}}"
        cases = [(box, "5"), (text, text[:50]), (box, f"({text})+1"), (f"\\boxed{{1,{text}}}", f"{text},1")]
        for response, gold in cases:
            start = time.process_time()
            assert er.math_reward(response, gold) in (0.0, 1.0)
            assert time.process_time() - start < 0.25, f"slow on {text[:60]!r} of {len(text)} characters"


@pytest.mark.parametrize("junk", [None, 5, 0.5, b"5", [], float("nan")])
def test_answers_match_takes_anything(junk):
    """What is no text matches nothing, and raises nothing."""
    assert not er.answers_match(junk, "5")
    assert not er.answers_match("5", junk)
    assert er.math_reward(junk, "5") == 0.0


@pytest.mark.parametrize("text, gold", [
    ("so 3 + 4 = 7.\n#### 7", "7"), ("It is \\boxed{\\frac12}.", "\\frac12"), ("No answer is possible", None),
    ("5 (the answer is exact)", None), ("#### Monday", "Monday"), ("x = 5", None), ("  12 ", "12"), ("word " * 50, "")])
def test_gold_answer(text, gold):
    """A gold is its box, what follows ####, or the text itself; a long text without either is none."""
    assert er.gold_answer(text) == (text if gold is None else gold)


# -----------------------------------------------------------------------------
# The course kit and the measurements


@pytest.mark.skipif("ENTROPY_RL" in os.environ, reason="the handout is made from the solution")
def test_handout(tmp_path):
    """The README's shell line makes a handout that imports; each exercise's tests fail on it, and pass here."""
    source = Path(er.__file__)
    readme = source.with_name("README.md")
    assert not readme.exists() or HANDOUT in readme.read_text()
    parts = source.read_text().split("    ### BEGIN SOLUTION\n")[:-1]
    exercises = [part.rpartition("\ndef ")[2].split("(")[0] for part in parts]
    assert len(exercises) >= 10
    handout = tmp_path / "blank_handout.py"  # a name of its own: a student's handout.py may lie in this folder
    subprocess.run(f"{HANDOUT} > {shlex.quote(str(handout))}", shell=True, check=True, cwd=source.parent)
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "--tb=no", "-p", "no:cacheprovider", __file__]
    command += ["-k", " or ".join(exercises)]
    environment = {**os.environ, "ENTROPY_RL": "blank_handout", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    results = re.findall(r"^(PASSED|FAILED|ERROR) .*::(test_\w+)", done.stdout, re.M)
    for exercise in exercises:
        outcomes = {outcome for outcome, test in results if f"_{exercise}" in test}
        assert outcomes and outcomes <= {"FAILED", "ERROR"}, f"{exercise}: {outcomes}\n{done.stdout[-2000:]}"
