"""Tests, each of them a claim: the verifier's tables, the exercises by the names of their functions, sampling and
training, then trust: resume, signals, numbers, disks, bad input, data, checkpoints, reports, and the handout.

    python -m pytest -q                                          # all
    ENTROPY_RL=handout python -m pytest -k token_covariance      # grade one exercise of a student's handout.py
"""
import contextlib
import errno
import importlib.util
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
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

os.environ |= dict(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

torch.set_num_threads(1)  # everything here is small
er = importlib.import_module(os.environ.get("ENTROPY_RL", "entropy_rl"))
close = torch.testing.assert_close
METHODS = ("grpo", "clip_higher", "clip_cov", "kl_cov", "entropy_bonus", "ref_kl", "pg")
HANDOUT = "sed '/### BEGIN SOLUTION/,/### END/{s/### BEGIN SOLUTION/raise NotImplementedError/p;d;}' entropy_rl.py"


# ---------------------------------------------------------------------------------------------------------------
# The algorithm

def seeded(seed):
    return torch.Generator().manual_seed(seed)


def batch(seed=0, rows=6, width=9, dtype=torch.float64):
    """A mini-batch as policy_loss takes it: log-probs with gradient, old ones (many ratios leave [0.8, 1.2], a row's
    are 1), advantages (one is 0), a mask of mixed lengths with junk off it, then entropy and reference log-probs."""
    g = seeded(seed)
    old = -3 * torch.rand(rows, width, generator=g, dtype=dtype)
    logprobs = old + 0.4 * torch.randn(rows, width, generator=g, dtype=dtype)
    advantages = torch.randn(rows, generator=g, dtype=dtype)
    logprobs[0], advantages[1] = old[0], 0
    mask = torch.arange(width) < torch.randint(1, width + 1, (rows, 1), generator=g)
    logprobs[~mask] -= 7
    entropy, ref = (torch.rand(rows, width, generator=g, dtype=dtype) for _ in range(2))
    return logprobs.requires_grad_(), old, advantages, mask, entropy.requires_grad_(), logprobs.detach() + ref - 0.5


def covariances(logprobs, advantages, mask):
    """Eq. 10 in loops: {(row, token): Cov} over the tokens of the mask."""
    tokens = [(i, t) for i in range(len(mask)) for t in range(mask.shape[1]) if mask[i, t]]
    mean_logprob = sum(logprobs[i, t].item() for i, t in tokens) / len(tokens)
    mean_advantage = sum(advantages[i].item() for i, _ in tokens) / len(tokens)
    return {(i, t): (logprobs[i, t].item() - mean_logprob) * (advantages[i].item() - mean_advantage)
            for i, t in tokens}


def picks(selected):
    return set(map(tuple, selected.nonzero().tolist()))


def test_group_advantages():
    """Each estimator equals its definition in loops, and a group of equal rewards gets zeros."""
    rewards = torch.tensor([1, 0, 0, 1, 0.25, 1, 0.5, 0, 1, 1, 1, 1], dtype=torch.float64)
    def normal(r, pool):
        mean = sum(pool) / len(pool)
        return (r - mean) / (math.sqrt(sum((x - mean) ** 2 for x in pool) / (len(pool) - 1)) + 1e-6)
    for size in (2, 4):
        found = {name: er.group_advantages(rewards, size, name).tolist() for name in ("grpo", "rloo", "reinforce_pp")}
        assert found["grpo"] == er.group_advantages(rewards, size).tolist()
        for i, r in enumerate(rewards.tolist()):
            group = rewards[i // size * size:][:size].tolist()
            assert found["grpo"][i] == pytest.approx(normal(r, group), abs=1e-9)
            assert found["rloo"][i] == pytest.approx(r - (sum(group) - r) / (size - 1), abs=1e-9)
            assert found["reinforce_pp"][i] == pytest.approx(normal(r, rewards.tolist()), abs=1e-9)
        assert not any(found["grpo"][8:] + found["rloo"][8:])
    assert not any(er.group_advantages(torch.ones(8), 4, name).any() for name in found)


def test_token_covariance():
    """Equals Eq. 10 in loops, is 0 off the mask and without gradient; its mean is the population covariance."""
    logprobs, _, advantages, mask, *_ = batch()
    found = er.token_covariance(logprobs, advantages, mask)
    expected = covariances(logprobs, advantages, mask)
    for i, t in itertools.product(*map(range, mask.shape)):
        assert found[i, t].item() == pytest.approx(expected.get((i, t), 0), abs=1e-12)
    assert not found.requires_grad
    pairs = torch.stack([logprobs[mask], advantages[:, None].expand_as(mask)[mask]]).detach()
    close(found[mask].mean(), torch.cov(pairs, correction=0)[0, 1])


def test_select_tokens_clip_cov():
    """Random picks strictly inside the window, no masked token nor one that PPO clips; floor(r M), at least 1."""
    logprobs, old, advantages, mask, *_ = batch(1, 20, 20)
    covariance, tokens = covariances(logprobs, advantages, mask), int(mask.sum())
    candidates = {}
    for (i, t), value in covariance.items():
        ratio = math.exp(logprobs[i, t].item() - old[i, t].item())
        stopped = ratio > 1.3 if advantages[i] > 0 else ratio < 0.8
        if 0.2 < value < 1.5 and not stopped:
            candidates[i, t] = value

    def select(share, seed=0, low=0.2, high=1.5):
        config = er.Config(method="clip_cov", clip_cov_ratio=share, clip_cov_low=low, clip_cov_high=high,
                           clip_low=0.2, clip_high=0.3)
        return picks(er.select_tokens(config, logprobs, old, advantages, mask, seeded(seed)))

    assert select(1.0) == set(candidates) and len(candidates) > 20  # fewer than wanted: all of them
    window = sorted(er.token_covariance(logprobs, advantages, mask)[i, t].item() for i, t in candidates)
    assert len(select(1.0, low=window[0], high=window[-1])) == len(candidates) - 2, "the bounds are outside"
    for share, count in ((1e-9, 1), (0.05, int(0.05 * tokens)), (2.999 / tokens, 2)):
        found = select(share)
        assert len(found) == count and found < set(candidates) and select(share) == found
    assert select(0.05) != select(0.05, seed=1)
    assert select(0.0) == set() and select(1.0, low=90, high=91) == set()
    assert select(1.0, low=-1e9, high=1e9) <= picks(mask), "off the mask Cov is 0, which this window has"
    times = torch.zeros(mask.shape)
    for seed in range(300):
        for place in select(3.5 / tokens, seed):
            times[place] += 1
    times = torch.stack([times[place] for place in candidates])
    p = 3 / len(candidates)
    assert times.sum() == 900 and (times - 300 * p).abs().max() < 5 * math.sqrt(300 * p * (1 - p))


def test_select_tokens_kl_cov():
    """Exactly the floor(k M) tokens of the largest Cov, at least 1; k = 1 takes the whole mask, k = 0 nothing."""
    logprobs, old, advantages, mask, *_ = batch(2)
    ranked = sorted(((v, place) for place, v in covariances(logprobs, advantages, mask).items()), reverse=True)
    for share in (0, 1e-9, 2.999 / len(ranked), 0.3, 1):
        config = er.Config(method="kl_cov", kl_cov_fraction=share)
        count = max(1, math.floor(share * len(ranked))) if share else 0
        found = er.select_tokens(config, logprobs, old, advantages, mask)
        assert picks(found) == {place for _, place in ranked[:count]}


def test_select_tokens_edges():
    """One response: Cov is 0, so Clip-Cov picks none and KL-Cov still its count; the other methods never pick."""
    logprobs, old, advantages, mask, *_ = batch(3)
    for method in METHODS:
        found = er.select_tokens(er.Config(method=method), logprobs, old, advantages, mask, seeded(0))
        assert found.dtype == torch.bool and found.shape == mask.shape
        assert found.any() == (method == "kl_cov") or method == "clip_cov"
    row, only = slice(4, 5), torch.ones(1, 9, dtype=torch.bool)
    for method, count in (("clip_cov", 0), ("kl_cov", 4)):
        config = er.Config(method=method, kl_cov_fraction=0.5, clip_cov_ratio=1)
        assert er.select_tokens(config, logprobs[row], old[row], advantages[row], only, seeded(0)).sum() == count


def token_loss(config, logprob, old, advantage, selected, entropy, ref):
    """Eq. 4, 12 and 14 for one token, with plain branches on scalars."""
    ratio = (logprob - old).exp()
    low, high = 1 - config.clip_low, 1 + config.clip_high
    clipped = low if ratio < low else high if ratio > high else ratio
    if config.method in ("pg", "kl_cov"):
        clipped = ratio
    loss = -min(ratio * advantage, clipped * advantage)
    if config.method == "clip_cov" and selected:
        return 0 * logprob.detach()
    if config.method == "kl_cov" and selected:
        kl = {"abs": abs(logprob - old), "k2": (logprob - old) ** 2 / 2, "k3": ratio - 1 - (logprob - old)}
        loss = loss + config.kl_cov_coef * kl[config.kl_estimator]
    if config.method == "entropy_bonus":
        loss = loss - config.entropy_coef * entropy
    if config.method == "ref_kl":
        loss = loss + config.ref_kl_coef * ((ref - logprob).exp() - 1 - (ref - logprob))
    return loss


def same_with_gradients(loss, expected, logprobs, entropy):
    """The values and the gradients of two losses agree to 1e-6."""
    close(loss, expected, rtol=1e-6, atol=1e-6)
    for x in (logprobs, entropy):
        pair = [torch.autograd.grad(y.sum(), x, retain_graph=True, allow_unused=True)[0] for y in (loss, expected)]
        close(*(torch.zeros_like(x) if g is None else g for g in pair), rtol=1e-6, atol=1e-6)


LOSSES = [*((method, "abs") for method in METHODS), ("kl_cov", "k2"), ("kl_cov", "k3")]


@pytest.mark.parametrize("method, estimator", LOSSES)
def test_token_losses(method, estimator):
    """Values and gradients of every method are those of the scalar equations, token by token."""
    logprobs, old, advantages, mask, entropy, ref = batch(4)
    config = er.Config(method=method, kl_estimator=estimator, kl_cov_coef=0.7, entropy_coef=0.3, ref_kl_coef=0.2)
    selected = torch.rand(mask.shape, generator=seeded(5)) < 0.4 if "cov" in method else torch.zeros_like(mask)
    found = er.token_losses(config, logprobs, old, advantages, selected, entropy, ref)
    places = itertools.product(range(6), range(9))
    expected = torch.stack([token_loss(config, logprobs[p], old[p], advantages[p[0]], selected[p], entropy[p], ref[p])
                            for p in places]).view(6, 9)
    same_with_gradients(found, expected, logprobs, entropy)


@pytest.mark.parametrize("method, estimator", LOSSES)
@pytest.mark.parametrize("share", [0.2, 1])
def test_policy_loss(method, estimator, share):
    """The selection, then the mean over the mask, selected tokens in the denominator too; gradients as well."""
    logprobs, old, advantages, mask, entropy, ref = batch(6)
    config = er.Config(method=method, kl_estimator=estimator, kl_cov_fraction=share, clip_cov_ratio=share,
                       clip_cov_low=0.05, clip_cov_high=9, clip_low=0.1, clip_high=0.1, entropy_coef=0.3,
                       ref_kl_coef=0.2)
    selected = er.select_tokens(config, logprobs, old, advantages, mask, seeded(7))
    assert selected.any() == ("cov" in method) and (share < 1 or method != "kl_cov" or torch.equal(selected, mask))
    found = er.policy_loss(config, logprobs, old, advantages, mask, seeded(7), entropy=entropy, ref_logprobs=ref)
    total = sum(token_loss(config, logprobs[p], old[p], advantages[p[0]], selected[p], entropy[p], ref[p])
                for p in picks(mask))
    assert found.shape == ()
    same_with_gradients(found, total / mask.sum(), logprobs, entropy)


def loss_and_gradient(data, **settings):
    logprobs, old, advantages, mask, *_ = data
    loss = er.policy_loss(er.Config(**settings), logprobs, old, advantages, mask, seeded(0))
    return loss.detach(), *torch.autograd.grad(loss, logprobs)


def test_policy_loss_edges():
    """r = 0 and an empty window are GRPO to the last bit; KL-Cov at ratio 1 has pg's gradient to the last bit; groups
    of equal rewards push nothing; one response is fine."""
    data = batch(8, dtype=torch.float32)
    grpo = loss_and_gradient(data, method="grpo")
    for settings in (dict(clip_cov_ratio=0.0), dict(clip_cov_ratio=1.0, clip_cov_low=90, clip_cov_high=91)):
        found = loss_and_gradient(data, method="clip_cov", clip_low=0.2, clip_high=0.2, **settings)
        assert all(map(torch.equal, found, grpo))
    at_one = (data[1].clone().requires_grad_(), *data[1:])
    for coef, share in ((1.0, 0.2), (3.0, 1.0)):
        found = loss_and_gradient(at_one, method="kl_cov", kl_cov_coef=coef, kl_cov_fraction=share)
        assert all(map(torch.equal, found, loss_and_gradient(at_one, method="pg")))
    for method in METHODS[:4]:
        logprobs, old, advantages, mask, *_ = batch(9)
        advantages = er.group_advantages(torch.tensor([1.0, 0, 1, 1, 1, 1], dtype=torch.float64), 3)
        gradient = loss_and_gradient((logprobs, old, advantages, mask), method=method, kl_cov_fraction=1e-9)[1]
        assert gradient[:3].any() and not gradient[3:].any()
        loss, gradient = loss_and_gradient([x[2:3] for x in batch(9)], method=method)
        assert loss.isfinite() and gradient.isfinite().all()


def test_anatomy():
    """Quadrants, quantiles, clipped share and KL of a mini-batch, in loops."""
    logprobs, old, advantages, mask, *_ = batch(3, 20, 20)
    config, covariance = er.Config(method="grpo"), covariances(logprobs, advantages, mask)
    selected = er.select_tokens(er.Config(method="kl_cov", kl_cov_fraction=0.2), logprobs, old, advantages, mask)
    found = er.anatomy(config, logprobs.detach(), old, advantages, mask, selected)
    mean = lambda values: sum(values) / len(values)
    mean_logprob = mean([logprobs[at].item() for at in covariance])
    mean_advantage = mean([advantages[i].item() for i, _ in covariance])
    tokens, part, count, clipped, kl = [0] * 4, [0] * 4, [0] * 4, [], []
    for (i, t), value in covariance.items():
        quadrant = 2 * (advantages[i].item() <= mean_advantage) + (logprobs[i, t].item() <= mean_logprob)
        tokens[quadrant] += 1 / len(covariance)
        part[quadrant] += value / len(covariance)
        count[quadrant] += bool(selected[i, t])
        difference = logprobs[i, t].item() - old[i, t].item()
        gain, ratio = advantages[i].item(), math.exp(difference)
        clipped.append(gain > 0 and ratio > 1.2 or gain < 0 and ratio < 0.8)
        kl.append(ratio - 1 - difference)
    ranked = sorted(covariance.values(), reverse=True)
    for key, expected in dict(quadrant_tokens=tokens, quadrant_cov=part, quadrant_selected=count, approx_kl=mean(kl),
                              clip_fraction=mean(clipped), cov_mean=mean(ranked),
                              **{f"cov_top_{p}": mean(ranked[:max(1, int(len(ranked) * p / 100))])
                                 for p in (0.02, 0.2, 2, 20, 50)}).items():
        assert found[key].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6), key
    assert min(tokens) > 0.1 and sum(map(bool, count)) > 1 and 0 < mean(clipped) < 1


def test_mini_batches():
    """Whole groups in random order by step, each mixed one once, the others in none; advantages of Eq. 3."""
    rewards = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 0, 1], [0, 0, 0]] * 6).float().flatten()
    config, orders = er.Config(prompts=24, group_size=3, updates=4), []
    for step in (1, 1, 2):
        batches, advantages = er.mini_batches(config, er.Rollouts(torch.zeros(72, 1), *[None] * 4), rewards, step)
        groups = [x.view(-1, 3) for x in batches]
        assert len(groups) == 4 and all((x == x[:, :1] + torch.arange(3)).all() for x in groups)
        orders.append([int(x) for group in groups for x in group[:, 0] // 3])
        assert sorted(orders[-1]) == [*range(0, 24, 2)]
    mixed = torch.cat(batches)
    close(advantages[mixed], er.group_advantages(rewards, 3)[mixed])
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) != orders[0]


def test_evaluate(monkeypatch):
    """avg@k and its standard error over problems, pass@k and greedy, from responses that are known."""
    right = [[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1]]
    problems = [dict(problem=str(i), answer="", k=i) for i in range(5)]

    def collect(config, policy, some, group, greedy=False, **more):
        rewards = [float(greedy and p["k"] == 2 or right[p["k"]][j]) for p in some for j in range(group)]
        return None, torch.tensor(rewards), [""] * len(rewards)
    monkeypatch.setattr(er, "collect", collect)
    policy = er.Policy(torch.nn.Identity(), None, [1], 0)
    policy.model.device = torch.device("cpu")
    found, samples = er.evaluate(er.Config(eval_samples=4, prompts=2, group_size=4, updates=1), policy, problems)
    means = [sum(r) / 4 for r in right]
    error = math.sqrt(sum((m - sum(means) / 5) ** 2 for m in means) / 4 / 5)
    assert found == pytest.approx(dict(eval_avg=sum(means) / 5, eval_avg_se=error, eval_pass=4 / 5, eval_greedy=4 / 5,
                                       eval_k=4)) and [s["problem"] for s in samples] == [*"01234"]


def test_pass_at_k():
    """Equals the share of the k-subsets with a right response, for all n up to 6."""
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert er.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_fit_entropy_law():
    """Gives known a and b back to 1e-6, the least-squares fit of noisy points, UserError where no law can be told."""
    entropy = [0.05 + 0.1 * i for i in range(12)]
    law = er.fit_entropy_law(entropy, [0.9 - 0.3 * math.exp(h) for h in entropy])
    found = [law.a, law.b, law.ceiling, law.r2, law.rmse, float(law.predict(0.4)), float(law.predict(entropy)[3])]
    exact = [0.3, 0.9, 0.6, 1, 0, 0.9 - 0.3 * math.exp(0.4), 0.9 - 0.3 * math.exp(entropy[3])]
    assert found == pytest.approx(exact, abs=1e-6)
    noisy = torch.tensor([0.9 - 0.3 * math.exp(h) + 0.1 * math.sin(9 * h) for h in entropy], dtype=torch.float64)
    law = er.fit_entropy_law(entropy, noisy.tolist())
    design = torch.tensor([[-math.exp(h), 1] for h in entropy], dtype=torch.float64)
    fit = torch.linalg.lstsq(design, noisy[:, None]).solution
    squares = (noisy - (design @ fit)[:, 0]).square().sum()
    exact = [*fit[:, 0].tolist(), 1 - squares / (noisy - noisy.mean()).square().sum(), math.sqrt(squares / 12)]
    assert [law.a, law.b, law.r2, law.rmse] == pytest.approx([float(x) for x in exact], abs=1e-6)
    for points in ([], [0.5], [0.5, 0.5, 0.5]):
        with pytest.raises(er.UserError):
            er.fit_entropy_law(points, [0.1] * len(points))


@pytest.mark.parametrize("rule", ["pg", "npg"])
def test_tabular_entropy_change(rule):
    """Two actions, by hand: p = sigmoid(z), dH/dz = -z p (1 - p), dz = lr d 2p(1 - p) (pg), lr d (npg), d = r1 - r2.
    The error of first order falls as lr squared; a batch of states is each state alone."""
    z, d, lr = 1.3, 0.6, 0.05
    p = 1 / (1 + math.exp(-z))
    dz = lr * d * (2 * p * (1 - p) if rule == "pg" else 1)
    before, after = (-q * math.log(q) - (1 - q) * math.log(1 - q) for q in (p, 1 / (1 + math.exp(-z - dz))))
    state = torch.tensor([[z + 0.2, 0.2], [d + 0.1, 0.1]], dtype=torch.float64)
    actual, predicted = er.tabular_entropy_change(*state, lr, rule)
    assert actual.shape == predicted.shape == ()
    assert (actual.item(), predicted.item()) == pytest.approx((after - before, -z * p * (1 - p) * dz), abs=1e-12)
    logits, rewards = torch.randn(2, 5, 7, generator=seeded(0), dtype=torch.float64)
    error = [torch.sub(*er.tabular_entropy_change(logits, rewards, lr, rule)).norm() for lr in (0.02, 0.01)]
    assert 3.6 < error[0] / error[1] < 4.4
    whole = er.tabular_entropy_change(logits, rewards, lr, rule)
    close(torch.stack(whole, 1), torch.stack([torch.stack(er.tabular_entropy_change(*state, lr, rule))
                                              for state in zip(logits, rewards)]))


def test_tabular_step():
    """pg is lr times the gradient of the expected reward; npg that gradient under the inverse Fisher matrix."""
    logits, rewards = torch.randn(2, 6, generator=seeded(1), dtype=torch.float64)
    logits.requires_grad_()
    policy = logits.softmax(0)
    gradient, = torch.autograd.grad((policy * rewards).sum(), logits, retain_graph=True)
    close(er.tabular_step(logits, rewards, 0.3, "pg"), 0.3 * gradient)
    fisher = (policy.diag() - policy.outer(policy)).detach()
    difference = er.tabular_step(logits, rewards, 0.3, "npg").detach() - 0.3 * torch.linalg.pinv(fisher) @ gradient
    close(difference, difference.mean().expand(6))


# ------------------------------------------------------------------------------------------- models and rollouts

def tiny_model(kind="qwen2", vocabulary=24, seed=0, spread=0.3, **more):
    """A random two-layer causal language model of some family; the larger the spread, the less uniform."""
    dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0) if kind == "gpt2" else dict(num_key_value_heads=2)
    shape = dict(vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
                 num_attention_heads=4, max_position_embeddings=64, initializer_range=spread, bos_token_id=None,
                 eos_token_id=None)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(shape | dropout | more))).eval()


PROMPTS = [[5], [4, 6, 8, 10, 9, 11, 2], [7, 7, 3]]


def padded(lengths, width=9, seed=0, group=1):
    """Random responses of the given lengths to PROMPTS in turn, padded on both sides: ids, attention mask, response
    mask. So many responses of a group have one prompt."""
    longest = max(map(len, PROMPTS))
    prompts = [PROMPTS[i // group % 3] for i in range(len(lengths))]
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * (len(p) + n) + [0] * (width - n)
                         for p, n in zip(prompts, lengths)])
    ids = torch.randint(24, mask.shape, generator=seeded(seed))
    for row, p in zip(ids, prompts):
        row[longest - len(p):longest] = torch.tensor(p)
    return ids, mask, mask[:, longest:].bool()


def plain_logprobs(model, ids, mask, width, temperature):
    """Log-probabilities and entropy by one full forward pass over the padded batch."""
    logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    logprobs = (logits[:, -width - 1:-1] / temperature).log_softmax(-1)
    return logprobs.gather(2, ids[:, -width:, None])[..., 0], -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2", "gemma"])
@pytest.mark.parametrize("temperature, group, packed", [(1.0, 1, 96), (0.7, 3, 20), (1.0, 3, 1)])
def test_response_logprobs(kind, temperature, group, packed, monkeypatch):
    """Values to 1e-5 and gradients to 1e-4 of the plain way, at any padding, however rows are packed and prompts
    shared, also in chunks of three tokens."""
    model = tiny_model(kind)
    ids, mask, responses = padded([9, 2, 1, 5, 9, 3, 7], group=group)
    monkeypatch.setattr(er, "PACKED_ROW", packed)
    weights = torch.randn(2, *responses.shape, generator=seeded(1)) * responses

    def run(function):
        model.zero_grad()
        values = [torch.where(responses, x, 0.0) for x in function()]
        (torch.stack(values) * weights).sum().backward()
        return [x.detach() for x in values], [p.grad.clone() for p in model.parameters()]

    expected, slopes = run(lambda: plain_logprobs(model, ids, mask, 9, temperature))
    projected = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _, hidden, __: projected.append(hidden[0].numel() // 32))
    for room in (er.LOGITS_AT_ONCE, 24 * 3):
        monkeypatch.setattr(er, "LOGITS_AT_ONCE", room)
        projected.clear()
        found, gradients = run(lambda: er.response_logprobs(model, ids, mask, 9, temperature=temperature))
        for x, y in zip(found, expected):
            close(x, y, rtol=0, atol=1e-5)
        for x, y in zip(gradients, slopes):
            assert (x - y).norm() <= 1e-4 * y.norm() + 1e-6
        assert sum(projected) == responses.sum() or room == 72, "only response tokens meet the vocabulary, once"
    assert max(projected) <= 3 and sum(projected) > responses.sum(), "chunks, computed again in the backward pass"
    logprobs, entropy = er.response_logprobs(model, ids, mask, 9, with_entropy=False)
    assert entropy is None and not logprobs[~responses].any()


def test_pack():
    """Each response stands in one row behind its prompt, which is there once; nothing overlaps or goes past the end;
    and a group's prompt is fed to the model once where its row has room."""
    rng = random.Random(0)
    prompts = [i // 4 for i in range(40)]
    prompt_lengths, lengths = [3 + p % 5 for p in prompts], [rng.randrange(0, 30) for _ in prompts]
    places, cells = er.pack(prompts, prompt_lengths, lengths, 40), {}
    for i, (row, prompt_at, response_at) in enumerate(places):
        for start, count, owner in ((prompt_at, prompt_lengths[i], ("x", prompts[i])), (response_at, lengths[i], i)):
            for place in range(start, start + count):
                assert place < 40 and cells.setdefault((row, place), owner) == owner
        assert prompt_at + prompt_lengths[i] <= response_at
    assert len({row for row, *_ in places}) <= 1.2 * len(cells) / 40
    model, fed = tiny_model(), []
    model.get_input_embeddings().register_forward_hook(lambda _, ids, __: fed.append(ids[0].shape))
    ids, mask, responses = padded([5] * 6, group=6)
    er.response_logprobs(model, ids, mask, 9)
    assert fed == [(1, er.PACKED_ROW)] and len(PROMPTS[0]) + 6 * 4 <= er.PACKED_ROW


def test_response_logprobs_gradient_has_one_order():
    """Nothing in the graph whose gradient threads add up in any order, as indexing does where a cell is read twice;
    and with two threads every gradient is the same to the last bit."""
    model, rows, length = tiny_model(hidden_size=64), 15 * 8, 12
    ids = torch.randint(2, 6, (rows, 4 + length), generator=seeded(0))
    ids[:, :4] = ids[::8, :4].repeat_interleave(8, 0)          # groups of 8, the middle one in both threads' halves
    weights, threads, found = torch.randn(rows, length, generator=seeded(1)), torch.get_num_threads(), set()
    try:
        torch.set_num_threads(2)
        for _ in range(40):
            logprobs, _ = er.response_logprobs(model, ids, torch.ones_like(ids), length, with_entropy=False)
            loss = (logprobs * weights).sum()
            gradients = torch.autograd.grad(loss, [*model.parameters()], retain_graph=True)
            found.add(b"".join(x.numpy().tobytes() for x in gradients))
    finally:
        torch.set_num_threads(threads)
    nodes, names = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in names:
            names.add(node)
            nodes += [following for following, _ in node.next_functions]
    kinds = {node.name() for node in names}
    assert len(found) == 1 and "EmbeddingBackward0" in kinds and not kinds & {"IndexBackward0", "IndexPutBackward0"}


def test_token_logprobs():
    """The log-probability of each target and the full-vocabulary entropy of softmax(logits / temperature)."""
    hidden, targets = torch.randn(5, 4, generator=seeded(0)), torch.tensor([0, 6, 2, 2, 5])
    head = torch.nn.Linear(4, 7)
    chances = (head(hidden) / 0.7).softmax(-1)
    found = er.token_logprobs(hidden, targets, head, 0.7)
    close(found[0], torch.stack([chances[i, y].log() for i, y in enumerate(targets)]))
    close(found[1], torch.distributions.Categorical(chances).entropy())
    weights = torch.randn(2, 5, generator=seeded(1))
    plain = (weights[0] * chances.log()[range(5), targets] - weights[1] * (chances * chances.log()).sum(-1)).sum()
    ours = (weights * torch.stack(found)).sum()
    for one, two in zip(*(torch.autograd.grad(loss, [*head.parameters()]) for loss in (ours, plain))):
        close(one, two)
    assert len(er.token_logprobs(hidden, targets, head, 0.7, with_entropy=False)) == 1
    sharp = torch.tensor([[40.0, 0, 0, 0], [0, 0, 60, 30]])     # near certainty: no cancellation, no NaN
    found = er.token_logprobs(sharp.bfloat16(), torch.tensor([0, 3]), lambda hidden: hidden, 1.0)
    assert found[0].dtype == torch.float32 and found[0].tolist() == pytest.approx([0, -30])
    assert found[1].tolist() == pytest.approx([3 * 40 * math.exp(-40), 30 * math.exp(-30)], rel=0.05)


def python(code, **variables):
    """Run code in a fresh Python beside this module; its output as JSON."""
    more = dict(PYTHONPATH=str(Path(er.__file__).parent), PYTHONDONTWRITEBYTECODE="1", MODULE=er.__name__)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=variables.get("HOME"),
                          env=os.environ | more | variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_cache_keeps_keys_as_values_are():
    """Rotary positions leave keys in fp32 under autocast; beside bf16 values they would take twice the room."""
    keys, values = torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 4).bfloat16()
    layer = er.RoomyLayer()
    layer.update(keys, values)
    kept, _ = layer.update(keys[:, :, :1], values[:, :, :1])
    close(kept, torch.cat([keys, keys[:, :, :1]], 2).bfloat16())
    assert layer.values.dtype == torch.bfloat16 and layer.room[0].element_size() == 2


def test_memory():
    """At Qwen2.5's vocabulary, 8 responses: values and gradients of the plain way, in half a float32 logits tensor.

    An eighth of 480 tokens in chunks of an eighth, for time; TOKENS=480 is full size. With malloc's threshold fixed,
    freed chunks go back to the system and the peak is that of live tensors."""
    code = """
import importlib, os, resource, torch, transformers
torch.set_num_threads(1)
er = importlib.import_module(os.environ["MODULE"])
V, N, T = 151_936, 8, int(os.environ["TOKENS"])
er.LOGITS_AT_ONCE = er.LOGITS_AT_ONCE * T // 480
model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(vocab_size=V, hidden_size=16, intermediate_size=16,
    num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True))
ids, peak = torch.randint(V, (N, T + 4)), lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
logprobs, entropy = er.response_logprobs(model, ids, torch.ones_like(ids), T)
(logprobs.mean() + entropy.mean()).backward()
grown, gradients = peak() - before, [p.grad.clone() for p in model.parameters()]
model.zero_grad()
plain = model(ids, logits_to_keep=T + 1).logits[:, :-1].log_softmax(-1)
wanted = plain.gather(2, ids[:, -T:, None])[..., 0], -(plain.exp() * plain).sum(-1)
(wanted[0].mean() + wanted[1].mean()).backward()
values = max((x - y).abs().max().item() for x, y in zip((logprobs, entropy), wanted))
relative = max(((g - p.grad).norm() / p.grad.norm()).item() for g, p in zip(gradients, model.parameters()))
print([grown, N * T * V * 4 // 1024, values, relative])"""
    tokens = os.environ.get("TOKENS", "60")
    grown, tensor, values, relative = python(code, MALLOC_MMAP_THRESHOLD_="1000000", TOKENS=tokens)
    assert grown < tensor / 2
    assert values < 1e-4 and relative < 1e-4


STOPS = [3, 14]


def roll(model, prompts=PROMPTS, **settings):
    base = dict(group_size=6, max_new_tokens=9, temperature=1.0, eos_token_ids=STOPS, pad_token_id=0)
    return er.sample_rollouts(model, prompts, **base | dict(generator=seeded(0)) | settings)


@pytest.mark.parametrize("temperature, pad", [(1.0, 0), (0.7, 3)])
def test_sample_rollouts(temperature, pad):
    """Grouped and padded as told, true up to and including the stop token (pad == eos too); log-probs are of the
    full forward at the same temperature, the entropy at temperature 1; the global random state is left alone."""
    model, state = tiny_model(spread=0.1), torch.random.get_rng_state()
    found = roll(model, temperature=temperature, pad_token_id=pad)
    assert torch.equal(torch.random.get_rng_state(), state)
    again = roll(model, temperature=temperature, pad_token_id=pad)
    assert torch.equal(found.input_ids, again.input_ids) and torch.equal(found.logprobs, again.logprobs)
    longest, (rows, width) = 7, found.response_mask.shape
    assert rows == 18 and width == 9
    lengths = []
    for i, (ids, mask) in enumerate(zip(found.input_ids.tolist(), found.attention_mask.tolist())):
        prompt, response = PROMPTS[i // 6], ids[longest:]
        length = next((t + 1 for t, y in enumerate(response) if y in STOPS), width)
        assert ids[:longest] == [pad] * (longest - len(prompt)) + prompt
        assert response[length:] == [pad] * (width - length)
        assert mask == [0] * (longest - len(prompt)) + [1] * (len(prompt) + length) + [0] * (width - length)
        assert found.response_mask[i].tolist() == [t < length for t in range(width)]
        lengths.append(length)
    assert len(set(lengths)) > 3 and lengths.count(9) > 1, "some stop early, some are cut off"
    arguments = model, found.input_ids, found.attention_mask, width
    close(found.logprobs, er.response_logprobs(*arguments, temperature=temperature)[0], rtol=0, atol=1e-4)
    close(found.entropy, er.response_logprobs(*arguments)[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind, pad", [("qwen2", 0), ("qwen2", 3), ("llama", 3), ("gpt2", 0), ("gemma", 3)])
def test_sample_rollouts_greedy(kind, pad):
    """Greedy responses are model.generate's, token for token; none depends on the rows that leave the batch."""
    model = tiny_model(kind, seed=1)
    prompts = PROMPTS + [[i, i + 1] for i in range(4, 14)]
    greedy = dict(greedy=True, group_size=1, pad_token_id=pad, max_new_tokens=40)
    found = roll(model, prompts, **greedy)
    lengths = found.response_mask.sum(1).tolist()
    assert len(set(lengths)) > 3 and min(lengths) < 9
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    expected = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=40,
                              eos_token_id=STOPS, pad_token_id=pad)
    assert found.input_ids.tolist() == expected.tolist()
    for prompt, ids in zip(prompts[:3], found.input_ids.tolist()):
        alone = roll(model, [prompt], **greedy).input_ids[0, len(prompt):].tolist()
        assert ids[longest:] == alone + [pad] * (len(ids) - longest - len(alone))
    pairs = roll(model, prompts, **greedy | dict(group_size=2))
    assert torch.equal(pairs.input_ids, found.input_ids.repeat_interleave(2, 0))


def test_sample_rollouts_frequencies():
    """The first two tokens come as often as the model's probabilities at the temperature say (chi-square)."""
    model, prompt, count, temperature = tiny_model(vocabulary=6, spread=0.15), [4, 5], 6000, 0.8
    tokens = roll(model, [prompt, [2]], group_size=count, max_new_tokens=2, temperature=temperature,
                  eos_token_ids=[3])
    seen = torch.zeros(6, 6)
    for first, second in tokens.input_ids[:count, -2:].tolist():
        seen[first, second] += 1
    with torch.no_grad():
        after = model(input_ids=torch.tensor([[*prompt, y] for y in range(6)])).logits
    chances = (after / temperature).softmax(-1)
    expected = chances[0, 1][:, None] * chances[:, 2]
    expected[3] = torch.tensor([chances[0, 1, 3], 0, 0, 0, 0, 0])  # stopped, then padded with 0
    assert not seen[expected == 0].any()
    expected, seen = count * expected.flatten(), seen.flatten()
    cells = expected > 5
    chi = ((seen - expected)[cells] ** 2 / expected[cells]).sum()
    freedom = int(cells.sum()) - 1
    assert freedom > 15 and chi < freedom + 4 * math.sqrt(2 * freedom)


# ------------------------------------------------------------------------------------------- the training loop

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random policy with its tokenizer, and problems two thirds of which have the answer `sure`."""
    folder = tmp_path_factory.mktemp("lab")
    _, tokenizer = er.tiny_policy(16)
    model = tiny_model(vocabulary=len(tokenizer), num_hidden_layers=1, spread=0.1, eos_token_id=1)
    for part in (model, tokenizer):
        part.save_pretrained(folder / "policy")
    rows = [dict(problem=f"{'1+' * (i % 7)}{i}?", answer="sure" if i % 3 else "varied") for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    """train() there for two rollout steps, as (rows, weights); the reward is sure, or the parity of the length."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder))
    monkeypatch.setattr(er, "math_reward", lambda text, gold: float(gold == "sure" or len(text) % 2))
    names = (str(tmp_path / str(i)) for i in itertools.count())

    def run(**settings):
        base = dict(model=str(folder / "policy"), data=str(folder / "rows.jsonl"), prompt_template="{problem}",
                    steps=2, prompts=9, group_size=6, updates=3, micro_batch=0, max_new_tokens=8, eval_every=0,
                    lr=5e-4, clip_low=0.01, clip_high=0.01, clip_cov_ratio=0.1, clip_cov_low=0.1, kl_cov_fraction=0.1,
                    entropy_coef=0.1, ref_kl_coef=1.0, device="cpu", threads=1, out=next(names))
        config = er.Config(**base | settings)
        rows = er.train(config)
        return rows, AutoModelForCausalLM.from_pretrained(Path(config.out, "policy")).state_dict()
    return run


def spy(monkeypatch):
    """The arguments of every policy_loss from now on: new log-probs, old log-probs, advantages, mask."""
    calls, real = [], er.policy_loss
    monkeypatch.setattr(er, "policy_loss", lambda config, *args, **more: (
        calls.append([x.detach().clone() for x in args[:4]]), real(config, *args, **more))[1])
    return calls


ENDS = {}  # the weights of each method's run of the next test


@pytest.mark.parametrize("method", METHODS)
def test_update_micro_batches(run, method):
    """The parameters after two rollout steps are the same to 1e-5 for micro-batches of 1, 3, 8 and all, and no two
    methods' are the same, so each acted."""
    settings = dict(method=method) | (dict(clip_high=0.03) if method == "clip_higher" else {})
    rows, whole = run(**settings)
    assert [row["updates"] for row in rows] == [None, 3, 3]
    assert bool(rows[1]["selected_tokens"]) == ("cov" in method)
    assert (rows[2]["clip_fraction"] > 0) == (method not in ("pg", "kl_cov"))
    for size in (1, 3, 8):
        for name, value in run(**settings, micro_batch=size)[1].items():
            close(value, whole[name], rtol=0, atol=1e-5)
    ENDS[method] = torch.cat([x.flatten() for x in whole.values()])
    assert all((ENDS[method] - ENDS[other]).abs().max() > 3e-4 for other in ENDS if other != method)


@pytest.mark.parametrize("size", [0, 1, 3])
def test_update_ratio_one(run, monkeypatch, size):
    """While nothing has moved the weights, every ratio is exactly 1, in every mini-batch, on every token; policy_loss
    sees whole mini-batches of mixed groups, and the others are left out and counted."""
    calls = spy(monkeypatch)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    rows, _ = run(method="kl_cov", micro_batch=size, temperature=0.9)
    assert len(calls) == 6
    for new, old, advantages, mask in calls:
        assert torch.equal(new, old) and new[mask].all() and advantages.all() and not len(new) % 6
    for row, updates in zip(rows[1:], (calls[:3], calls[3:])):
        assert row["zero_std_groups"] > 0 and row["approx_kl"] == 0 and row["clip_fraction"] == 0
        assert sum(len(new) for new, *_ in updates) == 6 * (9 - row["zero_std_groups"])


@pytest.mark.parametrize("size", [0, 3])
def test_update_first_is_policy_gradient(run, size):
    """KL-Cov's first update is plain policy gradient's, bit for bit."""
    ends = [run(method=m, steps=1, updates=1, micro_batch=size, kl_cov_coef=5.0)[1] for m in ("kl_cov", "pg")]
    assert all(map(torch.equal, *(end.values() for end in ends)))


def test_update_gradient_checkpointing(run):
    """--gradient-checkpointing changes memory and time, neither rows nor weights (sampling keeps its cache)."""
    (rows, end), (same_rows, same_end) = run(method="kl_cov"), run(method="kl_cov", gradient_checkpointing=True)
    assert [(r["entropy"], r["loss"], r["tokens"]) for r in rows] == [(r["entropy"], r["loss"], r["tokens"]) for r in same_rows]
    for name, value in end.items():
        close(value, same_end[name], rtol=0, atol=1e-6)


def test_entropy_probe(run):
    """The first-order prediction <grad H, d theta> matches the measured change for a small step; the micro-batch size
    changes neither; and the probe does not change the training."""
    settings = dict(method="pg", updates=1, lr=1e-5)
    (rows, end), (plain_rows, plain_end) = run(**settings, probe=True), run(**settings)
    for row, small in zip(rows[1:], run(**settings, probe=True, micro_batch=4)[0][1:]):
        assert row["probe_first_order"] == pytest.approx(row["probe_entropy_change"], rel=0.05)
        assert row["probe_first_order"] == pytest.approx(small["probe_first_order"], rel=1e-2)
        assert row["probe_covariance_by_right"][0] in (None, 0) and row["probe_covariance"] is not None
    assert all(map(torch.equal, end.values(), plain_end.values()))


def test_entropy_probe_measures_equation_5(run, folder, monkeypatch):
    """The measured change is of the mean over tokens, then over responses, on one rollout, before and after."""
    seen, real = [], er.sample_rollouts
    monkeypatch.setattr(er, "sample_rollouts", lambda *a, **k: (seen.append(real(*a, **k)), seen[-1])[1])
    rows, end = run(method="pg", updates=1, lr=1e-3, steps=1, probe=True)
    model, mask, means = AutoModelForCausalLM.from_pretrained(folder / "policy"), seen[1].response_mask, []
    for weights in (model.state_dict(), end):
        model.load_state_dict(weights)
        with torch.no_grad():
            entropy = er.response_logprobs(model, seen[1].input_ids, seen[1].attention_mask, mask.shape[1])[1]
        means.append((entropy.sum(1) / mask.sum(1)).mean().item())
    assert rows[1]["probe_entropy_change"] == pytest.approx(means[1] - means[0], rel=1e-3, abs=1e-6)
    assert abs(means[1] - means[0]) > 1e-3


def test_update_by_a_loss_without_the_entropy(run, monkeypatch):
    """Asked for and not used, the entropy changes nothing: an entropy bonus of a reader's own may look at it only."""
    real = er.token_losses
    rows, end = run(method="grpo", micro_batch=3)
    monkeypatch.setattr(er, "token_losses", lambda config, *a: real(replace(config, method="grpo"), *a))
    same_rows, same_end = run(method="entropy_bonus", micro_batch=3)
    assert [r["loss"] for r in rows] == [r["loss"] for r in same_rows]
    for name, value in end.items():
        close(value, same_end[name], rtol=0, atol=1e-6)


def test_update_nothing_to_learn(run, folder, monkeypatch):
    """A rollout whose groups are all equal moves nothing."""
    monkeypatch.setattr(er, "math_reward", lambda text, gold: 1.0)
    rows, end = run(method="grpo")
    start = AutoModelForCausalLM.from_pretrained(folder / "policy").state_dict()
    assert rows[1]["zero_std_groups"] == 9 and rows[1]["updates"] == 0
    assert all(map(torch.equal, start.values(), end.values()))


def test_train_rows(run, tmp_path):
    """Every row has the keys of the contract, train returns the rows of metrics.jsonl, and leaves torch as it was."""
    state = torch.random.get_rng_state()
    torch.set_num_threads(2)
    rows, _ = run(method="clip_cov", eval_every=1, eval_problems=3, eval_samples=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert torch.equal(torch.random.get_rng_state(), state) and threads == 2
    assert rows == [json.loads(line) for line in (tmp_path / "0/metrics.jsonl").read_text().splitlines()]
    keys = """step seconds reward entropy response_length truncated zero_std_groups loss grad_norm clip_fraction
        approx_kl cov_mean cov_top_0.02 cov_top_0.2 cov_top_2 cov_top_20 cov_top_50 selected_tokens selected_fraction
        tokens tokens_per_second peak_memory_mb eval_avg eval_avg_se eval_pass eval_greedy eval_k""".split()
    assert [row["step"] for row in rows] == [0, 1, 2] and all(set(keys) <= set(row) for row in rows)
    row = rows[1]
    tops = [row[f"cov_top_{p}"] for p in ("0.02", "0.2", 2, 20, 50)] + [row["cov_mean"]]
    assert sum(row["quadrant_selected"]) == row["selected_tokens"] and sum(row["quadrant_tokens"]) == pytest.approx(1)
    assert 50 < row["peak_memory_mb"] < 1e5 and row["tokens_per_second"] * row["seconds"] == pytest.approx(row["tokens"])
    assert row["selected_tokens"] > 0 and 1 <= row["response_length"] <= 8 and tops == sorted(tops, reverse=True)


def test_train_rows_are_of_their_rollout(run, monkeypatch):
    """entropy is Eq. 5, the mean over a response's tokens, then over responses; reward, length, truncation too."""
    seen, real = [], er.sample_rollouts
    monkeypatch.setattr(er, "sample_rollouts", lambda *a, **k: (seen.append(real(*a, **k)), seen[-1])[1])
    rows, _ = run(method="grpo")
    assert len(rows) == len(seen) == 3
    for row, found in zip(rows, seen):
        lengths = found.response_mask.sum(1).tolist()
        entropy = [sum(h[:n]) / n for h, n in zip(found.entropy.tolist(), lengths)]
        last = [ids[n - 1] for ids, n in zip(found.input_ids[:, -found.response_mask.shape[1]:].tolist(), lengths)]
        cut_off = sum(token != 1 for token in last)  # 1 is its stop token
        assert 0 < cut_off < len(last) and len(set(lengths)) > 3
        assert row["entropy"] == pytest.approx(sum(entropy) / len(entropy), rel=1e-6)
        assert row["entropy"] != pytest.approx(found.entropy.sum().item() / sum(lengths), rel=1e-6)
        assert row["truncated"] == pytest.approx(cut_off / len(last))
        assert row["tokens"] == sum(lengths) == pytest.approx(row["response_length"] * len(lengths))


# ------------------------------------------------------------------------------------------- the module as a whole

def test_import_starts_nothing(tmp_path):
    """Importing the module starts no thread, opens no connection, writes no file and changes no setting of torch; it
    does not need `resource`, which Windows lacks."""
    settings = ("(torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), "
                "torch.get_float32_matmul_precision(), torch.random.get_rng_state().tolist())")
    code = f"""
import importlib, json, os, socket, sys, threading, torch
def refuse(*args, **more): raise OSError("a connection on import")
socket.socket.connect = socket.getaddrinfo = refuse
sys.modules["resource"] = None
before = {settings}
importlib.import_module(os.environ["MODULE"])
late = [name for name in ("datasets", "matplotlib") if name in sys.modules]
print(json.dumps([before == {settings}, threading.active_count(), late]))"""
    home = str(tmp_path)
    found = python(code, HOME=home, XDG_CACHE_HOME=home, HF_HOME=home)
    assert found == [True, 1, []] and not list(tmp_path.rglob("*"))


# ---------------------------------------------------------------------------------------------------------------
# Trust

LIBRARIES = ("datasets", "transformers", "huggingface_hub")
CLOCKS = {"seconds", "sampling_seconds", "update_seconds", "tokens_per_second", "peak_memory_mb"}
SMALL = dict(data="arithmetic", steps=8, prompts=4, group_size=4, updates=2, micro_batch=0, max_new_tokens=8, lr=1e-2,
             eval_every=4, eval_problems=6, eval_samples=2, checkpoint_every=1, threads=1)


# ---------------------------------------------------------------------------------------------------------------
# Fixtures: an untrained policy of width 16, a reward that any text can earn, runs of 0.3 s

def toy(patch):
    """Reward by a coin that the response's text is, so that an untrained policy has something to learn from."""
    patch.setattr(er, "math_reward", lambda response, gold: float(sum(map(ord, response)) % 2))
    patch.setattr(er, "TRAIN_PROBLEMS", 64)


@pytest.fixture
def toys(monkeypatch):
    toy(monkeypatch)
    return monkeypatch


@pytest.fixture(scope="session")
def policy(tmp_path_factory):
    """A checkpoint folder, of random weights."""
    folder = tmp_path_factory.mktemp("policy")
    for part in er.tiny_policy(16):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make(policy):
    """make(out, setting=value, ...) is a small Config; make.run trains it and returns its folder."""
    def config(out, **changes):
        return er.Config(**SMALL | dict(model=str(policy), out=str(out)) | changes)

    def run(out, **changes):
        er.train(config(out, **changes))
        return Path(out)
    config.run = run
    return config


@pytest.fixture(scope="session")
def runs(make, tmp_path_factory):
    """Unbroken runs by name: four steps, and the eight that they are the first half of."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        toy(patch)
        return dict(half=make.run(folder / "half", steps=4), whole=make.run(folder / "whole"))


@pytest.fixture
def half(runs, tmp_path):
    """A copy of the run of four steps, to break."""
    return shutil.copytree(runs["half"], tmp_path / "half")


def flags(**settings):
    return [x for k, v in settings.items() for x in (["--" + k.replace("_", "-")] + ([] if v is True else [str(v)]))]


@pytest.fixture
def cli(policy, tmp_path, capsys):
    """cli("--steps 2", out=...) runs main with small settings: (status, stdout, lines of stderr)."""
    def call(text="", small=True, picture=None, **changes):
        capsys.readouterr()
        settings = SMALL | dict(model=policy, out=tmp_path / "run") if small else {}
        with pytest.MonkeyPatch.context() as patch:
            for handler in (h for name in LIBRARIES for h in logging.getLogger(name).handlers):
                if type(handler) is logging.StreamHandler:
                    patch.setattr(handler, "stream", sys.stderr)  # where a user would see it
            if not (not small if picture is None else picture):  # a second each
                patch.setattr(er, "draw", lambda *a: None)
            status = er.main(flags(**settings | changes) + shlex.split(text))
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, out, err.splitlines()
    return call


def refused(result, *words):
    """Exit status 2 and one line on stderr that has the words."""
    status, _, errors = result
    assert status == 2 and len(errors) == 1, result
    assert all(word in errors[0] for word in words), errors
    return True


def rows_of(run):
    """The log but for times, from strict JSON."""
    def strict(token):
        raise AssertionError(f"{token} in the log")
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line, parse_constant=strict).items() if k not in CLOCKS} for line in lines]


def state_of(run):
    return torch.load(Path(run, "checkpoint.pt"), weights_only=True)


def bits(x):
    """Nested containers with their tensors as bytes, to compare with ==."""
    if isinstance(x, torch.Tensor):
        return x.dtype, x.shape, x.numpy().tobytes()
    if isinstance(x, dict):
        return {k: bits(v) for k, v in x.items()}
    return [*map(bits, x)] if isinstance(x, list) else x


def files_of(run):
    return {p.relative_to(run): p.read_bytes() for p in sorted(Path(run).rglob("*")) if p.is_file()}


def assert_same_run(run, other):
    """Rows, samples, weights, optimizer, reference and saved policy are those of the other run, to the last bit."""
    assert rows_of(run) == rows_of(other)
    assert Path(run, "samples.jsonl").read_text() == Path(other, "samples.jsonl").read_text()
    ours, theirs = state_of(run), state_of(other)
    assert ours.keys() == theirs.keys()
    assert all(bits(ours[k]) == bits(theirs[k]) for k in ours if k != "log")
    assert files_of(Path(run, "policy")) == files_of(Path(other, "policy"))


# ---------------------------------------------------------------------------------------------------------------
# Resume

def in_child(work):
    """Fork a process that does the work with its output thrown away; its id."""
    pid = os.fork()
    if pid == 0:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1), os.dup2(null, 2)
        with contextlib.suppress(BaseException):
            work()
        os._exit(0)
    return pid


@pytest.mark.parametrize("method,every,kills,steps", [("kl_cov", 1, 10, 30), ("ref_kl", 3, 3, 21)])
def test_a_run_killed_at_random_moments_is_the_unbroken_run(make, toys, tmp_path, method, every, kills, steps):
    """kill -9 at ten random moments, resumed each time: same rows, samples and weights as without."""
    settings = dict(method=method, checkpoint_every=every, steps=steps)
    whole, broken, rng = make.run(tmp_path / "whole", **settings), tmp_path / "broken", random.Random(0)
    step = sum(r["seconds"] for r in er.read_log(whole)) / steps * every
    checkpoint = broken / "checkpoint.pt"
    saved = lambda: checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    for _ in range(kills):
        before, child = saved(), in_child(lambda: make.run(broken, resume=True, **settings))
        for _ in range(rng.choice((0, 9999, 9999, 9999))):  # most times it may get one checkpoint further
            if saved() != before:
                break
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 1.5 * step))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "it had ended already: give it more steps"
    assert 0 < len(rows_of(broken)) <= steps
    make.run(broken, resume=True, **settings)
    assert_same_run(broken, whole)


def cut(run, name, count):
    (run / name).write_bytes((run / name).read_bytes()[:count])


@pytest.mark.parametrize("damage", [
    lambda run: None,
    lambda run: cut(run, "metrics.jsonl", -9),                              # a torn last row
    lambda run: cut(run, "metrics.jsonl", 40),                              # rows that never reached the disk
    lambda run: (run / "metrics.jsonl").unlink(),
    lambda run: er.append(run / "metrics.jsonl", [er.read_log(run)[-1] | dict(step=5, reward=9.0)]),  # a row too many
    lambda run: er.append(run / "samples.jsonl", [dict(step=8, problem="", response="")]),
    lambda run: (run / "checkpoint.pt.tmp").write_bytes(b"half a checkpoint"),       # a draft that a kill left
    lambda run: (run / "checkpoint.pt").unlink(),                           # killed before the first checkpoint
    lambda run: shutil.rmtree(run / "policy"),
    lambda run: (run / "metrics.jsonl").write_text('{"step": 0}\nnot JSON\n{"step": 2}\n'),
    lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\xfe\n" * 3),
    lambda run: (run / "samples.jsonl").write_text("[]\n[]\n"),
    lambda run: (run / "config.json").write_text("[]"),
    lambda run: (run / "config.json").unlink(),
], ids=["longer", "torn row", "rows missing", "no log", "row too many", "samples too many", "draft", "no checkpoint",
        "no policy", "log line", "binary log", "samples", "config", "no config"])
def test_what_a_crash_left_is_mended_at_resume(make, toys, runs, half, damage):
    """A log and a checkpoint that disagree are brought together, and --resume --steps 8 is the run of eight steps."""
    damage(half)
    make.run(half, steps=8, resume=True)
    assert_same_run(half, runs["whole"])


def test_a_longer_run_goes_on_from_a_shorter_one(make, toys, runs, tmp_path):
    """The evaluation at the end of five steps, which eight steps do not have there, leaves the log again."""
    run = make.run(tmp_path / "run", steps=5)
    assert "eval_avg" in rows_of(run)[5]
    assert_same_run(make.run(run, steps=8, resume=True), runs["whole"])


class Bomb:
    """Unpickled, it leaves a file behind."""
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)


@pytest.mark.parametrize("damage,words", [
    (lambda run: cut(run, "checkpoint.pt", 5000), ["checkpoint.pt", "damaged"]),
    (lambda run: (run / "checkpoint.pt").write_text("hello"), ["checkpoint.pt", "damaged"]),
    (lambda run: torch.save(dict(log="[]"), run / "checkpoint.pt"), ["checkpoint.pt", "damaged"]),
    (lambda run: torch.save(state_of(run) | dict(model={}), run / "checkpoint.pt"), ["checkpoint.pt"]),
    (lambda run: torch.save(dict(x=Bomb(run.parent / "boom")), run / "checkpoint.pt"), ["checkpoint.pt"]),
], ids="torn zip,text,foreign,no weights,bomb".split(","))
def test_a_damaged_run_is_refused(cli, half, damage, words):
    """One line names the damaged file; nothing is changed, and nothing in it is executed."""
    damage(half)
    before = files_of(half)
    assert refused(cli("--resume", out=half), *words)
    assert files_of(half) == before and not (half.parent / "boom").exists()


def test_a_run_is_never_overwritten(cli, make, toys, half, tmp_path):
    """Without --resume, or with settings that change the rows, a run folder stays as it is, byte for byte."""
    before = files_of(half)
    assert refused(cli(out=half), "--resume", "--out")
    assert refused(cli("--resume --lr 1 --kl-cov-coef 3 --method pg", out=half), "--lr", "--kl-cov-coef", "--method")
    assert refused(cli("--resume --threads 2 --seed 1", out=half), "--threads", "--seed")
    assert files_of(half) == before
    assert json.loads((half / "config.json").read_text())["threads"] == 1
    assert refused(cli("--resume --steps 3", out=half), "--steps 3", "4")
    assert files_of(half) == before
    make.run(half, steps=5, resume=True, checkpoint_every=2)  # neither of these changes a row


def test_what_resume_finds_is_told(cli, toys, half, tmp_path):
    """A folder without a run begins one, with a note; a model of another shape is refused."""
    status, out, _ = cli("--resume --steps 1", out=tmp_path / "new")
    assert status == 0 and out.count("nothing to resume") == 1 and "nothing to resume" not in cli("--steps 1")[1]
    model, tokenizer = er.tiny_policy(32)
    toys.setattr(er, "load_policy", lambda config: er.Policy(model, tokenizer, [1], 0))
    assert refused(cli("--resume --steps 8", out=half), "checkpoint.pt", "--model", "state_dict", "--out")


@pytest.mark.parametrize("error,status", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 2),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried"), 2),
    (RuntimeError("a defect"), None)])
def test_out_of_memory_is_told_and_a_defect_is_not_hidden(cli, toys, error, status):
    def fail(*arguments, **keywords):
        raise error
    toys.setattr(er, "sample_rollouts", fail)
    if status is None:
        with pytest.raises(RuntimeError, match="defect"):
            cli()
    else:
        assert refused(cli(), "out of memory", "--micro-batch", "--prompts")


def test_a_model_folder_is_not_a_run_folder(cli, policy, tmp_path):
    """--out that names somebody's checkpoint does not replace its config.json."""
    model = shutil.copytree(policy, tmp_path / "model")
    before = files_of(model)
    assert refused(cli(out=model), str(model)) and refused(cli("--resume", out=model), str(model))
    assert files_of(model) == before


def test_a_failed_start_does_not_block_the_next(cli, make, toys, tmp_path):
    """What a start that failed left behind needs no --resume, and no other --out."""
    assert refused(cli(data="missing.jsonl"), "missing.jsonl")
    assert refused(cli(device="nope"), "nope")
    assert len(rows_of(make.run(tmp_path / "run", steps=1))) == 2


# ---------------------------------------------------------------------------------------------------------------
# Determinism

def test_one_seed_gives_one_run(make, toys, runs, tmp_path):
    """The same seed: the same rows and weights, and no global state used. Another seed: other rows."""
    random.seed(5), torch.manual_seed(5), torch.set_num_threads(1)
    before = random.getstate(), torch.get_rng_state().tolist(), signal.getsignal(signal.SIGINT)
    again = make.run(tmp_path / "again", threads=1)
    assert before == (random.getstate(), torch.get_rng_state().tolist(), signal.getsignal(signal.SIGINT))
    assert_same_run(again, runs["whole"])
    assert rows_of(make.run(tmp_path / "other", seed=1, steps=1))[0] != rows_of(again)[0]


def test_the_order_of_the_data_depends_on_the_seed_alone(make, toys, tmp_path):
    """Every method sees the same problems at the same step; each epoch has every problem once, in another order."""
    def order(**changes):
        seen, collect = [], er.collect
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(er, "TRAIN_PROBLEMS", 12)
            patch.setattr(er, "collect", lambda c, p, problems, *a, **k: (
                seen.append([x["problem"] for x in problems]), collect(c, p, problems, *a, **k))[1])
            make.run(tmp_path / f"run{random.random()}", steps=6, eval_every=0, **changes)
        return seen[1:]  # step 0 looks only
    batches = order(method="grpo")
    assert batches == order(method="clip_cov", group_size=2, lr=1e-4, advantage="rloo")
    assert batches != order(method="grpo", seed=1)
    first, second = sum(batches[:3], []), sum(batches[3:], [])
    assert sorted(first) == sorted(second) and len(set(first)) == 12 and first != second


# ---------------------------------------------------------------------------------------------------------------
# Signals, numbers, disks

@pytest.mark.parametrize("place", ["policy_loss", "evaluate", "sample_rollouts", "append"],
                         ids=["loss", "evaluation", "sampling", "log"])  # -k policy_loss grades that function alone
def test_ctrl_c_finishes_the_step(cli, make, toys, runs, tmp_path, place):
    """SIGINT anywhere in a step: the step is finished, the checkpoint written, 130; resumed, the unbroken run."""
    real, calls = getattr(er, place), []

    def interrupted(*arguments, **keywords):
        calls.append(1)
        if len(calls) == dict(evaluate=2).get(place, 6):
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **keywords)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(er, place, interrupted)
        status, out, _ = cli()
    run = tmp_path / "run"
    done = rows_of(run)
    assert status == 130 and "--resume" in out and 1 < len(done) < 9
    assert json.loads(state_of(run)["log"])["rows"][-1]["step"] == done[-1]["step"]
    make.run(run, resume=True)
    assert_same_run(run, runs["whole"])


def test_ctrl_c_in_the_last_step_or_before_the_first(cli, toys, tmp_path):
    """In the last step the run ends whole, with 130, so that --compare stops too; before the first it stops at once."""
    real, kill = er.evaluate, lambda *a: os.kill(os.getpid(), signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(er, "evaluate", lambda *a: (kill(), real(*a))[1])
        assert cli(steps=1, eval_every=1, eval_problems=2, seeds="0,0", compare=True)[0] == 130
    runs = [*Path(tmp_path, "run").iterdir()]
    assert len(runs) == 1 and len(rows_of(runs[0])) == 1  # stopped after step 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(er, "evaluate", lambda *a: (kill() if len(rows_of(runs[0])) == 1 else 0, real(*a))[1])
        assert cli(steps=1, eval_every=1, eval_problems=2, compare=True)[0] == 130
    assert [*Path(tmp_path, "run").iterdir()] == runs and len(rows_of(runs[0])) == 2 and (runs[0] / "policy").is_dir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(er, "load_policy", kill)
        assert cli(out=tmp_path / "other")[0] == 130
    assert not [*(tmp_path / "other").iterdir()]


def test_a_second_ctrl_c_stops_at_once(cli, make, toys, runs, tmp_path):
    """Two SIGINT in one step: 130 without finishing it, and the run can be gone on with."""
    real = er.policy_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(er, "policy_loss", lambda *a, **k: (signal.raise_signal(signal.SIGINT), real(*a, **k))[1])
        assert cli()[0] == 130
    assert len(rows_of(tmp_path / "run")) == 1
    assert_same_run(make.run(tmp_path / "run", resume=True), runs["whole"])


def spoil(kind):
    """policy_loss whose value is NaN, or whose gradient has one infinite or NaN entry."""
    real = er.policy_loss

    def spoiled(config, logprobs, *arguments, **keywords):
        loss = real(config, logprobs, *arguments, **keywords)
        if kind == "loss":
            return loss * math.nan
        first = torch.zeros_like(logprobs, dtype=torch.bool)
        first[0, 0] = True
        logprobs.register_hook(lambda grad: grad.masked_fill(first, float(kind)))
        return loss
    return spoiled


@pytest.mark.parametrize("kind", ["loss", "inf", "nan"])
def test_numbers_that_are_not_finite_never_reach_the_weights(make, toys, half, capsys, kind):
    """NaN at one step: weights and optimizer untouched to the bit, the row says so, said once, the run goes on."""
    before = state_of(half)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(er, "policy_loss", spoil(kind))
        make.run(half, steps=6, resume=True)
    after, rows = state_of(half), rows_of(half)
    assert bits(after["model"]) == bits(before["model"]) and bits(after["optimizer"]) == bits(before["optimizer"])
    assert [r["skipped_updates"] == r["updates"] > 0 for r in rows[1:]] == [False] * 4 + [True] * 2
    assert capsys.readouterr().out.count("not finite") == 1
    make.run(half, steps=7, resume=True)
    row = rows_of(half)[-1]
    assert row["updates"] > row["skipped_updates"] == 0 and bits(state_of(half)["model"]) != bits(before["model"])


def test_a_system_without_resource(make, toys, tmp_path):
    """Where the peak memory cannot be read, as on Windows, the log has null for it."""
    toys.setattr(er, "resource", None)
    assert [row["peak_memory_mb"] for row in er.read_log(make.run(tmp_path / "run", steps=1))] == [None, None]


def test_several_steps_without_a_finite_number_end_the_run(cli, toys, policy, tmp_path):
    """NaN in every update: exit 2 after a few steps, and the checkpoint holds the weights from before them."""
    toys.setattr(er, "policy_loss", spoil("loss"))
    status, _, errors = cli(steps=50)
    assert status == 2 and "finite" in errors[-1] and "Traceback" not in str(errors)
    assert 3 <= len(rows_of(tmp_path / "run")) <= 12
    start = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    assert bits(state_of(tmp_path / "run")["model"]) == bits(dict(start.state_dict()))


def test_weights_that_overflow_end_the_run(cli, toys):
    """A learning rate that drives the policy to infinity ends in one line on --lr."""
    assert refused(cli(lr=1e30), "--lr")


def full(patch, how, folder):
    """Make the disk full for everything over 100 kB, or from the moment of the second checkpoint on."""
    if how == "tmpfs":
        folder.mkdir()
        if subprocess.run(f"mount -t tmpfs -o size=200k tmpfs {folder}".split(), capture_output=True).returncode:
            pytest.skip("mounting takes root")
        return lambda: subprocess.run(["umount", folder], check=True)
    if how == "limit":
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        real, calls = er.write, []

        def write(path, data):
            calls.append(path.name)
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000 if calls.count("checkpoint.pt") == 2 else soft, hard))
            real(path, data)
        patch.setattr(er, "write", write)
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    calls = []

    def no_space(*arguments, real=getattr(os, how)):
        calls.append(1)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)
    patch.setattr(os, how, no_space)
    return patch.undo


@pytest.mark.parametrize("how", ["tmpfs", "limit", "fsync", "replace"])
def test_a_disk_that_fills_up_leaves_the_last_checkpoint(cli, make, runs, tmp_path, how):
    """A write that fails in mid-run: one line, exit 2; the checkpoint before it loads, and resumes."""
    run, kept = tmp_path / "disk" / "run", tmp_path / "kept"
    with pytest.MonkeyPatch.context() as patch:
        toy(patch)
        restore = full(patch, how, tmp_path / "disk")
        try:
            result = cli(out=run)
            if how == "tmpfs":
                shutil.copytree(run, kept)
        finally:
            restore()
        if how != "tmpfs":
            shutil.copytree(run, kept)
        toy(patch)
        assert refused(result, "cannot be written", "checkpoint.pt")
        assert not list(kept.glob("*.tmp")) and state_of(kept)["model"]
        make.run(kept, resume=True)
    assert_same_run(kept, runs["whole"])


def test_a_log_or_a_policy_that_cannot_be_written_ends_in_one_line(cli, make, toys, runs, half):
    """A disk that is full when a row is added, or when the policy is saved: one line, and --resume mends it."""
    def no_space(*arguments, **keywords):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(er, "open", lambda path, mode: no_space() if mode == "a" else open(path, mode), raising=False)
        assert refused(cli("--resume", out=half), "metrics.jsonl", "No space")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(er.Qwen2ForCausalLM, "save_pretrained", no_space)
        assert refused(cli("--resume", out=half), "policy", "No space")
    assert_same_run(make.run(half, resume=True), runs["whole"])


# ---------------------------------------------------------------------------------------------------------------
# Bad input

NAMED = """
    --advantage gae; --no-such-flag 1; --step 3; --steps 0; --steps 2.5; --steps many; --steps; --prompts -4;
    --group-size 1; --updates 0; --micro-batch -1; --max-new-tokens 0; --temperature 0; --temperature nan; --lr
    inf; --lr -0.1; --lr fast; --seed -1; --threads -1; --eval-samples 0; --eval-problems 0; --eval-every -1;
    --eval-problems 30000;
    --checkpoint-every 0; --clip-low -0.2; --clip-high nan; --clip-cov-ratio 1.5; --kl-cov-fraction -0.1;
    --kl-cov-fraction 2; --kl-cov-coef inf; --entropy-coef -1; --report
"""  # the line names the flag
BAD = r"""
    --method ppo                              | --method grpo kl_cov
    --kl-estimator k1                         | --kl-estimator abs k2 k3
    --updates 3                               | --updates --prompts divide
    --clip-cov-low 5 --clip-cov-high 1        | --clip-cov-low --clip-cov-high below
    --clip-cov-low nan                        | --clip-cov-low nan number
    --prompt-template "What is it?"           | --prompt-template {problem}
    --probe --updates 4                       | --probe --updates
    --seeds 0,1                               | --seeds --compare
    --max-new-tokens 2000                     | --max-new-tokens 2000 1024 --model
    --device nope                             | --device nope
    --device cuda:99                          | --device cuda
    --device meta                             | --device meta
    --model tiny --device nope                | --device nope
    --model tiny-17                           | tiny-17 16
    --model tiny-0                            | tiny-0
    --model tiny-big                          | tiny-big tiny-WIDTH
    --model tinyhouse                         | tinyhouse
    --model nobody/no-such-model              | nobody/no-such-model
    --model nowhere/a/b/c                     | nowhere/a/b/c
    --model empty                             | --model empty
    --model torn                              | --model torn
    --model wordless                          | wordless folder
    --model coded                             | --model coded
    --data nowhere.jsonl                      | nowhere.jsonl Unable to find
    --data zero.jsonl                         | zero.jsonl with rows in it
    --data prose.jsonl                        | prose.jsonl
    --data prose.json                         | prose.json json
    --data prose.parquet                      | prose.parquet parquet
    --data binary.csv                         | binary.csv csv
    --data good.txt                           | good.txt .jsonl .json .csv .parquet
    --data empty                              | empty
    --data folder.jsonl                       | folder.jsonl
    --data columns.jsonl                      | columns.jsonl problem answer colour shape
    --data answerless.jsonl                   | answerless.jsonl answer
    --data listed.jsonl                       | listed.jsonl answer
    --data few.jsonl                          | few.jsonl --prompts
    --data numbers.jsonl                      | numbers.jsonl
    --data chat.jsonl                         | chat.jsonl
    --eval-data nowhere.csv                   | nowhere.csv
    --eval-data columns.jsonl                 | columns.jsonl colour
    --data nobody/no-such-data                | nobody/no-such-data
    --out good.txt                            | good.txt file
    --out good.txt/run                        | good.txt/run
    --out /proc/no/run                        | /proc/no/run
    --compare --seeds 0,x                     | --seeds 0,x
    --compare --seeds 0,,1                    | --seeds 0,,1
    --compare --seeds ²                       | --seeds ²
    --report nowhere                          | nowhere
    --report empty                            | empty config.json
    --report good.txt                         | good.txt
    --report damaged                          | damaged line 2
    --report binary                           | binary metrics.jsonl
    --report foreign                          | foreign metrics.jsonl
    --eval-only --model empty                 | --model empty
"""  # arguments | words of the line


@pytest.fixture(scope="session")
def wrong(tmp_path_factory, policy):
    """A folder of files and folders, each wrong in its own way."""
    root = tmp_path_factory.mktemp("wrong")
    for name in ("empty", "folder.jsonl", "damaged", "binary", "foreign"):
        (root / name).mkdir()
        (root / name / "config.json").write_text("{}") if name in ("damaged", "binary", "foreign") else None
    good = "".join(json.dumps(dict(problem=f"{n}+1?", answer=str(n + 1))) + "\n" for n in range(20))
    lines = {"zero.jsonl": "", "prose.jsonl": "once upon\n", "prose.json": "{once", "prose.parquet": "upon a time",
             "good.txt": good, "columns.jsonl": '{"colour": 1, "shape": "2"}\n',
             "few.jsonl": good[:good.index("\n") + 1],
             "answerless.jsonl": '{"problem": "1", "answer": ""}\n{"problem": "2", "answer": null}\n',
             "listed.jsonl": '{"problem": "1", "answer": ["1"]}\n{"problem": "2", "answer": ["2"]}\n',
             "numbers.jsonl": "".join(f'{{"problem": [{n}], "answer": {n}}}\n' for n in range(20)),
             "chat.jsonl": "".join(f'{{"prompt": [{{"role": "user", "text": "{n}"}}], "answer": 1}}\n' for n in "abcd"),
             "damaged/metrics.jsonl": '{"step": 0}\n{"step"\n{"step": 2}\n',
             "foreign/metrics.jsonl": '{"loss": "low"}\n{"step": "one", "eval_avg": "x", "entropy": 1}\n' * 2}
    for name, text in lines.items():
        (root / name).write_text(text)
    for name in ("binary.csv", "binary/metrics.jsonl"):
        (root / name).write_bytes(b"\xff\xfe\x00\n" * 9)
    for name in ("torn", "wordless", "coded", "tinyhouse"):
        shutil.copytree(policy, root / name)
    cut(root / "torn", "model.safetensors", 5000)
    cut(root / "tinyhouse", "model.safetensors", 5000)  # its name is no reason to take the built-in policy
    for path in (root / "wordless").glob("tokenizer*"):
        path.unlink()
    (root / "coded" / "config.json").write_text(json.dumps(dict(model_type="own", auto_map=dict(
        AutoConfig="code.Own", AutoModelForCausalLM="code.Own"))))
    (root / "coded" / "code.py").write_text(f"open({str(root / 'boom')!r}, 'w')\nclass Own: pass\n")
    return root


CASES = dict((" ".join(flag.split()), flag.split()[0]) for flag in NAMED.split(";")) | dict(
    [part.strip() for part in line.split("|")] for line in BAD.strip().splitlines())


@pytest.mark.parametrize("arguments", CASES)
def test_bad_input_ends_with_one_line(cli, wrong, monkeypatch, arguments):
    """Exit status 2, one line that names what is wrong, no traceback, before any long work, nothing executed."""
    def too_late(*arguments, **keywords):
        raise AssertionError("long work had begun")
    for name in ("sample_rollouts", "response_logprobs"):
        monkeypatch.setattr(er, name, too_late)
    monkeypatch.chdir(wrong)
    monkeypatch.setenv("XDG_CACHE_HOME", str(wrong / "cache"))
    monkeypatch.setattr("builtins.input", lambda *a: "y")  # to whatever might ask
    try:
        assert refused(cli(arguments), *CASES[arguments].split())
        assert not (wrong / "boom").exists()
    finally:
        (wrong / "boom").unlink(missing_ok=True)


@pytest.mark.parametrize("arguments,word", [("--method ppo", "kl_cov"),
                                            ("--eval-only --data prose.jsonl", "JSON")])
def test_bad_input_in_a_shell(tmp_path, wrong, arguments, word):
    """The script itself, as a user starts it: status 2 and one line, no library's own, nothing written."""
    shutil.copy(wrong / "prose.jsonl", tmp_path)
    command = [sys.executable, er.__file__, *arguments.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and word in done.stderr and not done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["prose.jsonl"]


def test_a_cache_that_cannot_be_written_is_told_before_the_warm_up(cli, monkeypatch, wrong):
    """XDG_CACHE_HOME under a file: one line, and no minute of warm-up lost."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(wrong / "good.txt"))
    monkeypatch.setattr(er, "response_logprobs", None)
    assert refused(cli(model="tiny-16"), "good.txt")


def test_two_processes_that_warm_up_at_once(monkeypatch, tmp_path):
    """The slower one finds the other's policy in the cache, takes it, and leaves no draft."""
    first = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(er, "imitate", lambda *a: first or (first.append(0), first.append(er.warm_up("tiny-16"))))
    assert er.warm_up("tiny-16") == first[1] and [*first[1].parent.iterdir()] == [first[1]]


def test_another_warm_up(monkeypatch, tmp_path, capsys):
    """The README's shell line draws another warm policy, by its first weights and by its texts, with a key of its own."""
    other = tmp_path / "warm1.py"
    line = f"""sed "s/^WARM_UP_SEED = 0/WARM_UP_SEED = 1/" '{er.__file__}' > '{other}'"""
    subprocess.run(line, shell=True, check=True)
    spec = importlib.util.spec_from_file_location("warm1", other)
    monkeypatch.setitem(sys.modules, "warm1", module := importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    weights, texts, folders = [], [], []
    for code in (er, module):
        monkeypatch.setattr(code, "WARM_UP_STEPS", 1)
        monkeypatch.setattr(code, "WARM_UP_LR", 0)
        monkeypatch.setattr(code, "crowd_solution", lambda text, *a: texts.append(text) or "=")
        folders.append(code.warm_up("tiny-16"))
        weights.append(bits(dict(AutoModelForCausalLM.from_pretrained(folders[-1]).state_dict())))
    assert capsys.readouterr().out.count("warm-up of the built-in policy, once") == 2  # each is said
    assert folders[0] != folders[1] and weights[0] != weights[1] and texts[:128] != texts[128:] and len(texts) == 256


# ---------------------------------------------------------------------------------------------------------------
# Data

def problems_of(data, split="train", **changes):
    return er.load_problems(er.Config(data=str(data), **changes), split)


def table(folder, name, rows):
    """Write rows as a data file of the name's suffix."""
    import datasets
    data, path = datasets.Dataset.from_list(rows), str(folder / name)
    dict(jsonl=data.to_json, json=lambda p: Path(p).write_text(json.dumps(rows)), csv=data.to_csv,
         parquet=data.to_parquet)[name.rpartition(".")[2]](path)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a [1]*.jsonl"])
def test_data_files(tmp_path, name):
    """The same rows come out of every kind of file; those without a readable answer are left out, and counted."""
    rows = [dict(problem=f"p{n}", answer=f"{n}/2") for n in range(20)] + [dict(problem="q", answer=None)]
    path = table(tmp_path, name, rows)
    found = problems_of(path, "train") + problems_of(path, "test")
    assert sorted(map(str, found)) == sorted(map(str, rows[:-1]))


def test_rows_without_an_answer_are_counted(cli, toys, tmp_path):
    """How many rows were skipped stands in the output."""
    rows = [dict(problem=f"{n}+1?", answer=["1", "", None, "x" * 5000][n % 4]) for n in range(40)]
    status, out, _ = cli(data=table(tmp_path, "d.jsonl", rows), steps=1)
    assert status == 0 and out.count("30 of 40 rows skipped") == 1


@pytest.mark.parametrize("question,asked", [("problem", "1+1?"), ("question", "1+1?"), ("prompt", "1+1?"),
                                            ("prompt", [dict(role="user", content="1+1?")])])
@pytest.mark.parametrize("answer,gold", [("answer", "2"), ("ground_truth", "2"), ("answer", "One and one.\n#### 2"),
                                         ("solution", r"$1+1=\boxed{3}$, no: $\boxed{2}$")])
def test_columns(tmp_path, question, asked, answer, gold):
    """Question and answer columns by any of their names; a chat; an answer at the end of a solution."""
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"id": n, question: asked, answer: gold}) + "\n" for n in range(2)))
    assert problems_of(path, "test") == [dict(problem=asked, answer="2")]


def test_train_and_held_out_are_disjoint(make, toys, tmp_path):
    """Built-in splits by construction; one file used for both; two files that overlap; the same file twice."""
    splits = [{p["problem"] for p in er.arithmetic_problems(split, 1500)} for split in ("train", "dev", "test")]
    assert not splits[0] & splits[1] and not splits[0] & splits[2] and not splits[1] & splits[2]
    rows = [dict(problem=f"{n}+{n}?", answer=str(2 * n)) for n in range(60)]
    one, two = table(tmp_path, "one.jsonl", rows[:40]), table(tmp_path, "two.jsonl", rows[30:])
    twice = table(tmp_path, "twice.jsonl", rows + rows)
    for settings, trained, held in (
            (dict(data=one), 36, 4), (dict(data=one, eval_data=one), 36, 4), (dict(data=one, eval_data=two), 30, 30),
            (dict(data=two, eval_data="arithmetic"), 30, 6), (dict(data=twice), 54, 6),
            (dict(data=one, eval_data=f"{tmp_path}/./one.jsonl"), None, None)):
        size = 6 if trained is None or settings.get("eval_data") == "arithmetic" else 30
        _, test, train = er.prepare(make(tmp_path / "run", eval_problems=size, **settings), train=True)
        assert not {p["problem"] for p in train} & {p["problem"] for p in test} and train and test
        assert trained is None or (len(train), len(test)) == (trained, held)


@pytest.mark.parametrize("name,layout,read", [
    ("openai/gsm8k", dict(socratic=["train", "test"], main=["train", "test"]),
     dict(train="main/train", test="main/test")),
    ("x/validated", dict(default=["train", "validation"]), dict(train="default/train", test="default/validation")),
    ("x/test first", dict(default=["test", "train"]), dict(train="default/train", test="default/test")),
    ("x/trained", dict(default=["train"]), dict(train="default/train", test="default/train")),
    ("HuggingFaceH4/MATH-500", dict(default=["test"]), dict(train="default/test", test="default/test"))])
def test_hub_data_sets(monkeypatch, name, layout, read):
    """Which configuration and split of a hub data set is read; where one serves both, it is divided."""
    import datasets
    asked = []

    def rows(split):
        asked.append(split)
        kind = "tr" if "train" in split else "te"
        return datasets.Dataset.from_list([dict(question=f"{kind}{n}", answer=f"so #### {n}") for n in range(50)])

    class Splits(dict):
        def __getitem__(self, split): return rows(f"{self.config}/{split}")

    def load(source, config=None, **keywords):
        assert source == name and not keywords.get("trust_remote_code")
        splits = Splits.fromkeys(layout[config])
        splits.config = config
        return splits
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda source, **k: [*layout])
    monkeypatch.setattr(datasets, "load_dataset", load)
    train, test = (problems_of(name, split, eval_problems=20) for split in ("train", "test"))
    assert asked == [read["train"], read["test"]]
    shared = read["train"] == read["test"]
    assert (len(train), len(test)) == ((45, 5) if shared else (50, 20))
    assert not {p["problem"] for p in train} & {p["problem"] for p in test}
    asked.clear()
    assert len(problems_of("arithmetic", "test", eval_data=name, eval_problems=20)) == 20 and asked == [read["test"]]


class Hub(BaseHTTPRequestHandler):
    """A stand-in of the hub: what its two client libraries ask for, from the files of `root`/models and /datasets."""
    root, commit = None, "0" * 40

    def log_message(self, *text):
        pass

    def reply(self, status, data=b"", **headers):
        self.send_response(status)
        for key, value in dict(Content_Length=len(data), X_Repo_Commit=self.commit, **headers).items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_GET(self):
        first, *parts = urlsplit(self.path).path.strip("/").split("/")
        if first not in ("api", "datasets"):        # a model's file has no "models/" before it
            first, parts = "models", [first, *parts]
        kind, *parts = parts if first == "api" else (first, *parts)
        repo = self.root / kind / "/".join(parts[:2])
        if not parts[1:] or not repo.is_dir():
            return self.reply(404, X_Error_Code="RepoNotFound")
        path = repo.joinpath(*parts[4:])            # ID/resolve/REVISION/PATH, or tree/REVISION/PATH
        if first == "api" and path.is_dir():
            deep = "recursive=true" in self.path or parts[2:3] != ["tree"]
            found = [dict(type="file" if file.is_file() else "directory", path=str(file.relative_to(repo)),
                          rfilename=str(file.relative_to(repo)), oid=file.name, size=file.stat().st_size)
                     for file in (path.rglob("*") if deep else path.iterdir())]
            return self.reply(200, json.dumps(found if parts[2:3] == ["tree"] else dict(
                id="/".join(parts[:2]), sha=self.commit, siblings=found, private=False, tags=[])).encode())
        if not path.is_file():
            return self.reply(404, X_Error_Code="EntryNotFound")
        self.reply(200, path.read_bytes(), ETag=f'"{path.name}"')

    do_HEAD = do_GET


@pytest.mark.skipif("ENTROPY_RL" in os.environ, reason="a handout trains nothing")
def test_the_hub_commands(policy, tmp_path):
    """The README's commands for GSM8K and MATH, in small, over HTTP; what the hub does not have is one line."""
    import datasets
    root = tmp_path / "hub"
    shutil.copytree(policy, root / "models/Qwen/Qwen2.5-0.5B")
    gsm8k, math, math500 = (root / "datasets" / name for name in (
        "openai/gsm8k", "DigitalLearningGmbH/MATH-lighteval", "HuggingFaceH4/MATH-500"))
    layout = {gsm8k / "socratic": "socratic", gsm8k / "main": "main", math / "data": "default"}
    for folder, name in layout.items():
        folder.mkdir(parents=True)
        for split, count in (("train", 9), ("test", 5)):
            rows = [dict(question=f"{name} {split} {i}", answer=f"so\n#### {i}") if folder.parent == gsm8k else
                    dict(problem=f"{split} {i}", solution=f"so \\boxed{{{i}}}") for i in range(count)]
            datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    for repo in (gsm8k, math):
        (repo / "README.md").write_text("---\nconfigs:\n" + "".join(
            f"- config_name: {name}\n  data_files:\n" + "".join(
                f"  - split: {split}\n    path: {folder.name}/{split}-*\n" for split in ("train", "test"))
            for folder, name in layout.items() if folder.parent == repo) + "---\n")
    math500.mkdir(parents=True)
    (math500 / "test.jsonl").write_text("".join(
        json.dumps(dict(problem=f"held out {i}", solution="so", answer=str(i))) + "\n" for i in range(6)))
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Hub,), dict(root=root)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    small = ("--max-new-tokens 6 --steps 1 --prompts 2 --group-size 2 --updates 1 --eval-problems 5 --eval-samples 1 "
             "--threads 1 --device cpu --method kl_cov --model Qwen/Qwen2.5-0.5B --data ")
    commands = [small + "openai/gsm8k --out gsm8k", small + "DigitalLearningGmbH/MATH-lighteval --eval-data "
                "HuggingFaceH4/MATH-500 --out math", "--eval-only --model gsm8k/policy --data openai/gsm8k "
                "--max-new-tokens 6 --eval-samples 1", small + "openai/nothing --out no",
                small.replace("0.5B", "9B") + "openai/gsm8k --out no"]
    code = f"import entropy_rl as er; print([er.main(command.split()) for command in {commands}])"
    env = {k: v for k, v in os.environ.items() if "OFFLINE" not in k}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=env | dict(
        HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=str(tmp_path / "home"),
        NO_PROXY="127.0.0.1", PYTHONPATH=str(Path(er.__file__).parent)))
    server.shutdown()
    assert done.stdout.endswith("[0, 0, 0, 2, 2]\n"), done.stdout + done.stderr
    refusals = [line for line in done.stderr.splitlines() if line.startswith("entropy_rl.py: ")]
    assert len(refusals) == 2 and "openai/nothing" in refusals[0] and "Qwen2.5-9B" in refusals[1]
    seen = {name: {row["problem"] for row in er.read_log(tmp_path / name, "samples.jsonl")} for name in ("gsm8k", "math")}
    assert seen["gsm8k"] <= {f"main test {i}" for i in range(5)} and seen["math"] <= {f"held out {i}" for i in range(6)}
    assert '"eval_problems": 5' in done.stdout


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints of others

def test_stop_tokens_and_chats(policy, tmp_path):
    """Both the model's and the tokenizer's stop token; a chat fills the template as it is, a text with the request."""
    folder = shutil.copytree(policy, tmp_path / "model")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | dict(eos_token_id=5)))
    loaded = er.load_policy(er.Config(model=str(folder), device="cpu", threads=1))
    assert loaded.eos_token_ids == [1, 5]
    loaded.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}="
    ids = lambda text: loaded.tokenizer(text).input_ids
    assert loaded.encode([dict(role="user", content="1+"), dict(role="user", content="2")], "") == ids("1+2=")
    assert loaded.encode("1+2", "") == ids(er.INSTRUCTION.replace("{problem}", "1+2") + "=") != ids("1+2=")
    assert loaded.encode([dict(role="user", content="1+2")], "{problem}-") == ids("1+2-")


@pytest.mark.parametrize("kind", ["pad is eos", "no pad", "two stops"])
def test_a_local_checkpoint_trains_on_local_data(cli, toys, tmp_path, kind):
    """A folder with a chat template on GSM8K-shaped rows: the stop token is in the loss, the saved policy loads."""
    model, tokenizer = er.tiny_policy(16)
    tokenizer.chat_template = "{% for m in messages %}7-{{ m['content'] }}=7{% endfor %}"
    tokenizer.pad_token = dict([("pad is eos", "<eos>"), ("no pad", None)]).get(kind, "<pad>")
    model.generation_config.eos_token_id = [1, 3] if kind == "two stops" else 1
    model.save_pretrained(tmp_path / "model"), tokenizer.save_pretrained(tmp_path / "model")
    rows = [dict(question=f"Ann has {n} apples.", answer=f"Ann has <<{n}*2>> two each.\n#### {n}") for n in range(20)]
    real, seen, connected = er.sample_rollouts, [], []
    toys.setattr(socket.socket, "connect", lambda *a: connected.append(a))
    toys.setattr(er, "sample_rollouts", lambda *a, **k: seen.append((a[1], k, real(*a, **k))) or seen[-1][2])
    losses, real_loss, coin = [], er.policy_loss, itertools.cycle((0.0, 1.0))
    toys.setattr(er, "math_reward", lambda *a: next(coin))  # so that no group is left out of the loss
    toys.setattr(er, "policy_loss", lambda *a, **k: losses.append(a[4]) or real_loss(*a, **k))  # the mask
    status, _, errors = cli(model=tmp_path / "model", data=table(tmp_path, "gsm8k.jsonl", rows), steps=2)
    assert status == 0 and not connected, errors
    prompts, settings, rollouts = seen[0]
    assert all(tokenizer.decode(ids).startswith("7-") and tokenizer.decode(ids).endswith("=7") for ids in prompts)
    stops = {1, 3} if kind == "two stops" else {1}
    assert {*settings["eos_token_ids"]} == stops
    ended = set()
    for _, _, rollouts in seen:
        tokens, mask = rollouts.input_ids[:, -rollouts.response_mask.shape[1]:], rollouts.response_mask
        for row, kept in zip(tokens.tolist(), mask.tolist()):
            first = next((i for i, t in enumerate(row) if t in stops and kept[i]), None)
            assert sum(kept) == (len(row) if first is None else first + 1)
            ended |= {row[first]} if first is not None else set()
    assert ended == stops
    assert sum(int(m.sum()) for m in losses) == sum(r["tokens"] for r in er.read_log(tmp_path / "run")[1:])
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy", dtype=torch.float32)
    saved_weights, start = bits(dict(saved.state_dict())), bits(dict(model.state_dict()))
    assert saved_weights == bits(state_of(tmp_path / "run")["model"]) != start
    assert saved.generation_config.eos_token_id == ([1, 3] if kind == "two stops" else 1)


# ---------------------------------------------------------------------------------------------------------------
# Reports

def synthetic(folder, points, **changes):
    """A run folder with a log of (entropy, accuracy) points."""
    quadrants = dict(quadrant_tokens=[0.1, 0.2, 0.3, 0.4], quadrant_cov=[0.5, -0.25, -0.25, 0.5],
                     quadrant_selected=[6.0, 0.0, 0.0, 2.0])
    rows = [dict(step=n, entropy=h, reward=r, response_length=9.0, seconds=1.0, eval_avg=r, eval_k=4) |
            (dict(cov_mean=0.5, most_selected={"\x1b[2J": 2, "=": 6}, updates=1, skipped_updates=0, selected_tokens=8,
                  **{f"cov_top_{p}": 50 - p for p in (0.02, 0.2, 2, 20, 50)}, **quadrants) if n else {})
            for n, (h, r) in enumerate(points)]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(method="grpo", seed=3) | changes))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def decay(n, a=0.25, b=0.875):
    return [(h, -a * math.exp(h) + b) for h in (1.2 * 0.9 ** i for i in range(n))]


def test_report_of_a_known_law(cli, tmp_path):
    """a, b, ceiling, fit and prediction of a log that obeys the law; Fig. 2, Table 1, quadrants, tokens; a PNG."""
    run = synthetic(tmp_path / "grpo-seed3", decay(26))
    status, out, errors = cli(f"--report {run}", small=False)
    assert status == 0 and not errors
    a, b, ceiling, r2, rmse = map(float, re.search(
        r"R = -([\d.]+) exp\(H\) \+ ([\d.]+); ceiling b - a = ([\d.]+); R2 ([\d.]+), RMSE ([\d.]+)", out).groups())
    assert (a, b, ceiling, r2, rmse) == (0.25, 0.875, 0.625, 1, 0)
    assert re.findall(r"from the first (\w+) .*RMSE ([\d.]+) over the other (\d+), .([\d.]+) at the last", out) == [
        ("15", "0.0000", "22", "0.0000"), ("third", "0.0000", "17", "0.0000")]
    points = decay(26)
    spent = (points[8][0] - points[0][0]) / (points[-1][0] - points[0][0])
    gained = (points[8][1] - points[0][1]) / (points[-1][1] - points[0][1])
    assert re.search(rf"32.0% of the run \(Fig. 2: 1/3\): {spent:.0%} of the entropy spent, {gained:.0%} of the gain", out)
    rows = {row.split()[0]: row.split()[1:4] for row in out.splitlines() if row.startswith(("before", "end"))}
    assert rows["before"] == [f"{points[0][0]:.3f}", "9.000", f"{points[0][1]:.3f}"]
    last_tenth = (points[-2][0] + points[-1][0]) / 2
    assert rows["end"] == [f"{last_tenth:.3f}", "9.000", f"{points[-1][1]:.3f}"] and out.count(" 26.000") == 1  # s
    assert "top 0.02 % 49.980" in out and "top 50 % 0.000" in out
    assert r"= 150, \x1b[2J 50" in out and "\x1b" not in out
    assert re.search(r"share of the selected +0.750 +0.000 +0.000 +0.250", out)
    assert "poor" not in out and "did not learn" not in out and "intervenes" not in out
    picture = run / "report.png"
    assert str(picture) in out and picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 200_000


def test_report_of_a_probe(cli, monkeypatch, tmp_path):
    """Correlation and slope of the measured change on both predictions; a step without an update, and a null, do not
    stop it."""
    run = synthetic(tmp_path / "run", decay(9))
    rows = er.read_log(run)
    rows[1]["cov_mean"] = None
    for n, row in enumerate(rows[2:], 2):
        row |= dict(probe_first_order=0.5 * n, probe_covariance=-0.25 * n, probe_entropy_change=float(n),
                    probe_covariance_by_right=[None, n / 10])
    rows[4]["probe_first_order"] = None
    er.append(run / "metrics.jsonl", rows, "w")
    drawn, real = [], er.picture
    monkeypatch.setattr(er, "picture", lambda path, panels: (drawn.extend(panels), real(path, panels)))
    status, out, errors = cli(f"--report {run}", small=False)
    assert status == 0 and not errors and "Cov (Table 1), step 2:" in out
    (_, predicted, [measured], _), = next(curves for title, _, _, curves, _ in drawn if "in an update" in title)
    assert list(zip(predicted, measured)) == [(500.0 * n, 1000.0 * n) for n in (2, 3, 5, 6, 7, 8)]
    assert "<grad H, d theta>: r = 1.000, slope 2\n" in out and "the covariance: r = -1.000, slope -4\n" in out
    assert "prompts with 1 right: 0.5167\n" in out and "with 0 right" not in out


@pytest.mark.parametrize("name,points,words", [  # those in capitals are drawn too
    ("ONE ROW", decay(1), ["too short"]), ("NO ROW", [], ["too short"]),
    ("one entropy", [(0.5, 0.1)] * 5, ["no law"]),
    ("NEVER EVALUATED", [(h, None) for h, _ in decay(9)], ["no law", "Cov (Table 1)", "quadrants"]),
    ("never learned", [(h, 0.3 + 0.01 * (i % 2)) for i, (h, _) in enumerate(decay(12))],
     ["did not learn", "poor fit"]),
    ("exploded", decay(12)[::-1], ["explosion"]),
    ("backwards", [(h, 1 - r) for h, r in decay(12)], ["R = 0.2500 exp(H) + 0.1250", "did not learn"]),
    ("NOT NUMBERS", [(h if i % 5 else None, r if i % 7 else None) for i, (h, r) in enumerate(decay(24), 1)],
     ["R = -0.2500 exp(H) + 0.8750"]),
    ("no numbers", [(None, None)] * 5, ["no law"])])
def test_reports_of_poor_logs(cli, tmp_path, name, points, words):
    """A log that is short, constant, unlearned or not finite: said plainly, status 0, nothing on stderr."""
    status, out, errors = cli(f"--report {synthetic(tmp_path / 'run', points)}", small=False, picture=name.isupper())
    assert status == 0 and not errors and all(word in out for word in words), out


def test_report_has_no_shares_of_no_gain(cli, tmp_path):
    """Fig. 2's shares are told of a run that gained, and not of one that ended where it began or lower."""
    for name, end, told in (("flat", 0.2, 0), ("worse", 0.1, 0), ("better", 0.5, 2)):
        synthetic(tmp_path / name, [(1 - n / 20, 0.2 + n * (end - 0.2) / 12) for n in range(13)])
        status, out, _ = cli(small=False, picture=False, report=tmp_path / name)
        assert status == 0 and out.count("(Fig. 2: 1/") == told and "nan%" not in out


def test_runs_of_two_folders_are_not_seeds_of_one(cli, monkeypatch, tmp_path):
    """Runs of the same name are averaged as seeds only inside one folder."""
    drawn = []
    monkeypatch.setattr(er, "picture", lambda path, panels: drawn.append(panels))
    for folder, seeds in (("one", 2), ("two", 1)):
        (tmp_path / folder).mkdir()
        for seed in range(seeds):
            synthetic(tmp_path / folder / f"grpo-seed{seed}", decay(9))
    er.draw(sorted(tmp_path.glob("*/*")), tmp_path / "picture.png")
    assert [(label, len(y)) for label, x, y, style in drawn[0][0][3]] == [("grpo", 2), ("grpo", 1)]


def test_report_of_an_unfinished_run_without_matplotlib(cli, monkeypatch, tmp_path):
    """A torn last line is left out; without matplotlib the numbers come, and one line says what to install."""
    run = synthetic(tmp_path / "run", decay(9), method="kl_cov")
    cut(run, "metrics.jsonl", -20)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, errors = cli(f"--report {run}", small=False)
    assert status == 0 and not errors and "8 rows" in out and "R = -0.2500 exp(H) + 0.8750" in out
    assert out.count("pip install matplotlib") == 1 and "intervenes" in out and not (run / "report.png").exists()


def test_training_without_matplotlib(cli, toys, tmp_path):
    """The main job needs no matplotlib."""
    toys.setitem(sys.modules, "matplotlib", None)
    status, out, _ = cli(steps=1, picture=True)
    assert status == 0 and "pip install matplotlib" in out and "most selected tokens" in out


def test_a_run_that_is_never_evaluated(cli, toys):
    """--eval-every 0: trains, draws and ends with its table."""
    status, out, errors = cli(eval_every=0, steps=2, picture=True)
    assert status == 0 and "entropy" in out and "nan" not in out and "UserWarning" not in str(errors)


def test_smooth():
    """The mean of the steps up to four away that the log has; evaluations as they are; steps that every log has."""
    one = [dict(step=s, entropy=float(s ** 2), eval_avg=float(s)) for s in range(12)]
    two = [dict(step=s, entropy=1.0, eval_avg=2.0) for s in (0, 5, 11)]
    steps, values = er.smooth([one, two], "entropy")
    assert steps == [0, 5, 11] and values[1] == [1.0] * 3
    assert values[0] == [sum(s ** 2 for s in near) / len(near) for near in (range(5), range(1, 10), range(7, 12))]
    assert er.smooth([one, two], "eval_avg") == ([0, 5, 11], [[0.0, 5.0, 11.0], [2.0] * 3])


def test_report_of_several_runs(cli, tmp_path):
    """Their table: an empty log is left out, a run given twice is one, a run never evaluated has dashes, no nan."""
    names = [synthetic(tmp_path / name, points) for name, points in (
        ("a_name_of_more_than_sixteen", decay(9)), ("kl_cov-seed0", []), ("kl_cov-seed1", decay(9)),
        ("grpo-seed0", [(h, None) for h, _ in decay(9)]), ("grpo-seed1", [(h, None) for h, _ in decay(7)]))]
    status, out, errors = cli("--report " + " ".join(map(str, [*names, names[0]])), small=False)
    assert status == 0 and not errors and "nan" not in out
    header, before, *lines = out[out.rindex("se over problems"):].splitlines()
    assert [line.split()[0] for line in lines] == ["a_name_of_more_than_sixteen", "kl_cov", "grpo", "±", "picture:"]
    assert len({len(line) for line in (header, before, *lines[:4])}) == 1 and lines[2].split()[3:7] == ["-"] * 4
    for again, tables in ((names[1], 0), (names[0], 1)):      # one run, however it is spelled; of no row, no table
        status, out, _ = cli(f"--report {again} {again}/", small=False)
        assert status == 0 and out.count("se over problems") == tables


def test_a_terminal_shows_the_last_evaluation(cli, toys, monkeypatch):
    """The bar has entropy, reward, length, and avg@k as last measured."""
    shown = []
    monkeypatch.setattr(er.tqdm, "set_postfix_str", lambda self, text: shown.append(text))
    assert cli(steps=3, eval_every=2)[0] == 0
    assert ["avg@" in text for text in shown] == [True] * 4 and len({text[text.index("avg@"):] for text in shown}) <= 3
    assert all(re.match(r"entropy [\d.]+, reward [\d.]+, length [\d.]+, avg@\d [\d.]+$", text) for text in shown)


def test_compare_trains_each_run_once(cli, toys, tmp_path):
    """Every method and seed from the same start, one table with all; a second time nothing is trained again."""
    toys.setattr(er, "METHODS", ("grpo", "kl_cov", "ref_kl"))
    settings = dict(steps=2, eval_every=1, max_new_tokens=4, eval_problems=2, compare=True, seeds="0,1",
                    out=tmp_path / "all", picture=True)
    status, out, errors = cli(**settings)
    assert status == 0, errors
    named = [line.split()[0] for line in out.splitlines() if re.match(r"\w+ +[\d.]+ +[\d.]+ +[\d.]+ ", line)]
    assert named == ["before", *er.METHODS] and (tmp_path / "all" / "comparison.png").stat().st_size < 200_000
    lines = out[out.index("se over problems"):].splitlines()
    for line, spread, method in zip(lines[3::2], lines[4::2], er.METHODS):
        one, two = (rows_of(tmp_path / "all" / f"{method}-seed{seed}")[-1] for seed in (0, 1))
        keys = ("entropy", "response_length", "eval_avg", "eval_avg_se", "eval_pass", "eval_greedy")
        assert line.split()[:7] == [method, *(f"{(one[key] + two[key]) / 2:.3f}" for key in keys)]
        errors = [abs(one[key] - two[key]) / 2 for key in keys]         # of two, the standard error
        assert [float(x) for x in spread.split()[3:9]] == pytest.approx(errors, abs=6e-4) and sum(errors) > 0
    folders = " ".join(f"{tmp_path}/all/{method}-seed{seed}" for seed in (0, 1) for method in er.METHODS)
    status, reported, _ = cli(f"--report {folders}", small=False)
    assert status == 0
    first = {method: rows_of(tmp_path / "all" / f"{method}-seed0")[0] for method in er.METHODS}
    assert all(row == first["grpo"] for row in first.values())
    logs = {p: p.read_bytes() for p in (tmp_path / "all").rglob("*.jsonl")}
    assert len(logs) == 4 * len(er.METHODS)
    toys.setattr(er, "rollout_step", None)
    again, second, _ = cli(**settings)
    assert again == 0 and {p: p.read_bytes() for p in logs} == logs
    table_of = lambda text: text[text.rindex("se over problems"):text.index("picture")]
    assert table_of(out) == table_of(second) == table_of(reported)


def test_eval_only_prints_numbers_and_trains_nothing(cli, toys, runs, make, tmp_path):
    """The numbers of a run's last evaluation, from its saved policy; no folder, no update."""
    toys.setattr(er, "update", None)
    status, out, _ = cli("--eval-only", model=runs["whole"] / "policy")
    printed = json.loads(out)
    assert status == 0 and not (tmp_path / "run").exists()
    expected = {k: v for k, v in rows_of(runs["whole"])[-1].items() if k.startswith("eval_")}
    assert printed == expected | dict(data="arithmetic", eval_problems=6)


def test_check_theory_prints_second_order_errors(cli, tmp_path):
    """Halving eta quarters the error, for both rules, at every step printed."""
    status, out, errors = cli(f"--check-theory --out {tmp_path}", small=False)
    averages = [float(x) for x in re.findall(r"divides the error by ([\d.]+)", out)]
    steps = [float(line.split()[-1]) for line in out.splitlines() if re.match(r" +\d+ +[\d.]+ +-?[\d.]+e", line)]
    assert status == 0 and not errors and len(averages) == 2 and len(steps) >= 10
    assert all(abs(x - 4) <= 0.4 for x in averages + steps)
    assert (tmp_path / "theory.png").stat().st_size < 200_000


def test_what_reaches_the_terminal_is_escaped(cli, toys, tmp_path):
    """Control characters of a data set or a response cannot move the cursor; the log keeps them."""
    rows = [dict(problem=f"\x1b[31m{n}\u202e\r", answer="\x1b]0;x\x071") for n in range(20)]
    real = er.PreTrainedTokenizerFast.batch_decode
    toys.setattr(er.PreTrainedTokenizerFast, "batch_decode",
                 lambda *a, **k: [text + "\x1b[2J\x00\ud800" for text in real(*a, **k)])
    status, out, errors = cli(data=table(tmp_path, "d.jsonl", rows), steps=1)
    assert status == 0 and r"\x1b[2J\x00\ud800" in out and r"\u202e" in out
    assert all(c.isprintable() or c == "\n" for c in out + "".join(errors))
    assert er.read_log(tmp_path / "run", "samples.jsonl")[0]["response"].endswith("\x1b[2J\x00\ud800")


def test_evaluations_and_samples(runs):
    """Evaluations at step 0, every --eval-every steps and at the end, each with its samples; no draft stays."""
    rows = er.read_log(runs["whole"])
    assert [r["step"] for r in rows] == [*range(9)] and [r["step"] for r in rows if "eval_avg" in r] == [0, 4, 8]
    for sample in er.read_log(runs["whole"], "samples.jsonl"):
        assert sample.keys() == {"step", "problem", "response", "extracted", "answer", "reward"}
    assert {s["step"] for s in er.read_log(runs["whole"], "samples.jsonl")} == {0, 4, 8}
    assert not list(runs["whole"].glob("*.tmp"))


# ---------------------------------------------------------------------------------------------------------------
# The verifier: prediction, reference, verdict

ANSWERS = {
    "integers": [
        (r"42", r"42", True),
        (r"42.", r"42", True),
        (r"−17", r"-17", True),
        ("1" * 5000, "1" * 5000, True),
        (r"42", r"43", False),
        (r"-17", r"17", False),
        ("1" * 5000, "1" * 4999 + "2", False),
        (r"12345678901234567890", r"12345678901234567891", False),
        (r"2{3}", r"6", False),
        (r"2[3]", r"6", False),
    ], "spellings": [
        (r"\mathbf{\frac{5}{12}}", r"\frac{5}{12}", True),
        (r"\boldsymbol{x+\frac{1}{2}}", r"x+\frac12", True),
        (r"\varphi+\varepsilon", r"\epsilon+\phi", True),
        (r"\mathbf{\frac{5}{12}}", r"\frac{5}{13}", False),
        (r"\bigl(1,\:2\bigr)", r"(1,2)", True),
        (r"\Big[0,\quad 1\Big]", r"[0,1]", True),
        (r"\big(1,2\big)", r"(1,2)", True),
        (r"\[\textstyle\frac{x}{2}\]", r"\frac{x}{2}", True),
        (r"⟨1,2⟩", r"(1,2)", True),
        (r"⟨1,2⟩", r"(2,1)", False),
        (r"5~cm", r"5\text{ cm}", True),
        (r"x – y", r"x-y", True),
        (r"x·y²", r"xy^2", True),
        (r"x÷y", r"x/y", True),
        (r"x÷y", r"xy", False),
        (r"x <= 3", r"x \le 3", True),
        (r"x >= 3", r"x \geq 3", True),
        (r"x ⩾ 3", r"x \le 3", False),
        (r"x ⩾ 3", r"x \ge 3", True),
        (r"2√3", r"2\sqrt3", True),
        (r"\lvert x\rvert", r"|x|", True),
        (r"(0, infinity)", r"(0,\infty)", True),
        (r"0.333\dots", r"1/3", True),
        (r"5 sec", r"5\text{ seconds}", True),
        (r"5 in", r"5\text{ inches}", True),
        (r"5 ft", r"5\text{ feet}", True),
        (r"5 feet", r"5\text{ foot}", True),
        (r"5 in", r"5\text{ feet}", False),
        (r"5 sq cm", r"5\text{ square cm}", True),
        (r"5 mm", r"5\text{ mm}", True),
        (r"5 km", r"5\text{ kg}", False),
        (r"5 km", r"5\text{ km}", True),
        (r"5 kg", r"5\text{ kg}", True),
        (r"8:30 am", r"8:30\text{ am}", True),
        (r"8:30 pm", r"8:30\text{ pm}", True),
        (r"8:30 pm", r"8:30\text{ am}", False),
        (r"zero", r"0", True),
        (r"one", r"1", True),
        (r"three", r"3", True),
        (r"five", r"5", True),
        (r"six", r"6", True),
        (r"seven", r"7", True),
        (r"nine", r"9", True),
        (r"nine", r"5", False),
        (r"{x = \frac{1}{2}}", r"x=0.5", True),
        (r"{1}, {2,3}", r"1,2", False),
        (r"\Bigl(1,2\Bigr)", r"(1,2)", True),
        (r"\cfrac34", r"\frac34", True),
    ], "thousands separators": [
        (r"1,234,567", r"1234567", True),
        (r"1{,}234{,}567", r"1234567", True),
        (r"1,\!234,\!567", r"1234567", True),
        (r"1, 234, 567", r"1234567", True),
        (r"10\,080", r"10,\!080", True),
        (r"1'234'567", r"1234567", True),
        (r"\$1,234.50", r"1234.5", True),
        (r"(1,234)", r"1234", False),
        (r"200, 100", r"100, 200", True),
        (r"14{ , }916", r"14916", True),
    ], "decimals": [
        (r".5", r"0.5", True),
        (r"0.50", r"0.5", True),
        (r"0.33", r"\frac{1}{3}", False),
    ], "repeating decimals": [
        (r"0.\overline{3}", r"\frac13", True),
        (r"0.1\overline{6}", r"\frac{1}{6}", True),
        (r"0.333...", r"1/3", True),
        (r"2.1818\ldots", r"\frac{24}{11}", True),
        (r"0.\overline{3}", r"0.3", False),
        (r"0.\overline{36}", r"0.\overline{63}", False),
        (r"3.14159...", r"\pi", False),
        (r"3.14159265358979", r"\pi", False),
        (r"0.\bar{3}", r"1/3", True),
        (r"0.\dot{3}", r"1/3", True),
    ], "fractions": [
        (r"\dfrac{3}{4}", r"\frac34", True),
        (r"\frac{3}4", r"0.75", True),
        (r"\frac{-3}{4}", r"-\frac34", True),
        (r"\frac{3}{-4}", r"-3/4", True),
        (r"\frac43", r"\frac34", False),
        (r"\frac{1}{0}", r"0", False),
        (r"{3 \over 4}", r"\frac34", True),
        (r"{4 \over 3}", r"\frac34", False),
        (r"¾", r"\frac34", True),
        (r"2¾", r"\frac{11}{4}", True),
        (r"¾", r"\frac14", False),
    ], "mixed numbers": [
        (r"2\frac{1}{3}", r"\frac73", True),
        (r"2 1/3", r"\frac73", True),
        (r"2+\frac{1}{3}", r"2\frac13", True),
        (r"-2\frac{1}{2}", r"-2.5", True),
        (r"2\frac{1}{3}", r"\frac23", False),
        (r"-2\frac{1}{2}", r"-1.5", False),
        (r"2½", r"2.5", True),
        (r"1\frac{ 1 }{ 2 }", r"3/2", True),
        (r"2½", r"21/2", False),
    ], "radicals and powers": [
        (r"\frac{1}{2}(3^{2024}-1)", r"\frac{3^{2024}-1}{2}", True),
        (r"\frac{1}{2}(3^{2024}+1)", r"\frac{3^{2024}-1}{2}", False),
        (r"2\sqrt{3}", r"\sqrt{12}", True),
        (r"2*sqrt(3)", r"2\sqrt3", True),
        (r"\frac{1}{\sqrt2}", r"\frac{\sqrt{2}}{2}", True),
        (r"2^{100}-2", r"-2+2^{100}", True),
        (r"2³", r"8", True),
        (r"2\sqrt[3]{3}", r"2\sqrt3", False),
        (r"23", r"2^3", False),
        (r"2^{100}-2", r"2^{100}-3", False),
        (r"x²y⁻³", r"\frac{x^2}{y^3}", True),
        (r"x¹²", r"x^{12}", True),
        (r"x¹²", r"x^2", False),
    ], "scientific notation": [
        (r"2.5×10⁻⁴", r"2.5\times 10^{-4}", True),
        (r"2.5×10⁴", r"2.5\times 10^{-4}", False),
        (r"3 \times 10^5", r"300000", True),
        (r"3e5", r"300000", True),
        (r"1.5E-3", r"0.0015", True),
        (r"3 \times 10^5", r"30000", False),
        (r"1e999999", r"1", False),
    ], "pi, e, logarithms, trigonometry": [
        (r"\sin^{-1}(\frac13)", r"\arcsin\frac{1}{3}", True),
        (r"\tan^{-1} 2", r"\cot 2", False),
        (r"4\pi", r"4π", True),
        (r"\ln 8", r"3\ln 2", True),
        (r"\log_2 8", r"3", True),
        (r"\sin\frac{\pi}{6}", r"\frac12", True),
        (r"\sin 30^\circ", r"\frac12", True),
        (r"\sin^2 x + \cos^2 x", r"\cos^2 x+\sin^2 x", True),
        (r"4", r"4\pi", False),
        (r"\sin 30", r"\frac12", False),
        (r"\sin x", r"\cos x", False),
        (r"\cot 10^\circ", r"\cot 10", False),
        (r"\tan 20^\circ", r"\cot 70^\circ", True),
        (r"\log_{2}3", r"\log_2 3", True),
        (r"\log_{3}2", r"\log_2 3", False),
    ], "factorials, binomials, absolute values": [
        (r"\binom{6}{2}", r"15", True),
        (r"5!", r"120", True),
        (r"5!", r"121", False),
        (r"\frac{(n+1)!}{n!}", r"n+1", True),
        (r"\sec x", r"1/\cos x", True),
        (r"\csc x", r"\frac1{\cos x}", False),
        (r"|x-3|", r"|3-x|", True),
        (r"\binom{6}{2}", r"\frac62", False),
        (r"|x|", r"x", False),
        (r"\sqrt{x^2}", r"x", False),
    ], "expressions": [
        (r"\frac{\hbar^2k^2}{2m}", r"\frac{(\hbar k)^{2}}{2 m}", True),
        (r"\frac{3}{2}Nk_BT", r"\frac{3}{2} N k_{B} T", True),
        (r"f(y+x)+1", r"1+f(x+y)", True),
        (r"f(x)+f(y)", r"f(x+y)", False),
        (r"f(2x+2)", r"2f(x+1)", False),
        (r"e^tI(0)", r"I(0)e^t", True),
        (r"I(0)e^{2t}", r"I(0)e^t", False),
        (r"5 \approx 6", r"5", False),
        (r"x^2+2x+1", r"(x+1)^2", True),
        (r"f(x) = 3x-2", r"3x-2", True),
        (r"a_1+a_2", r"a_{2}+a_{1}", True),
        (r"\theta+1", r"1+θ", True),
        (r"\frac{x^2-1}{x-1}", r"x+1", True),
        (r"\sqrt{1-x^2}", r"(1-x^2)^{1/2}", True),
        (r"y^2+2y+1", r"x^2+2x+1", False),
        (r"x^2+2x-1", r"(x+1)^2", False),
        (r"5+x-x", r"5", False),
        (r"5x", r"5", False),
        (r"λ", r"\lambda", True),
        (r"Δ", r"\Delta", True),
        (r"\lg 100", r"2", True),
        (r"\mathit{x}+1", r"x+1", True),
        (r"2\sec x", r"2x", False),
        (r"n(-1)^n", r"n", False),
        (r"x(-1)^x", r"x", False),
        (r"k(-1)^k", r"-k", False),
        (r"Δ", r"δ", False),
        (r"Σ", r"σ", False),
        (r"Ω", r"\omega", False),
        (r"3!!", r"720", False),
    ], "equations and assignments": [
        (r"x = 5", r"5", True),
        (r"7 \times 6 = 42", r"42", True),
        (r"x = \frac{10}{2} = 5", r"5", True),
        (r"\log_2 32 = 5", r"5", True),
        (r"\sqrt{3^2 + 4^2} = \sqrt{25} = 5", r"5", True),
        (r"7 \times 6 = 43", r"43", False),
        (r"2 + 2 = 5 = 5", r"5", False),
        (r"2x = 5", r"5", False),
        (r"5", r"x=5", True),
        (r"2x+3", r"y=2x+3", True),
        (r"y-2x=3", r"y=2x+3", True),
        (r"2x+4y-6=0", r"x+2y=3", True),
        (r"\frac{x^2}{4}+y^2=1", r"x^2+4y^2=4", True),
        (r"\frac13 \approx 0.333", r"\frac13", True),
        (r"x=6", r"5", False),
        (r"y=5", r"x=5", False),
        (r"-50", r"4x-5y=-50", False),
        (r"x=x", r"x", False),
        (r"x+2y=4", r"x+2y=3", False),
        (r"5=6", r"5", False),
        (r"x > y = 5", r"5", False),
        (r"?=7", r"7", False),
        (r"\alpha=5", r"\beta=5", False),
        (r"x_1=5", r"x_2=5", False),
        (r"AB=5", r"CD=5", False),
        (r"f(3)=5", r"f(2)=5", False),
        (r"(a,b)=(2,3)", r"(b,a)=(2,3)", False),
        (r"x+y=7", r"x=7", False),
        (r"xy=7", r"x=7", False),
        (r"\sqrt{x}=4", r"x=4", False),
        (r"|x|=4", r"x=4", False),
        (r"x!=24", r"x=24", False),
        (r"\sin x=1", r"\cos x=1", False),
        (r"6,5", r"x=5, y=6", False),
        (r"f^{-1}(x) = \frac{x+2}{7}", r"\frac{x+2}{7}", True),
        (r"f(2)=5", r"5", True),
        (r"(6)=5", r"5", False),
        (r"f(2)=5", r"2", False),
        (r"v_{\text{max}} = 9", r"9", True),
        (r"v_{\text{max}} = 9", r"v_{\text{min}} = 9", False),
        (r"\therefore x = 9", r"9", True),
    ], "inequalities": [
        (r"s^2-8r^2 \le 0", r"s^2 \le 8r^2", True),
        (r"2 < x", r"x > 2", True),
        (r"2x \le 4", r"x \le 2", True),
        (r"-x < 2", r"x < -2", False),
        (r"5=6", r"7=9", False),
        (r"x > 2", r"[2,\infty)", False),
        (r"s^2 \ge 8r^2", r"s^2 \le 8r^2", False),
        (r"x \le 2", r"x \ge 2", False),
        (r"x \leqslant 4", r"x \le 4", True),
        (r"1<x<\sqrt{2}+1", r"1<x<\sqrt{2+1}", False),
        (r"0<X<1", r"0<x<1", False),
        (r"1<2", r"3<4", False),
    ], "tuples and points": [
        (r"\left( 1 , \frac12 \right)", r"(1,0.5)", True),
        (r"(x,y) = (1,2)", r"(1,2)", True),
        (r"P(1,2)", r"(1,2)", False),
        (r"P = (1,2)", r"(1,2)", True),
        (r"(3, \pi/2)", r"\left( 3, \frac{\pi}{2} \right)", True),
        (r"(2,1)", r"(1,2)", False),
        (r"[1,2]", r"(1,2)", False),
        (r"1,2", r"(1,2)", False),
        (r"\{1,2\}", r"(1,2)", False),
    ], "intervals and unions": [
        (r"\mathbb{R}", r"(-\infty,\infty)", True),
        (r"\text{all real numbers}", r"(-\infty,\infty)", True),
        (r"\mathbb{R}", r"(0,\infty)", False),
        (r"[0, +\infty)", r"[0,\infty)", True),
        (r"(2,3) U (0,1]", r"(0,1] \cup (2,3)", True),
        (r"(-∞,1)∪(3,∞)", r"(3,\infty)\cup(-\infty,1)", True),
        (r"(0,1)", r"[0,1)", False),
        (r"(0,1] \cap (2,3)", r"(0,1] \cup (2,3)", False),
        (r"(-\infty, 0]", r"(\infty, 0]", False),
        (r"(0,1) \bigcup (2,3)", r"(2,3) \cup (0,1)", True),
    ], "sets and lists": [
        (r"2, 1", r"1,2", True),
        (r"\{1,2\}", r"2 \text{ and } 1", True),
        (r"x=1, x=2", r"1,2", True),
        (r"1, 2, and 3", r"3,2,1", True),
        (r"\{5\}", r"5", True),
        (r"(1,2), (3,4)", r"(3,4),(1,2)", True),
        (r"1", r"1,2", False),
        (r"1,1", r"1,2", False),
        (r"(2,1), (3,4)", r"(1,2),(3,4)", False),
        (",".join(map(str, range(60))), ",".join(map(str, range(50))), False),
        (r"120,150", r"120, 150", True),
        (r"2,100", r"2, 100", True),
        (r"150,120", r"120, 150", True),
    ], "plus-minus": [
        (r"\pm 3", r"3,-3", True),
        (r"x = \pm 2", r"-2, 2", True),
        (r"\{1\pm\sqrt5,-2\}", r"-2, 1+\sqrt5, 1-\sqrt5", True),
        (r"\pm 1 \pm i", r"1+i,1-i,-1+i,-1-i", True),
        (r"3", r"\pm 3", False),
        (r"1 \pm \sqrt3", r"1 \pm \sqrt2", False),
    ], "matrices and vectors": [
        (r"\frac{1}{3}\begin{pmatrix}-1\\2\end{pmatrix}", r"\begin{pmatrix}-1/3\\2/3\end{pmatrix}", True),
        (r"-\begin{pmatrix}1&0\\0&1\end{pmatrix}", r"\begin{pmatrix}-1&0\\0&-1\end{pmatrix}", True),
        (r"\frac{1}{3}\begin{pmatrix}-1\\2\end{pmatrix}", r"\begin{pmatrix}-1\\2\end{pmatrix}", False),
        (r"-(1,2)", r"-(3,4)", False),
        (r"2\mathbf{i}-3\mathbf{j}", r"2\mathbf{i} - 3\mathbf{j}", True),
        (r"2\hat{i}-3\hat{j}", r"2\mathbf{i} - 3\mathbf{j}", True),
        (r"2\hat{i}+3\hat{j}", r"2\mathbf{i} - 3\mathbf{j}", False),
        (r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", True),
        (r"\left[\begin{array}{cc} 1 & 2 \\ 3 & 4\\ \end{array}\right]", r"\begin{matrix}1&2\\3&4\end{matrix}", True),
        (r"(1,2)", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", True),
        (r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", False),
        (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", False),
        (r"\begin{pmatrix}1&2\\3&5\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", False),
        (r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", False),
        (r"\begin{pmatrix} 1 \\[4pt] 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", True),
        (r"\left(\begin{smallmatrix} 1 \\ 2 \end{smallmatrix}\right)", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", True),
        (r"\begin{pmatrix} 1 \\[4pt] 2 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \end{pmatrix}", False),
    ], "complex numbers": [
        (r"2i+3", r"3+2i", True),
        (r"i\sqrt{2}", r"\sqrt{-2}", True),
        (r"-i", r"\frac{1}{i}", True),
        (r"3-2i", r"3+2i", False),
    ], "units": [
        (r"4.5 \times 10^{3} \text{ J}", r"4.5\cdot 10^3", True),
        (r"5 \mathrm{~kg} \mathrm{~m} \mathrm{~s}^{-2}", r"5", True),
        (r"60 \text{ miles per hour}", r"60 \text{ mph}", True),
        (r"75\text{ km/hour}", r"75\text{ kph}", True),
        (r"75\text{ mph}", r"75\text{ kph}", False),
        (r"250 \text{ g}", r"250 \text{ grams}", True),
        (r"18 \text{ or nineteen}", r"18", False),
        (r"18 \text{ nineteen}", r"18", False),
        (r"18 \text{ plus something}", r"18", False),
        (r"9 \text{ J}", r"9 \text{ W}", False),
        (r"5", r"5 \text{ cm}", True),
        (r"5 cm", r"5\text{ centimeters}", True),
        (r"5\text{ m/s}", r"5 \text{ meters per second}", True),
        (r"5\text{ m}", r"5\text{ cm}", False),
        (r"5\text{ cm}", r"5\text{ cm}^2", False),
        (r"5 not", r"5", False),
        (r"5m", r"5", False),
        (r"8:30 a.m.", r"8\!:\!30\text{ pm}", False),
        (r"5 \text{x}", r"5", False),
        (r"5\hbox{ cm}", r"5\text{ cm}", True),
        (r"\sqrt{3}\pi\text{ cm}", r"\sqrt{3\pi}\text{ cm}", False),
        (r"\sqrt{3}+6\text{ square units}", r"\sqrt{3+6}\text{ square units}", False),
        (r"2^{3}+1\text{ cm}", r"2^{3+1}\text{ cm}", False),
        (r"\frac{x}{2}y\text{ cm}", r"\frac{x}{2y}\text{ cm}", False),
        (r"2x\text{ cm}", r"2X\text{ cm}", False),
        (r"(0,5]\text{ cm}", r"0,5]\text{ cm}", False),
        (r"5 hundred", r"5", False),
        (r"5 trillion", r"5", False),
        (r"5 halves", r"5", False),
        (r"5 wrong", r"5", False),
        (r"5 factorial", r"5", False),
        (r"5 never", r"5", False),
        (r"5 repeating", r"5", False),
        (r"5 \text{ thousandths}", r"5", False),
        (r"5", r"5 dozen", False),
        (r"x\text{ cm}", r"X\text{ cm}", False),
        (r"20 \text{ square centimeters}", r"20 \text{ cm}^2", True),
        (r"20 cubic centimeters", r"20 \text{ cm}^2", False),
        (r"4 hr", r"4 \text{ hours}", True),
        (r"4 min", r"4 \text{ hours}", False),
        (r"24\text{ maybe}", r"24", False),
        (r"24\text{ is incorrect}", r"24", False),
        (r"24\text{ half}", r"24", False),
        (r"18€", r"18", True),
        (r"18€", r"18 \text{ pounds}", False),
    ], "degrees": [
        (r"5^\circ\text{C}", r"5", True),
        (r"5^\circ\text{C}", r"5^\circ\text{F}", False),
        (r"30", r"30^\circ", True),
        (r"30°", r"30^{\circ}", True),
        (r"30\text{ degrees}", r"30^\circ", True),
        (r"\frac{\pi}{6}", r"30^\circ", False),
        (r"30\text{ cm}", r"30°", False),
    ], "per cent": [
        (r"25", r"25\%", True),
        (r"25 percent", r"25\%", True),
        (r"25 percentage", r"25\%", True),
        (r"26 pct", r"25\%", False),
        (r"0.25", r"25\%", True),
        (r"25\%", r"\frac14", True),
        (r"2.5\%", r"25\%", False),
        (r"25\%", r"25\text{ cm}", False),
    ], "money": [
        (r"\$5", r"5", True),
        (r"5 dollars", r"\$5", True),
        (r"\$1{,}000", r"1000\text{ dollars}", True),
        (r"\$\frac{5}{2}", r"2.5", True),
        (r"5\text{ cents}", r"\$5", False),
        (r"€5", r"\$5", False),
        (r"\$5.01", r"\$5", False),
    ], "other bases": [
        (r"52_8", r"52", False),
        (r"52_{8}", r"52_8", True),
        (r"(52)_8", r"52_8", True),
        (r"52_{\text{eight}}", r"52_8", True),
        (r"52_{\text{base }8}", r"52_8", True),
        (r"52", r"52_8", True),
        (r"42_{10}", r"42", True),
        (r"52_9", r"52_8", False),
        ("1" * 120 + "0_2", "1" * 120 + "1_2", False),
        (r"1101_{(2)}", r"1101_2", True),
        (r"{1101}_{2}", r"1101_2", True),
        (r"{1101}_{3}", r"1101_2", False),
    ], "ratios and times": [
        (r"3\!:\!4", r"3:4", True),
        (r"5:00", r"05:00", True),
        (r"4:3", r"3:4", False),
        (r"3:4:5", r"3:4", False),
        (r"3 to 2", r"3:2", True),
        (r"4:30 \text{ p.m.}", r"4:30 PM", True),
        (r"4:30 p.m.", r"4:30 \text{ pm}", True),
        (r"5:00 am", r"5:00 pm", False),
        (r"\text{5:00 a.m.}", r"\text{5:00 p.m.}", False),
        (r"10 a.m.", r"10\text{ AM}", True),
    ], "choice letters": [
        (r"\textbf{(C)}\ 12", r"\text{(C)}", True),
        (r"\textbf{(C)}\ 12", r"\text{(B)}", False),
        (r"\textbf{(B)} or \textbf{(C)}", r"\text{(C)}", False),
        (r"(B) 12, (C) 13", r"\text{(B)}", False),
        (r"(C)^2", r"C", False),
        (r"R", r"\text{R}", True),
        (r"B", r"\text{(B)}", True),
        (r"\textbf{(B)}", r"B", True),
        (r"\text{Option B}", r"B", True),
        (r"\text{Option C}", r"B", False),
        (r"C)", r"C", True),
        (r"C", r"B", False),
        (r"B, C", r"\text{(B)}", False),
        (r"B \text{ or } C", r"B", False),
    ], "words": [
        (r"Even", r"\text{even}", True),
        (r"**even**", r"\text{even}", True),
        (r"\text{ No  Solution}", r"no solution", True),
        (r"\varnothing", r"\varnothing", True),
        (r"odd", r"\text{even}", False),
        (r"\text{not even}", r"\text{even}", False),
        (r"\text{even or odd}", r"\text{even}", False),
        (r"\text{nan}", r"5", False),
        (r"\infty", r"5", False),
        (r"Yes", r"yes", True),
        (r"\text{yes}", r"Yes", True),
        (r"no", r"No", True),
        (r"\text{odd}", r"odd", True),
        (r"\text{Tom}", r"Tom", True),
        (r"x \neq 4", r"x \ne 4", True),
        (r"x ≠ 4", r"x\neq 4", True),
        (r"\emptyset", r"\varnothing", True),
        (r"∅", r"\emptyset", True),
        (r"x\text{ divided by }y", r"xy", False),
        (r"5\text{ over }x", r"5x", False),
        (r"\text{man bites dog}", r"\text{dog bites man}", False),
        (r"p \text{ divides } q", r"q \text{ divides } p", False),
        (r"p \mid q", r"q \mid p", False),
        (r"AB \parallel CD", r"AC \parallel BD", False),
        (r"n\equiv a\pmod b", r"n\equiv b\pmod a", False),
        (r"\lfloor x\rfloor y", r"\lfloor xy\rfloor", False),
        (r"\lfloor 0.5 n \rfloor", r"\left\lfloor\frac{n}{2}\right\rfloor", True),
        (r"\lfloor n/2 \rfloor", r"\lceil n/2 \rceil", False),
        (r"\lfloor 2x\rfloor y", r"\lfloor 2xy\rfloor", False),
        (r"\lfloor n/2 \rfloor", r"\lfloor n/3 \rfloor", False),
        (r"\lceil x \rfloor", r"\lceil x \rceil", False),
        (r"[0,1\rfloor", r"[0,1)", False),
        (r"\text{neither is } 5", r"5", False),
        (r"\text{none of these is } 5", r"5", False),
        (r"\text{the opposite is } 5", r"5", False),
        (r"\text{half of it is } 5", r"5", False),
        (r"\text{wrong} = 5", r"5", False),
        (r"\text{There are } 42 \text{ ways}", r"42", True),
        (r"\text{There is no solution}", r"\text{no solution}", True),
        (r"\text{The vertex is } (2,-1)", r"(2,-1)", True),
        (r"\text{The vertex is not } (2,-1)", r"(2,-1)", False),
        (r"\text{The vertex is } (2,-1)", r"(-1,2)", False),
        (r"\text{The first is } 5", r"\text{The second is } 5", False),
        (r"\text{Bob is taller}", r"\text{Alice is taller}", False),
        (r"\text{twelve}", r"12", True),
        (r"\text{DNE}", r"DNE", True),
        (r"\text{DNE}", r"0", False),
        (r"\text{negative infinity}", r"-\infty", True),
        (r"\text{infinity}", r"-\infty", False),
        (r"1, 2, 3, \ldots", r"1, 2, 3", False),
        (r"x != 4", r"x \neq 4", True),
        (r"x != 4", r"x = 4", False),
        (r"x \not= 4", r"4", False),
        (r"x \not= 4", r"x=4", False),
        (r"x \not\in [1,2]", r"x\in [1,2]", False),
        (r"\text{not } x=5", r"5", False),
        (r"x \text{ is not } = 5", r"5", False),
    ],
}

EXTRACT = [      # text, answer
    (r"so \boxed{5}.", "5"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{1} then \boxed{2}", "2"),
    (r"\fbox{7}", "7"), (r"$\boxed 7$", "7"), (r"\boxed{\{1,2\}}", r"\{1,2\}"),
    (r"\boxed{5} and \boxed{6", "5"), (r"\boxed{}", ""), (r"\boxed { 8 }", "8"),
    (r"<think>\boxed{1}</think> \boxed{2}", "2"), (r"<think>\boxed{1}</think> none", None),
    (r"\boxed{1}<think>\boxed{2}", "1"), (r"\boxed{1}</think>", None), (r"\boxed{1}</think>\boxed{2}", "2"),
    ("#### 5\n#### 7", "7"), ("The answer is 3. No, the answer is 4.", "4"), ("The answer is 4.\n#### 5", "5"),
    ("#### 5\nThe answer is 4.", "5"), (r"\boxed{5\}}", r"5\}"), (r"\boxed{\{5}", r"\{5"),
    ("The answer is $5$, since $2+3=5$.", "$5$"), ("The answer is 5 because 2+3=5.", "5"),
    ("The answer is 5 as well as 6.", "5 as well as 6"), ("#### 18 dollars", "18 dollars"),
    ("#### 5 or 6", None), ("#### 1. First\n#### 2. Then", None),
    ("The answer is $18$, as computed.", "$18$"), ("The answer is $5, or $6.", "$5, or $6"), ("2+3=5\n#### 5", "5"),
    ("The answer is $5$ or $6$.", "$5$ or $6$"), ("The answer is $5$, $6$.", "$5$, $6$"), ("#### 1,234", "1,234"),
    ("**Final Answer**: 12", "12"), ("Answer : 7", "7"), ("The answer isn't 5", None), ("#### .5", ".5"),
    ("The answer is .5.", ".5"), ("#### Step 1\nThe answer is 7.", "7"),
    ("The answer is 3.5. I hope it is correct.", "3.5"), ("Final Answer: **12**", "12"),
    (r"The answer is $x=3$.", "$x=3$"), ("#### 5\nbut \\boxed{6}", "6"), ("no answer here", None), ("", None),
    (None, None),
]

HACKS = [      # response, gold: all refused
    (r"\boxed{}", "5"), (r"\boxed{ }", "5"), (r"\boxed{{}}", "5"), (r"\boxed{5 \text{ or } 6}", "5"),
    (r"\boxed{5, 6}", "5"), (r"\boxed{5; 6}", "5"), (r"\boxed{\{5, 6\}}", "5"), (r"\boxed{(5, 6)}", "5"),
    (r"\boxed{5 \pm 1}", "6"), (r"\boxed{5, 5}", "5"), (r"\boxed{x = 5 \text{ or } x = 6}", "5"),
    (r"\boxed{1 \text{ or } 300}", "1300"),
    (r"\boxed{5 \cup 6}", "5"), (r"\boxed{5=6}", "6"), (r"\boxed{5 \text{ (or 6)}}", "5"),
    (r"\boxed{3+4*7-2?}", "9"), (r"\boxed{3+4-2?}", "5"), (r"\boxed{3+4-2}", "5"), (r"\boxed{2*3}", "6"),
    (r"\boxed{=3+4-2}", "5"), (r"\boxed{\frac13+\frac14}", r"\frac{7}{12}"),
    (r"\boxed{\text{What is } 2+3?}", "5"), (r"\boxed{?}", "5"), (r"\boxed{x}", "5"), (r"\boxed{x=x}", "x"),
    (r"\boxed{x=x}", "5"), (r"\boxed{\text{the correct answer}}", "5"), (r"<think>\boxed{5}</think>", "5"),
    (r"<think>\boxed{5}", "5"), (r"\boxed{5}</think>", "5"), (r"\boxed{5} \boxed{6}", "5"),
    (r"\boxed{5", "5"), (r"\boxed{\text{nan}}", "nan!"), (r"\boxed{5\text{ and not }6}", "5"),
    (r"\boxed{5x-4x}", "5"), (r"\boxed{24_{10}}", "11000_2"), (r"\boxed{\mathbb{R}}", "[0,1]"),
    (r"\boxed{4x-5y=-50}", "-10"), (r"\boxed{1,2,3,4,5,6,7,8,9}", "5"), (r"\boxed{\text{(A) (B)}}", "A"),
    (r"\boxed{ABCD}", "A"), (r"\boxed{(A2}", "A"), ("\\boxed{\"\"}", "5"),
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


@pytest.mark.parametrize("category", ANSWERS)
def test_answers_match(category):
    wrong = [case for case in ANSWERS[category] if er.answers_match(case[0], case[1]) is not case[2]]
    assert not wrong
    assert {verdict for _, _, verdict in ANSWERS[category]} == {True, False}
    for _, gold, _ in ANSWERS[category]:
        assert er.answers_match(gold, gold), f"{gold} does not equal itself"


@pytest.mark.parametrize("text, answer", EXTRACT)
def test_extract_answer(text, answer):
    assert er.extract_answer(text) == answer


@pytest.mark.parametrize("response, gold", HACKS)
def test_math_reward_refuses_hacks(response, gold):
    assert er.math_reward(response, gold) == 0.0
    assert er.math_reward(f"\\boxed{{{gold}}}", gold) == 1.0


def test_math_reward_on_pairs_written_blind():
    """992 true and 1,047 false pairs by a writer who had not seen the verifier: few refused, hardly one accepted."""
    path = Path(er.__file__).with_name(".github") / "blind_pairs.jsonl"
    wrong = {True: 0, False: 0}
    for pair in map(json.loads, path.read_text("utf-8").splitlines()):
        wrong[pair["label"]] += er.math_reward(pair["text"], pair["gold"]) != pair["label"]
    assert wrong[True] <= 60 and wrong[False] <= 1


def test_math_reward_is_safe_and_fast():
    junk = random.Random(0)
    letters = "\\{}()[]^_.,;0123456789+-*/=<>|!&$% abcxyzfrsqtpi"
    hostile = HOSTILE + ["".join(junk.choices(letters, k=400)) for _ in range(200)]
    for text in hostile:
        box = f"\\boxed{{{text}}}"
        listed = (f"\\boxed{{1,{text}}}", f"{text},1")
        for response, gold in ((box, "5"), (text, text[:50]), (box, f"({text})+1"), listed):
            start = time.process_time()
            assert er.math_reward(response, gold) in (0.0, 1.0)
            assert time.process_time() - start < 0.25, f"slow on {text[:60]!r} of {len(text)} characters"


@pytest.mark.parametrize("junk", [None, 5, 0.5, b"5", [], float("nan")])
def test_answers_match_takes_anything(junk):
    assert not er.answers_match(junk, "5") and not er.answers_match("5", junk) and er.math_reward(junk, "5") == 0.0


# ---------------------------------------------------------------------------------------------------------------
# The README's measurements

@pytest.mark.skipif("ENTROPY_RL" in os.environ, reason="the benchmark measures the solution")
def test_benchmark(policy, monkeypatch, capsys, tmp_path):
    """Each command of .github/bench.py that needs no other trainer runs, in small, and tells the truth about lengths."""
    monkeypatch.syspath_prepend(Path(er.__file__).with_name(".github"))
    bench = importlib.import_module("bench")
    for name, holder in (("math_reward", er), ("sample_rollouts", er), ("autocast", torch)):
        monkeypatch.setattr(holder, name, getattr(holder, name))  # the commands replace them
    monkeypatch.setattr(er, "TRAIN_PROBLEMS", 128)
    monkeypatch.setattr(bench.Steps.__init__, "__defaults__", (str(policy),))
    monkeypatch.setattr(bench, "long_policy", lambda folder: str(policy))
    monkeypatch.setitem(bench.SHAPES, "0.5B", (16, 16, 1, 1, 1, True))
    pairs = [dict(text=f"\\boxed{{{text}}}", gold="4", label=label) for text, label in (("2^2", True), ("5", False))]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    bench.verifier(tmp_path / "pairs.jsonl")
    told = capsys.readouterr().out
    assert "this file: true ones refused: 0.00% of 1" in told and "spaces removed: true ones refused: 100.00%" in told
    assert "this file: false ones accepted: 0.00% of 1" in told
    bench.generate(rounds=6)
    told = capsys.readouterr().out
    assert "3072 lengths a side" in told and float(told.split()[-1]) < 0.04, told  # 0.05 if one side left out the stop
    bench.shape("0.5B", "--prompts", "4", "--updates", "2", "--max-new-tokens", "6", "--lr", "1e-12")
    told = capsys.readouterr().out
    assert "'tokens': 192," in told and "'approx_kl': 0.0" in told  # bf16, and the ratio is exactly 1


# ---------------------------------------------------------------------------------------------------------------
# The course kit

@pytest.mark.skipif("ENTROPY_RL" in os.environ, reason="the handout is made from the solution")
def test_handout(tmp_path):
    """The README's shell line makes a handout that imports; each exercise's tests fail on it (and pass above)."""
    source, readme = Path(er.__file__), Path(er.__file__).with_name("README.md")
    assert not readme.exists() or HANDOUT in readme.read_text()
    exercises, name = set(), None
    for line in source.read_text().splitlines():
        name = line.split("(")[0].split()[-1] if re.match(r" *def ", line) else name
        if line.strip() == "### BEGIN SOLUTION":
            exercises.add(name)
    assert len(exercises) >= 8
    handout = tmp_path / "blank_handout.py"  # a name of its own: a student's handout.py may lie in this folder
    command = f"{HANDOUT} > {shlex.quote(str(handout))}"
    subprocess.run(command, shell=True, check=True, cwd=source.parent)
    assert all(f"def {exercise}(" in handout.read_text() for exercise in exercises)
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rA", "--tb=no", "-p", "no:cacheprovider", __file__,
                           "-k", " or ".join(f"test_{e}" for e in exercises)], capture_output=True, text=True,
                          cwd=tmp_path, env=os.environ | dict(ENTROPY_RL="blank_handout", PYTHONPATH=str(tmp_path)))
    results = re.findall(r"^(PASSED|FAILED|ERROR) .*::(test_\w+)", done.stdout, re.M)
    for exercise in exercises:
        outcomes = {outcome for outcome, test in results if test.startswith(f"test_{exercise}")}
        assert outcomes == {"FAILED"}, f"{exercise}: {outcomes or 'no test'}\n{done.stdout[-2000:]}"
