"""The entropy mechanism of reinforcement learning for reasoning language models, in one file.

    python entropy_rl.py --method kl_cov          # warm up, train, evaluate, report: minutes on a laptop
    python entropy_rl.py --compare --seeds 0,1,2  # all methods on three seeds, a table and a picture
    python entropy_rl.py --report runs/grpo-seed0                  # the law and the covariance, from the log
    python entropy_rl.py --check-theory                            # Theorems 1 and 2, in seconds
    python entropy_rl.py --model Qwen/Qwen2.5-0.5B --data openai/gsm8k --max-new-tokens 512    # on a GPU

The paper is Cui et al., arXiv 2505.22617. Sec., Eq., Fig. and Table numbers are the paper's.

     1  Settings                        Config
     2  The paper's algorithm           group_advantages (Eq. 3), token_covariance (Eq. 10), select_tokens
                                        (Eq. 11, 13), token_losses (Eq. 4, 12, 14), policy_loss
     3  The law and the theorems        fit_entropy_law (Eq. 6), tabular_entropy_change (Theorems 1, 2)
     4  Rollouts and log-probabilities  sample_rollouts, response_logprobs (Eq. 5)
     5  The update                      update, token_statistics (Table 1)
     6  Training and evaluation         evaluate, train
     7  Problems and policies           load_problems, load_policy, the built-in task and its warm policy
     8  The verifier                    extract_answer, answers_match, math_reward
     9  Reports                         report, draw, compare
    10  Command line                    main

Shapes: P prompts, G responses a prompt, N = P G responses (n: some of them), L prompt and T response tokens,
V vocabulary, M the tokens under a mask. A mini-batch is one optimizer step, a micro-batch one forward pass.
Left out to keep it short: several GPUs, a sampling engine, dynamic sampling, a reward model, and the check of
Fig. 8 (.github/probe.py).
Between BEGIN SOLUTION and END SOLUTION stands what students write (README, course kit).
"""
import argparse
import ast
import cmath
import copy
import csv
import glob
import hashlib
import html
import inspect
import json
import logging
import math
import operator
import os
import random
import re
import shutil
import signal
import string
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import torch
import transformers
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer
from transformers.cache_utils import DynamicCache

try:
    import fcntl
    import resource
except ImportError:  # Windows: no lock on a run folder, no peak memory
    fcntl = resource = None

class UserError(Exception):
    """Something that the user can mend: shown as one line, exit status 2."""

def check(condition, message):
    """Stop with one line for the user unless the condition holds."""
    if not condition:
        raise UserError(message)

@contextmanager
def user_error(message):
    """Whatever a library raises inside is the user's to mend: one line, with the cause."""
    try:
        yield
    except Exception as error:
        cause = str(error.__cause__ or error).strip() or type(error).__name__
        raise UserError(f"{message} ({cause.splitlines()[0][:300]})")


# -----------------------------------------------------------------------------
# 1. Settings

# The methods, and what their losses need beside log-probabilities and advantages: a "selection" of tokens
# from the whole mini-batch, the "entropy" of each token, log-probabilities of the "reference" policy.
METHODS = {
    "grpo": [],
    "clip_higher": [],
    "clip_cov": ["selection"],
    "kl_cov": ["selection"],
    "entropy_bonus": ["entropy"],
    "ref_kl": ["reference"],
    "pg": [],  # no clipping (Fig. 8; there with --updates 1)
}
CHOICES = {
    "method": list(METHODS),
    "advantage": ["grpo", "rloo", "reinforce_pp"],
    "kl_estimator": ["abs", "k2", "k3"],
}

@dataclass
class Config:
    """Every setting of a run, and every flag: the comment is its help. The defaults are for the built-in
    task; the command line puts REAL_MODEL over them where --model is given."""

    # modes
    compare: list = None             # train these methods (default: all) side by side; a table and a picture
    seeds: str = ""                  # seeds of --compare, as in 0,1,2; each is a replicate
    report: list = None              # no training: law, covariance and picture of these run folders
    check_theory: bool = False       # no training: Theorems 1 and 2 on a tabular softmax policy
    eval_only: bool = False          # no training: evaluate --model, on what --data holds out or --eval-data
    resume: bool = False             # go on with the run in --out, if there is one; repeat all other flags

    # method
    method: str = "kl_cov"           # what the update minimises (Sec. 4)
    advantage: str = "grpo"          # advantage estimator (Eq. 3, Fig. 6)
    clip_low: float = None           # PPO clip, ratio from 1 - this (0.2; clip_cov 1; kl_cov and pg: none)
    clip_high: float = None          # ratio to 1 + this (0.2; clip_higher 0.28; clip_cov 1, as authors' code)
    clip_cov_ratio: float = 0.03     # r, share of the tokens detached (Eq. 11, Fig. 12)
    clip_cov_low: float = 1.0        # omega_low, covariance above this (Sec. 4.3: 1)
    clip_cov_high: float = 20.0      # omega_high, and below this (Sec. 4.3: 5)
    kl_cov_fraction: float = 0.02    # k, share of the tokens penalised (Eq. 13)
    kl_cov_coef: float = 2.0         # beta, weight of the penalty (Eq. 14, Fig. 12)
    kl_estimator: str = "abs"        # |d| (authors' code), d^2/2, e^d-1-d of d = log(pi/pi_old)
    entropy_coef: float = 0.1        # alpha of entropy_bonus (Sec. 4.1, Fig. 9)
    ref_kl_coef: float = 0.1         # beta of ref_kl (Sec. 4.1, Fig. 10)

    # model and data
    model: str = "tiny"              # tiny (built in), or a Hugging Face id or folder
    data: str = "arithmetic"         # arithmetic, a data set id, or a .jsonl .json .csv .parquet file
    eval_data: str = ""              # held-out problems (default: the data's test split, else a tenth of it)
    prompt_template: str = ""        # with {problem} (default: the chat template, else plain; asks for a box)
    stop: str = ""                   # also end a response after a token that contains this, as a line break

    # training
    steps: int = 200                 # rollout steps
    prompts: int = 64                # prompts a rollout step (paper: 256)
    group_size: int = 8              # G, responses a prompt (Sec. 4.3)
    updates: int = 4                 # mini-batches a rollout step (paper: 8)
    micro_batch: int = 32            # responses in one forward pass; changes memory, speed and rounding
    max_new_tokens: int = 48         # longest response in tokens
    temperature: float = 1.0         # of sampling and of the trained log-probabilities (Sec. 4.3)
    lr: float = 1e-4                 # learning rate of AdamW, constant
    seed: int = 0                    # of the warm policy, sampling, data order, picks: a replicate

    # evaluation
    eval_every: int = 5              # rollout steps between evaluations; 0: never
    eval_problems: int = 256         # held-out problems
    eval_samples: int = 8            # k of avg@k and pass@k (paper: 32)
    eval_temperature: float = 0.6    # sampling temperature of the evaluation (Sec. 4.3)

    # machine
    out: str = ""                    # run folder (default runs/METHOD-seedSEED)
    checkpoint_every: int = 1        # rollout steps between checkpoints
    device: str = "auto"             # auto (an accelerator where there is one, else cpu), or one by name
    threads: int = 0                 # CPU threads; 0: torch's default

    def __post_init__(self):
        if self.clip_low is None:
            self.clip_low = 1.0 if self.method == "clip_cov" else 0.2
        if self.clip_high is None:
            self.clip_high = {"clip_higher": 0.28, "clip_cov": 1.0}.get(self.method, 0.2)
        modes = [self.compare is not None, self.report is not None, self.check_theory, self.eval_only]
        check(sum(modes) <= 1, "--compare, --report, --check-theory, --eval-only: give one of them")
        self.out = self.out or f"runs/{self.method}-seed{self.seed}"
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            check(value in allowed, f"{flag(name)} {value}: choose from {', '.join(allowed)}")
        for name, value in vars(self).items():
            if isinstance(value, (int, float)):
                low = LOWEST.get(name, 0)
                high = HIGHEST.get(name, 1e9)
                check(low <= value <= high, f"{flag(name)} {value}: must be from {low:g} to {high:g}")
        check(self.prompts >= self.updates, f"--updates {self.updates}: more than --prompts {self.prompts}")
        check(self.clip_cov_low < self.clip_cov_high, "--clip-cov-low must be below --clip-cov-high")
        check(not self.prompt_template or "{problem}" in self.prompt_template,
              "--prompt-template must contain {problem}")
        if self.seeds:
            check(self.compare is not None, "--seeds is for --compare; one run takes --seed")
        built_in = {self.data, self.eval_data} <= {"arithmetic", "arithmetic-dev", ""}
        check(built_in or self.model != "tiny",
              "--data: the built-in policy reads arithmetic only; add --model")

# Numbers are from 0 to 1e9, but for these.
LOWEST = {
    "steps": 1, "prompts": 1, "group_size": 2, "updates": 1, "micro_batch": 1, "max_new_tokens": 1,
    "eval_problems": 1, "eval_samples": 1, "checkpoint_every": 1,
    "temperature": 1e-3, "eval_temperature": 1e-3, "lr": 1e-12, "clip_cov_low": -1e9,
}
HIGHEST = {"clip_cov_ratio": 1, "kl_cov_fraction": 1, "eval_problems": 20_000, "threads": 1024}

# What differs for a real model: the paper's coefficients (Sec. 4.1, 4.3), sizes for one GPU.
REAL_MODEL = {
    "updates": 8,
    "micro_batch": 8,
    "max_new_tokens": 1024,
    "lr": 1e-6,               # the authors' for 32B; 5e-7 for 7B
    "clip_cov_ratio": 2e-4,
    "clip_cov_high": 5.0,
    "kl_cov_fraction": 2e-3,  # for 7B; 2e-4 for 32B
    "kl_cov_coef": 1.0,
    "entropy_coef": 5e-3,
    "ref_kl_coef": 1e-2,
    "eval_every": 20,
    "eval_problems": 200,
    "eval_samples": 4,
    "checkpoint_every": 20,
}

def flag(name):
    """The spelling of a setting on the command line."""
    return "--" + name.replace("_", "-")

def progress(steps, name):
    """A bar on a terminal for a part of a step, if it takes longer than two seconds."""
    return tqdm(steps, name, leave=False, delay=2, disable=None)

def seeded(device, *key):
    """A generator for a key such as (seed, step, "rollout"), so that a resumed run needs no random state."""
    digest = hashlib.sha256(repr(key).encode()).hexdigest()
    return torch.Generator(device).manual_seed(int(digest[:14], 16))  # 56 bits, which every device takes


# -----------------------------------------------------------------------------
# 2. The paper's algorithm (Sec. 2.1 and 4.2)

def group_advantages(rewards, group_size, estimator="grpo"):
    """Eq. 3: A = (r - mean of the group) / std of the group. rewards [N], grouped by prompt -> [N].

    grpo: Eq. 3 with the unbiased std + 1e-6, as in the authors' code. rloo: r minus the mean of the other
    responses. reinforce_pp: (r - mean) / std over the whole batch, in training without the groups that are
    all right or all wrong (verl averages over tokens, so that a long response weighs more).
    """
    ### BEGIN SOLUTION
    if estimator == "reinforce_pp":
        return (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    groups = rewards.view(-1, group_size)                           # [P, G]
    centred = groups - groups.mean(dim=1, keepdim=True)             # [P, G]
    if estimator == "rloo":  # r - (sum - r) / (G - 1) = (r - mean) G / (G - 1)
        advantages = centred * group_size / (group_size - 1)        # [P, G]
    else:
        advantages = centred / (groups.std(dim=1, keepdim=True) + 1e-6)
    return advantages.flatten()                                     # [N]
    ### END SOLUTION

def token_covariance(logprobs, advantages, mask):
    """Eq. 10: Cov(y_t) = (log pi(y_t) - mean log pi) * (A(y_t) - mean A), both means over the mask's tokens.

    logprobs [N, T], advantages [N], mask [N, T] -> [N, T], 0 off the mask, without gradient. The tokens are
    those of a mini-batch, as in the paper (in the authors' code those of a micro-batch on one GPU).
    """
    ### BEGIN SOLUTION
    mask = mask.bool()
    logprobs = logprobs.detach()
    advantages = advantages[:, None].expand_as(logprobs)            # [N, T]
    covariance = (logprobs - logprobs[mask].mean()) * (advantages - advantages[mask].mean())
    return covariance.masked_fill(~mask, 0.0)                       # [N, T]
    ### END SOLUTION

def clip_ratio(config, ratio):
    """clip(rho, 1 - eps_low, 1 + eps_high) of Eq. 4; none for pg (Fig. 8) and KL-Cov (the authors' code)."""
    if config.method in ("pg", "kl_cov"):
        return ratio
    return ratio.clamp(1 - config.clip_low, 1 + config.clip_high)

def stopped_by_clip(config, ratio, advantages):
    """The tokens whose minimum in Eq. 4 is the clipped term, a constant: they have no gradient. Bool."""
    return clip_ratio(config, ratio) * advantages < ratio * advantages

def select_clip_cov(config, logprobs, old_logprobs, advantages, mask, generator=None):
    """Eq. 11: floor(r M) tokens at random among those with omega_low < Cov < omega_high. [N, T] bool.

    As in the authors' code, the window is open (the paper's is closed), a token that the PPO clip has already
    stopped cannot be picked, and a positive r picks at least one token if any qualifies.
    """
    ### BEGIN SOLUTION
    covariance = token_covariance(logprobs, advantages, mask)       # [N, T]
    ratio = (logprobs.detach() - old_logprobs).exp()                # [N, T]
    inside = (covariance > config.clip_cov_low) & (covariance < config.clip_cov_high)
    candidates = inside & mask & ~stopped_by_clip(config, ratio, advantages[:, None])
    places = candidates.flatten().nonzero()[:, 0]                   # where they stand among the N * T
    order = torch.randperm(len(places), generator=generator, device=places.device)
    count = max(1, int(config.clip_cov_ratio * int(mask.sum())))
    selected = torch.zeros_like(mask).flatten()
    selected[places[order[:count]]] = True
    return selected.view_as(mask)
    ### END SOLUTION

def select_kl_cov(config, logprobs, advantages, mask):
    """Eq. 13: the floor(k M) tokens of the highest covariance, at least one. [N, T] bool."""
    ### BEGIN SOLUTION
    covariance = token_covariance(logprobs, advantages, mask).masked_fill(~mask, -math.inf)
    count = max(1, int(config.kl_cov_fraction * int(mask.sum())))
    selected = torch.zeros_like(mask).flatten()
    selected[covariance.flatten().topk(count).indices] = True
    return selected.view_as(mask)
    ### END SOLUTION

def select_tokens(config, logprobs, old_logprobs, advantages, mask, generator=None, entropy=None):
    """The tokens that Clip-Cov detaches (Eq. 11) or KL-Cov penalises (Eq. 13), from a whole mini-batch.

    logprobs, old_logprobs, mask [N, T], advantages [N] -> [N, T] bool, all False for the other methods and
    for a share of 0. `entropy` [N, T], of the policy that sampled, is there for selections of your own.
    """
    mask = mask.bool()
    if config.method == "clip_cov" and config.clip_cov_ratio > 0:
        return select_clip_cov(config, logprobs, old_logprobs, advantages, mask, generator)
    if config.method == "kl_cov" and config.kl_cov_fraction > 0:
        return select_kl_cov(config, logprobs, advantages, mask)
    return torch.zeros_like(mask)

def kl_penalty(config, log_ratio):
    """The penalty of Eq. 14 on each token, from d = log pi - log pi_old. k2 and k3 estimate KL(pi_old || pi);
    the authors' |d| does not: its gradient is +-1 however small d is."""
    if config.kl_estimator == "abs":  # the authors' code
        return log_ratio.abs()
    if config.kl_estimator == "k2":
        return log_ratio ** 2 / 2
    return log_ratio.exp() - 1 - log_ratio  # k3

def token_losses(config, logprobs, old_logprobs, advantages, selected, entropy=None, ref_logprobs=None):
    """The loss of each token: Eq. 4 (PPO), Eq. 12 (Clip-Cov), Eq. 14 (KL-Cov), and the baselines of Sec. 4.1.

    logprobs, old_logprobs, selected, entropy, ref_logprobs [N, T], advantages [N] -> [N, T].
    """
    ### BEGIN SOLUTION
    log_ratio = logprobs - old_logprobs.detach()                    # [N, T]
    ratio = log_ratio.exp()                                         # rho = pi / pi_old
    advantages = advantages[:, None]                                # [N, 1]
    loss = -torch.minimum(ratio * advantages, clip_ratio(config, ratio) * advantages)  # Eq. 4

    if config.method == "clip_cov":  # Eq. 12: no gradient; their loss is 0, but they count in the mean
        return torch.where(selected, 0.0, loss)
    if config.method == "kl_cov":  # Eq. 14
        penalty = config.kl_cov_coef * kl_penalty(config, log_ratio)
        return loss + torch.where(selected, penalty, 0.0)
    if config.method == "entropy_bonus":
        return loss - config.entropy_coef * entropy
    if config.method == "ref_kl":  # KL(pi || pi_ref), the k3 estimator
        to_reference = ref_logprobs - logprobs
        return loss + config.ref_kl_coef * (to_reference.exp() - 1 - to_reference)
    return loss  # grpo; clip_higher, which differs in config.clip_high; pg, which is not clipped
    ### END SOLUTION

def policy_loss(config, logprobs, old_logprobs, advantages, mask, generator=None, *, entropy=None,
                ref_logprobs=None):
    """What one optimizer step minimises: the mean of the token losses over the mask. Scalar.

    Arguments as of `select_tokens` and `token_losses`, for a whole mini-batch. Training does not call it:
    `update` computes the same in micro-batches (and gives `select_tokens` the entropy at sampling).
    """
    ### BEGIN SOLUTION
    selected = select_tokens(config, logprobs, old_logprobs, advantages, mask, generator, entropy)
    losses = token_losses(config, logprobs, old_logprobs, advantages, selected, entropy, ref_logprobs)
    return losses[mask.bool()].mean()
    ### END SOLUTION


# -----------------------------------------------------------------------------
# 3. The law (Sec. 2.4) and the theorems (Sec. 3)

@dataclass
class EntropyLaw:
    """Eq. 6, R = -a exp(H) + b, with fitted a and b, and how well it fits: R² and RMSE."""

    a: float
    b: float
    r2: float
    rmse: float

    @property
    def ceiling(self):
        """The accuracy when all entropy is spent, H = 0."""
        return self.b - self.a

    def predict(self, entropy):
        """R at each entropy."""
        return -self.a * torch.as_tensor(entropy, dtype=torch.float64).exp() + self.b

def fit_entropy_law(entropy, accuracy):
    """Eq. 6, R = -a exp(H) + b, by least squares: a straight line in x = exp(H). Two lists -> EntropyLaw."""
    ### BEGIN SOLUTION
    x = torch.as_tensor(entropy, dtype=torch.float64).exp()
    y = torch.as_tensor(accuracy, dtype=torch.float64)
    check(len(x) > 0 and x.max() > x.min(), "the law needs points of at least two different entropies")
    dx = x - x.mean()
    dy = y - y.mean()
    slope = (dx * dy).sum() / (dx ** 2).sum()
    squared_error = ((dy - slope * dx) ** 2).sum()
    r2 = 1 - squared_error / (dy ** 2).sum()
    rmse = (squared_error / len(y)).sqrt()
    return EntropyLaw(-slope.item(), (y.mean() - slope * x.mean()).item(), r2.item(), rmse.item())
    ### END SOLUTION

def entropy_of(logprobs):
    """Eq. 5: H = -sum pi log pi over the last dimension, in nats; 0 log 0 is 0."""
    logprobs = logprobs.clamp(min=torch.finfo(logprobs.dtype).min)
    return -(logprobs.exp() * logprobs).sum(-1)

def tabular_step(logits, rewards, lr, rule):
    """How one exact policy-gradient step changes the logits (App. E): eta pi A ("pg") or eta A ("npg")."""
    policy = logits.softmax(-1)
    advantage = rewards - (policy * rewards).sum(-1, keepdim=True)
    if rule == "pg":
        return lr * policy * advantage
    return lr * advantage

def tabular_entropy_change(logits, rewards, lr, rule):
    """Theorems 1 and 2: the change of entropy in one exact step, measured and predicted to first order.

    Theorem 1, vanilla policy gradient ("pg"): dH = -eta Cov(log pi, pi A). Theorem 2, natural policy gradient
    ("npg"): dH = -eta Cov(log pi, A). Both are Lemma 1: dH = -Cov(log pi, change of the logits).
    logits, rewards [..., V] -> (actual, predicted), [...] each.
    """
    ### BEGIN SOLUTION
    step = tabular_step(logits, rewards, lr, rule)                  # [..., V]
    logprobs = logits.log_softmax(-1)
    actual = entropy_of((logits + step).log_softmax(-1)) - entropy_of(logprobs)
    policy = logprobs.exp()
    mean_logprob = (policy * logprobs).sum(-1, keepdim=True)
    mean_step = (policy * step).sum(-1, keepdim=True)
    predicted = -(policy * (logprobs - mean_logprob) * (step - mean_step)).sum(-1)
    return actual, predicted
    ### END SOLUTION

def check_theory():
    """Theorems 1 and 2 along exact updates. They are first order: half of eta, a quarter of the error."""
    for rule, lr, name in [("pg", 0.2, "Theorem 1, vanilla policy gradient: dH = -eta Cov(log pi, pi A)"),
                           ("npg", 0.02, "Theorem 2, natural policy gradient: dH = -eta Cov(log pi, A)")]:
        print(f"\n{name}; 16 states, 10 actions, eta {lr}")
        print("  update   entropy   measured dH  predicted dH  error(eta) / error(eta/2), 4 expected")
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(16, 10, generator=generator, dtype=torch.float64)
        rewards = torch.rand(16, 10, generator=generator, dtype=torch.float64)
        for number in range(2000):
            if number in (0, 1, 10, 50, 100, 200, 500, 1000, 1999):
                actual, predicted = tabular_entropy_change(logits, rewards, lr, rule)
                half_actual, half_predicted = tabular_entropy_change(logits, rewards, lr / 2, rule)
                ratio = (actual - predicted).norm() / (half_actual - half_predicted).norm()
                print(f"{number:8d} {entropy_of(logits.log_softmax(-1)).mean():9.4f} {actual.mean():13.3e} "
                      f"{predicted.mean():13.3e} {ratio:12.3f}")
            logits = logits + tabular_step(logits, rewards, lr, rule)


# -----------------------------------------------------------------------------
# 4. Rollouts and log-probabilities (Sec. 2.1)

LOGITS_AT_ONCE = 2 ** 24  # floats in a chunk of logits: 64 MB (malloc keeps freed blocks of less than 32 MB)

@dataclass
class Rollouts:
    """N = P G responses, grouped by prompt; prompts are padded on the left, responses on the right."""

    input_ids: torch.Tensor       # [N, L+T]
    attention_mask: torch.Tensor  # [N, L+T]
    response_mask: torch.Tensor   # [N, T], true up to and including the stop token
    logprobs: torch.Tensor        # [N, T], of the sampled tokens as sampled
    entropy: torch.Tensor         # [N, T], Eq. 5, at temperature 1

def mixed_precision(device):
    """bf16 products over fp32 weights on a CUDA GPU, fp32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

def next_token_logits(model, input_ids, attention_mask, position_ids, cache):
    """Logits of the next token of each row, [n, V]; the row's keys and values go into the cache."""
    kwargs = {}
    if "position_ids" in inspect.signature(model.base_model.forward).parameters:
        kwargs["position_ids"] = position_ids  # some models count from the mask instead
    with mixed_precision(model.device):
        hidden = model.base_model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache,
                                  use_cache=True, **kwargs).last_hidden_state
        return model.get_output_embeddings()(hidden[:, -1]).float()

@torch.no_grad()
def sample_rollouts(model, prompts, *, group_size, max_new_tokens, temperature, eos_token_ids, pad_token_id,
                    greedy=False, generator=None):
    """Sample `group_size` responses to each of P prompts (lists of token ids) with a key-value cache."""
    device = model.device
    stop_ids = torch.tensor(eos_token_ids, device=device)
    prompts = [torch.tensor(ids, device=device) for ids in prompts]
    prompt_ids = pad_sequence(prompts, True, pad_token_id, "left")                    # [P, L]
    prompt_mask = pad_sequence([torch.ones_like(ids) for ids in prompts], True, 0, "left")      # [P, L]
    N = len(prompts) * group_size
    L = prompt_ids.shape[1]
    on_the_right = (0, max_new_tokens)  # room for the responses
    input_ids = pad(prompt_ids.repeat_interleave(group_size, dim=0), on_the_right, value=pad_token_id)
    attention_mask = pad(prompt_mask.repeat_interleave(group_size, dim=0), on_the_right)  # both [N, L+T]
    logprobs = torch.zeros(N, max_new_tokens, device=device)                          # [N, T]
    entropy = torch.zeros(N, max_new_tokens, device=device)                           # [N, T]

    # Read each prompt once, then repeat its cache for the responses of its group.
    cache = DynamicCache(config=model.config)
    positions = (prompt_mask.cumsum(1) - 1).clamp(min=0)                              # [P, L]
    logits = next_token_logits(model, prompt_ids, prompt_mask, positions, cache)      # [P, V]
    cache.batch_repeat_interleave(group_size)
    logits = logits.repeat_interleave(group_size, dim=0)                              # [N, V]

    rows = torch.arange(N, device=device)  # the n responses that are not over yet
    for t in progress(range(max_new_tokens), "sampling"):
        log_policy = (logits / temperature).log_softmax(-1)                           # [n, V]
        check(not log_policy.isnan().any(), "the policy's logits are not numbers: is --lr too high?")
        if greedy:
            token = logits.argmax(-1)                                                 # [n]
        else:
            token = torch.multinomial(log_policy.exp(), 1, generator=generator)[:, 0]
        place = L + t
        input_ids[rows, place] = token
        attention_mask[rows, place] = 1
        logprobs[rows, t] = log_policy.gather(1, token[:, None])[:, 0]
        entropy[rows, t] = entropy_of(logits.log_softmax(-1))
        stay = (~torch.isin(token, stop_ids)).nonzero()[:, 0]  # which of the n rows go on
        if len(stay) == 0 or t == max_new_tokens - 1:
            break
        if len(stay) < len(rows):  # the others leave the batch and the cache
            cache.batch_select_indices(stay)
            rows = rows[stay]
        mask = attention_mask[rows, :place + 1]                                       # [n, L+t+1]
        positions = mask.sum(dim=1, keepdim=True) - 1                                 # [n, 1]
        token = input_ids[rows, place]                                                # [n]
        logits = next_token_logits(model, token[:, None], mask, positions, cache)     # [n, V]

    T = t + 1  # of the longest response
    return Rollouts(input_ids[:, :L + T], attention_mask[:, :L + T], attention_mask[:, L:L + T].bool(),
                    logprobs[:, :T], entropy[:, :T])

def token_logprobs(hidden, targets, head, temperature, with_entropy=True):
    """log pi of each target, and the entropy there, both of softmax(logits / temperature) (Eq. 5: at 1).

    hidden [M, d], targets [M], `head` makes logits of hidden states -> [M] and [M] (None without entropy).
    """
    ### BEGIN SOLUTION
    logits = head(hidden).float() / temperature                     # [M, V]
    logprobs = logits.log_softmax(-1)                               # [M, V]
    chosen = logprobs.gather(1, targets[:, None])[:, 0]             # [M]
    if not with_entropy:
        return chosen, None
    return chosen, entropy_of(logprobs)
    ### END SOLUTION

def response_logprobs(model, input_ids, attention_mask, response_length, *, temperature=1.0,
                      with_entropy=True):
    """log pi(y_t | x, y_<t) of the response tokens and the entropy there: [N, T] each, with gradient.

    The responses are the last `response_length` columns; off the mask the results are 0. Both are of
    softmax(logits / temperature) (Eq. 5: at 1). Logits exist for a few tokens at a time and are computed
    again in the backward pass: at a vocabulary of 151,936 they would be most of the memory.
    """
    T = response_length
    # With the padding at each row's right end, where a causal model cannot see it, the model sees each row as
    # it would alone: no mask and no positions are needed.
    order = attention_mask.argsort(dim=1, descending=True, stable=True)               # [N, L+T]
    longest = int(attention_mask.sum(1).max())
    right_padded = input_ids.gather(1, order)[:, :longest]                            # [N, S]
    response_mask = attention_mask[:, -T:].bool()                                     # [N, T]
    prompt_length = attention_mask[:, :-T].sum(1)                                     # [N]
    row, t = response_mask.nonzero(as_tuple=True)                                     # [M] each
    targets = input_ids[:, -T:][response_mask]                                        # [M]

    logprobs = []
    entropy = []
    with mixed_precision(model.device):
        hidden = model.base_model(input_ids=right_padded, use_cache=False).last_hidden_state     # [N, S, d]
        hidden = hidden[row, prompt_length[row] + t - 1]  # logits stand one place before their token: [M, d]
        head = model.get_output_embeddings()
        size = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
        for part, targets_part in zip(hidden.split(size), targets.split(size)):
            chosen, part_entropy = checkpoint(token_logprobs, part, targets_part, head, temperature,
                                              with_entropy, use_reentrant=False)
            logprobs.append(chosen)
            entropy.append(part_entropy)
    empty = torch.zeros(response_mask.shape, device=model.device)
    logprobs = empty.masked_scatter(response_mask, torch.cat(logprobs))
    if with_entropy:
        return logprobs, empty.masked_scatter(response_mask, torch.cat(entropy))
    return logprobs, None


# -----------------------------------------------------------------------------
# 5. The update (Sec. 4.3) and what it looked like

COV_TOP = [0.02, 0.2, 2, 20, 50]  # per cent of the tokens, Table 1
QUADRANTS = ["A+ p+", "A+ p-", "A- p+", "A- p-"]  # see token_statistics
UPDATE_KEYS = ["updates", "skipped_updates", "loss", "grad_norm", "clip_fraction", "approx_kl", "cov_mean",
               "cov_top_0.02", "cov_top_0.2", "cov_top_2", "cov_top_20", "cov_top_50", "selected_tokens",
               "selected_fraction", "quadrant_tokens", "quadrant_cov", "quadrant_selected", "most_selected"]

def mean(values):
    """The mean of a list of numbers."""
    return sum(values) / len(values)

def mini_batches(config, rollouts, rewards, step):
    """The rows of each mini-batch (whole groups, drawn at random) and the advantages [N].

    Prompts whose responses are all right or all wrong are left out (Sec. 4.3). Within a mini-batch rows of
    like length stand together, so that a micro-batch holds little padding. Step 0 has none: it only looks.
    """
    G = config.group_size
    kept = (rewards.view(-1, G).std(dim=1) > 0).nonzero()[:, 0]                       # [P'] groups
    if step == 0 or len(kept) == 0:
        return [], None
    members = kept[:, None] * G + torch.arange(G)                                     # [P', G] rows
    advantages = torch.zeros(len(rewards))
    advantages[members.flatten()] = group_advantages(rewards[members.flatten()], G, config.advantage)
    lengths = rollouts.attention_mask.sum(1)                                          # [N]
    order = torch.randperm(len(kept), generator=seeded("cpu", config.seed, step, "mini-batches"))
    batches = []
    for groups in order.tensor_split(min(config.updates, len(kept))):
        rows = members[groups].flatten().to(lengths.device)
        batches.append(rows[lengths[rows].argsort(stable=True)])
    return batches, advantages.to(lengths.device)

def forward(config, model, rollouts, rows, with_entropy=False):
    """Log-probabilities and entropy of some rows of the rollouts: [n, T] each."""
    return response_logprobs(model, rollouts.input_ids[rows], rollouts.attention_mask[rows],
                             rollouts.response_mask.shape[1], temperature=config.temperature,
                             with_entropy=with_entropy)

@torch.no_grad()
def forward_no_grad(config, model, rollouts, rows):
    """Log-probabilities of some rows [n, T], without gradient, in the micro-batches of the update: equal
    weights give equal bits, so that before the first step every ratio is exactly 1."""
    parts = rows.split(config.micro_batch)
    return torch.cat([forward(config, model, rollouts, part)[0] for part in parts])

def backward_mini_batch(config, policy, reference, rollouts, batch, old, new, advantages, selected):
    """Loss and gradient of a mini-batch, added up over micro-batches; its log pi is kept in `new`."""
    needs = METHODS[config.method]
    mask = rollouts.response_mask
    tokens = mask[batch].sum()
    total = 0.0
    for rows in batch.split(config.micro_batch):
        ref_logprobs = None
        if "reference" in needs:
            ref_logprobs = forward_no_grad(config, reference, rollouts, rows)
        logprobs, entropy = forward(config, policy.model, rollouts, rows, "entropy" in needs)
        losses = token_losses(config, logprobs, old[rows], advantages[rows], selected[rows], entropy,
                              ref_logprobs)
        loss = losses[mask[rows]].sum() / tokens
        loss.backward()
        total += loss.item()
        new[rows] = logprobs.detach()
    return total

def update(config, policy, reference, optimizer, rollouts, rewards, step):
    """The optimizer steps of one rollout (Sec. 4.3), one a mini-batch; returns what they looked like.

    First log pi_old of every mini-batch. Then for each mini-batch, where a method selects, a pass without
    gradient to select tokens from all of it, and then loss and gradient, added up over micro-batches. So the
    size of a micro-batch changes rounding alone.
    """
    model = policy.model
    mask = rollouts.response_mask
    batches, advantages = mini_batches(config, rollouts, rewards, step)
    row = dict.fromkeys(UPDATE_KEYS)
    row.update(updates=len(batches), skipped_updates=0, selected_tokens=0)
    if not batches:
        return row
    old = torch.zeros_like(rollouts.logprobs)                                         # [N, T], log pi_old
    for batch in batches:
        old[batch] = forward_no_grad(config, model, rollouts, batch)
    new = old.clone()                                                                 # [N, T], log pi
    selected = torch.zeros_like(mask)                                                 # [N, T]
    losses = []
    grad_norms = []
    for number, batch in enumerate(progress(batches, "updates")):
        if number > 0 and "selection" in METHODS[config.method]:  # before the first step log pi is log pi_old
            new[batch] = forward_no_grad(config, model, rollouts, batch)
        generator = seeded(model.device, config.seed, step, number, "selection")
        selected[batch] = select_tokens(config, new[batch], old[batch], advantages[batch], mask[batch],
                                        generator, rollouts.entropy[batch])
        loss = backward_mini_batch(config, policy, reference, rollouts, batch, old, new, advantages, selected)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()  # 1.0: the authors' code
        if math.isfinite(loss) and math.isfinite(grad_norm):
            optimizer.step()
        else:  # it must not reach the weights
            row["skipped_updates"] += 1
        optimizer.zero_grad()
        losses.append(loss)
        grad_norms.append(grad_norm)

    rows = torch.cat(batches)
    row.update(loss=mean(losses), grad_norm=mean(grad_norms))
    row.update(token_statistics(config, new[rows], old[rows], advantages[rows], mask[rows], selected[rows]))
    picked = rollouts.input_ids[rows, -mask.shape[1]:][selected[rows]].tolist()
    row["most_selected"] = dict(Counter(policy.tokenizer.convert_ids_to_tokens(picked)).most_common(20))
    return row

def token_statistics(config, logprobs, old_logprobs, advantages, mask, selected):
    """What the tokens of a rollout's updates looked like, all mini-batches together: Table 1's covariances,
    clipping, KL, and who was selected.

    Quadrants, in the order of QUADRANTS: tokens with advantage A and log-probability p above (+) or below (-)
    the mean. Of each its share of the tokens, its part of the mean Cov (the four add up to it), and how many
    were selected.
    """
    covariance = token_covariance(logprobs, advantages, mask)[mask]                   # [M]
    advantage = advantages[:, None].expand_as(logprobs)[mask]                         # [M]
    log_ratio = (logprobs - old_logprobs)[mask]                                       # [M]
    ratio = log_ratio.exp()
    row = {
        "clip_fraction": stopped_by_clip(config, ratio, advantage).float().mean().item(),
        "approx_kl": (ratio - 1 - log_ratio).mean().item(),  # KL(pi_old || pi), k3
        "cov_mean": covariance.mean().item(),
        "selected_tokens": int(selected.sum()),
        "selected_fraction": selected[mask].float().mean().item(),
    }
    ranked = covariance.sort(descending=True).values
    for percent in COV_TOP:
        count = max(1, int(len(ranked) * percent / 100))
        row[f"cov_top_{percent:g}"] = ranked[:count].mean().item()

    good = advantage > advantage.mean()                                               # A+
    likely = logprobs[mask] > logprobs[mask].mean()                                   # p+
    quadrants = [good & likely, good & ~likely, ~good & likely, ~good & ~likely]
    row["quadrant_tokens"] = [q.float().mean().item() for q in quadrants]
    row["quadrant_cov"] = [(covariance * q).mean().item() for q in quadrants]
    row["quadrant_selected"] = [int((selected[mask] & q).sum()) for q in quadrants]
    return row


# -----------------------------------------------------------------------------
# 6. Training and evaluation

def pass_at_k(n, c, k):
    """The chance that of k responses, drawn from n of which c are right, at least one is right:
    1 - C(n - c, k) / C(n, k)."""
    ### BEGIN SOLUTION
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)
    ### END SOLUTION

def sample_and_reward(config, policy, problems, group_size, temperature, generator=None, greedy=False):
    """Responses to problems: the rollouts, their rewards [N], and each response as in samples.jsonl."""
    rollouts = sample_rollouts(
        policy.model, [p["prompt_ids"] for p in problems], group_size=group_size,
        max_new_tokens=config.max_new_tokens, temperature=temperature, eos_token_ids=policy.stop_ids,
        pad_token_id=policy.end_ids[0], greedy=greedy, generator=generator)
    T = rollouts.response_mask.shape[1]
    samples = []
    for number, (ids, mask) in enumerate(zip(rollouts.input_ids[:, -T:], rollouts.response_mask)):
        problem = problems[number // group_size]
        thought = "<think>" if problem["in_thought"] else ""
        text = thought + policy.response_text(ids[mask].tolist())
        samples.append({"problem": problem["problem"], "response": text, "extracted": extract_answer(text),
                        "answer": problem["answer"], "reward": math_reward(text, problem["answer"])})
    return rollouts, torch.tensor([sample["reward"] for sample in samples]), samples

def evaluate(config, policy, problems):
    """avg@k with its standard error over problems, pass@k and greedy accuracy; and a few responses to read.

    Every evaluation of a run starts from the same seed.
    """
    k = config.eval_samples
    generator = seeded(policy.model.device, config.seed, "evaluation")
    right = []  # of each problem's k responses
    greedy = []
    samples = []
    size = max(1, config.prompts * config.group_size // k)  # at once, so that memory is as in training
    for start in progress(range(0, len(problems), size), "evaluation"):
        batch = problems[start:start + size]
        _, rewards, found = sample_and_reward(config, policy, batch, k, config.eval_temperature, generator)
        right += rewards.view(-1, k).sum(dim=1).int().tolist()
        samples += found[::k]
        _, rewards, _ = sample_and_reward(config, policy, batch, 1, 1.0, greedy=True)
        greedy += rewards.tolist()
    accuracy = torch.tensor(right, dtype=torch.float64) / k
    error = accuracy.std().item() / math.sqrt(len(accuracy)) if len(accuracy) > 1 else 0.0
    pass_at = {}
    for power in range(k.bit_length()):
        pass_at[2 ** power] = mean([pass_at_k(k, c, 2 ** power) for c in right])
    row = {"eval_avg": accuracy.mean().item(), "eval_avg_se": error, "eval_greedy": mean(greedy), "eval_k": k,
           "eval_pass": mean([pass_at_k(k, c, k) for c in right]), "eval_pass_at": pass_at}
    return row, samples[:8]

def evaluate_and_log(config, policy, problems, log, step):
    """The evaluation of a step, with its responses added to a log."""
    row, samples = evaluate(config, policy, problems)
    for sample in samples:
        append(log, {"step": step, **sample})
    return row

def step_problems(config, problems, step):
    """The problems of a rollout step, from 1: each at most once an epoch, in an order that the seed draws."""
    epoch, place = divmod(step - 1, len(problems) // config.prompts)
    order = torch.randperm(len(problems), generator=seeded("cpu", config.seed, epoch, "data")).tolist()
    start = place * config.prompts
    return [problems[i] for i in order[start:start + config.prompts]]

def rollout_step(config, policy, reference, optimizer, problems, step):
    """Sample, reward, update: one row of metrics.jsonl. Step 0 only looks, at the problems of step 1."""
    started = time.perf_counter()
    device = policy.model.device
    batch = step_problems(config, problems, max(step, 1))
    rollouts, rewards, _ = sample_and_reward(config, policy, batch, config.group_size, config.temperature,
                                             seeded(device, config.seed, step, "rollout"))
    sampling_seconds = time.perf_counter() - started
    mask = rollouts.response_mask
    lengths = mask.sum(dim=1)                                                         # [N]
    responses = rollouts.input_ids[:, -mask.shape[1]:]                                # [N, T]
    stops = torch.isin(responses, torch.tensor(policy.stop_ids, device=device)) & mask
    row = {
        "step": step,
        "reward": rewards.mean().item(),
        "entropy": ((rollouts.entropy * mask).sum(dim=1) / lengths).mean().item(),  # Eq. 5
        "response_length": lengths.float().mean().item(),
        "truncated": 1 - stops.any(dim=1).float().mean().item(),
        "zero_std_groups": int((rewards.view(-1, config.group_size).std(dim=1) == 0).sum()),
        "tokens": int(lengths.sum()),
    }
    row.update(update(config, policy, reference, optimizer, rollouts, rewards, step))
    seconds = time.perf_counter() - started
    row.update(seconds=seconds, sampling_seconds=sampling_seconds, tokens_per_second=row["tokens"] / seconds,
               peak_memory_mb=peak_memory(device))
    return row

def peak_memory(device):
    """MB at the peak of the process so far: the GPU's on CUDA, else of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    if resource is None:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on a Mac bytes
    return peak / 2 ** 20 if sys.platform == "darwin" else peak / 2 ** 10

MAY_CHANGE = ["steps", "checkpoint_every", "out", "resume", "compare", "seeds", "report", "check_theory",
              "eval_only"]  # what does not shape the rows (but that the last step is evaluated too)

def open_run(config):
    """The run folder's two logs, open, the first one locked, and its checkpoint (None in a new run)."""
    run = Path(config.out)
    run.mkdir(parents=True, exist_ok=True)
    # A start that failed leaves empty files.
    used = any(path.is_dir() or path.stat().st_size > 0 for path in run.iterdir())
    begun = (run / "metrics.jsonl").exists() or (run / "checkpoint.pt").exists()
    check(not used or (config.resume and begun),
          f"--out {run} is in use: add --resume to go on with the run in it, or choose another folder")
    log = open(run / "metrics.jsonl", "a+b")
    samples = open(run / "samples.jsonl", "a+b")
    if fcntl:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the process ends, however it ends
        except BlockingIOError:
            raise UserError(f"--out {run}: another process is running there")
    if not (run / "checkpoint.pt").exists():
        # One that was killed before its first checkpoint has logged step 0 at most.
        check(len(whole_lines(run / "metrics.jsonl")) < 2, f"--out {run}: its checkpoint.pt is missing")
        return log, samples, None
    with user_error(f"{run}/checkpoint.pt is damaged: start again in another --out"):
        state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
        reached = int(state["step"])
        saved = dict(state["config"])
    for name, value in saved.items():
        check(name in MAY_CHANGE or getattr(config, name, value) == value,
              f"--resume {run}: its {flag(name)} was {value}; another one would change its result")
    check(reached <= config.steps, f"--steps {config.steps}: {run} is at {reached} already")
    return log, samples, state

def cut_log(file, last_step):
    """The rows of a log up to a step. Later ones, from after the last checkpoint, are cut and done again."""
    rows = []
    end = 0
    file.seek(0)
    for line in file:
        if not line.endswith(b"\n"):  # torn, when the process was killed
            break
        row = json.loads(line)
        if row["step"] > last_step:
            break
        rows.append(row)
        end += len(line)
    file.truncate(end)
    return rows

def append(file, row):
    """Add a row to a log, at once. Returns it as it will be read: with None for NaN, which JSON lacks."""
    row = json.loads(json.dumps(row), parse_constant=lambda name: None)
    with user_error(f"{file.name} cannot be written; the checkpoint is whole: --resume"):
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
    return row

def save_checkpoint(config, policy, optimizer, step):
    """Write checkpoint.pt so that there is always a whole one, whenever the process is killed."""
    path = Path(config.out, "checkpoint.pt")
    draft = path.with_suffix(".tmp")
    with user_error(f"{path} cannot be written; one that is there is whole"):
        torch.save({"step": step, "config": asdict(config), "model": policy.model.state_dict(),
                    "optimizer": optimizer.state_dict()}, draft)
        os.replace(draft, path)

def restore(policy, optimizer, log, samples, state):
    """Weights, optimizer and logs as they were at a checkpoint (None: the start). Returns the rows so far."""
    last_step = -1
    if state:
        last_step = state["step"]
        policy.model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    rows = cut_log(log, last_step)
    cut_log(samples, last_step)
    check(len(rows) == last_step + 1, "steps are missing in its log")
    return rows

@contextmanager
def catch_interrupts():
    """A list, empty until Ctrl-C, so that a run can finish its step. A second Ctrl-C stops at once."""
    interrupts = []

    def handler(*signal_and_frame):
        print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)
        interrupts.append(True)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)

def train(config):
    """Train --model on --data by --method. Returns the rows of metrics.jsonl, one a rollout step.

    Row 0 is the policy before any update. Row s > 0 holds the rollout of step s, sampled before its update,
    the update, and on evaluation steps the policy after it. All that is random is a function of (seed, step),
    and the checkpoint holds the rest: a run that is killed and resumed writes the rows of an unbroken one.
    """
    log, samples, state = open_run(config)
    with log, samples:
        policy, problems, held_out = prepare(config)
        reference = None
        if "reference" in METHODS[config.method]:  # the policy before any update, so before `restore`
            reference = copy.deepcopy(policy.model)
        optimizer = torch.optim.AdamW(policy.model.parameters(), lr=config.lr, weight_decay=0.0, fused=True)
        with user_error(f"metrics.jsonl, samples.jsonl or checkpoint.pt in {config.out} is damaged"):
            rows = restore(policy, optimizer, log, samples, state)
        Path(config.out, "config.json").write_text(json.dumps(asdict(config), indent=1))
        if config.method == "kl_cov" and config.updates == 1:
            print("note: with --updates 1 KL-Cov cannot act, for at ratio 1 its penalty has no gradient")
        with catch_interrupts() as interrupts:
            bar = tqdm(range(len(rows), config.steps + 1), "training", disable=None)  # None: on a terminal
            for step in bar:
                row = rollout_step(config, policy, reference, optimizer, problems, step)
                shown = f"entropy {row['entropy']:.3f}, reward {row['reward']:.3f}"
                evaluated = config.eval_every and (step % config.eval_every == 0 or step == config.steps)
                if evaluated:
                    row.update(evaluate_and_log(config, policy, held_out, samples, step))
                    shown += f", avg@{row['eval_k']} {row['eval_avg']:.3f}"
                if evaluated and bar.disable:
                    print(f"step {step}: {shown}", flush=True)
                bar.set_postfix_str(shown)
                rows.append(append(log, row))
                check(row["skipped_updates"] < max(1, row["updates"]),
                      f"step {step}: no update was finite; start again in another --out with a lower --lr")
                if step % config.checkpoint_every == 0 or step == config.steps or interrupts:
                    save_checkpoint(config, policy, optimizer, step)
                if interrupts:
                    print(f"stopped after step {step}; to go on, repeat the command with --resume")
                    raise KeyboardInterrupt
    with user_error(f"{config.out}/policy cannot be written; the checkpoint is whole: --resume"):
        policy.model.save_pretrained(Path(config.out, "policy"))
        policy.tokenizer.save_pretrained(Path(config.out, "policy"))
    return rows


# -----------------------------------------------------------------------------
# 7. Problems and policies

INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."
QUESTION_COLUMNS = ["problem", "question", "prompt"]
ANSWER_COLUMNS = ["answer", "ground_truth", "solution"]
TINY_CHARACTERS = "0123456789+-*=?}"  # what the built-in policy reads, beside \boxed{
ARITHMETIC = {"arithmetic": "test", "arithmetic-dev": "dev"}  # the built-in data, and what each holds out

def read_rows(source, split):
    """The rows of a data file or hub data set, as dicts, and whether it has but one split, to be divided.

    Numbers in JSON and CSV stay the text that stands in the file: as floats they would lose digits.
    """
    kind = Path(source).suffix
    with user_error(f"{source}: no hub data set, nor a .jsonl, .json, .csv or .parquet file to be read"):
        if kind in (".json", ".jsonl"):
            return read_json(Path(source).read_text("utf-8-sig")), True
        if kind == ".csv":
            with open(source, encoding="utf-8-sig", newline="") as file:
                return list(csv.DictReader(file)), True
        import datasets  # slow to import, and the built-in data does not need it
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(logging.CRITICAL)
        if kind == ".parquet":
            return list(datasets.load_dataset("parquet", data_files=glob.escape(source))["train"]), True
        names = datasets.get_dataset_config_names(source)
        splits = datasets.load_dataset(source, "main" if "main" in names else names[0])
    # The first of these that there is, else any.
    train = [name for name in ["train", "test", "validation", *splits] if name in splits][0]
    test = [name for name in ["test", "validation", "train", *splits] if name in splits][0]
    return list(splits[train if split == "train" else test]), train == test

def read_json(text):
    """The rows of a JSON array, or of one JSON object a line."""
    decode = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=lambda name: None).decode
    if text.lstrip().startswith("["):
        rows = decode(text)
    else:
        rows = [decode(line) for line in text.split("\n") if line.strip()]
    check(all(isinstance(row, dict) for row in rows), "a row is no JSON object")
    json.dumps(rows, ensure_ascii=False).encode()  # raises for a lone surrogate, which no tokenizer reads
    return rows

def column(row, names):
    """The first of the named columns that is not empty in a row, at its top or one level down; else None."""
    nested = [value for value in row.values() if isinstance(value, dict)]
    for name in names:
        for level in [row, *nested]:
            if level.get(name) not in (None, ""):
                return level[name]
    return None

def problem_text(problem):
    """What is asked, as a text; of a chat what its user says. '' for anything else."""
    if isinstance(problem, str):
        return problem.strip()
    with suppress(TypeError, KeyError, AttributeError):
        return "\n".join(message["content"].strip() for message in problem if message["role"] == "user")
    return ""

def problem_key(problem):
    """A hash of the text. Two problems are one if they differ in blanks, or in having INSTRUCTION, alone."""
    text = " ".join(problem_text(problem).split())
    instruction = " ".join(INSTRUCTION.split())
    return hashlib.sha256(text.removesuffix(instruction).strip().encode()).hexdigest()

def gold_text(value):
    """The reference answer in a cell of a data set: a text, a number or a list of one. '' for none."""
    if isinstance(value, str) and value.startswith('["'):  # as Skywork stores answers
        with suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, list) and len(value) == 1:
        return gold_text(value[0])
    if isinstance(value, float) and (math.isnan(value) or abs(value) >= 2 ** 53):  # it may have lost digits
        return ""
    return "" if isinstance(value, (list, dict, type(None))) else gold_answer(str(value))

def usable_problems(config, policy, rows, source):
    """The rows that have a problem and an answer and fit into the model, each once, ordered by a hash.

    Each is a dict of problem (text or chat), answer, prompt_ids and in_thought. What is left out is counted.
    """
    template = config.prompt_template
    if source in ARITHMETIC:
        template = template or "{problem}"
    settings = policy.model.config.get_text_config()
    room = getattr(settings, "max_position_embeddings", math.inf) - config.max_new_tokens
    problems = {}
    for row in rows:
        problem = column(row, QUESTION_COLUMNS)
        answer = gold_text(column(row, ANSWER_COLUMNS))
        if problem_text(problem) and answer:
            ids = policy.encode(problem, template)
            if len(ids) <= room:
                # the templates of some models open the response's thought
                in_thought = policy.tokenizer.decode(ids).rstrip().endswith("<think>")
                problems[problem_key(problem)] = {"problem": problem, "answer": answer, "prompt_ids": ids,
                                                  "in_thought": in_thought}
    columns = ", ".join(map(str, rows[0])) if rows else "none"
    check(problems, f"{source}: no row has a problem ({', '.join(QUESTION_COLUMNS)}), an answer "
                    f"({', '.join(ANSWER_COLUMNS)}) and room for --max-new-tokens; its columns: {columns}")
    if len(problems) < len(rows):
        print(f"{source}: {len(rows) - len(problems)} of {len(rows)} rows left out: no answer, repeated, or "
              f"too long for the model beside --max-new-tokens", file=sys.stderr)
    return [problems[key] for key in sorted(problems)]

def load_problems(config, policy, split):
    """The problems of a split, train or test. Of rows that serve as both a tenth, at most --eval-problems,
    is held out; `prepare` takes these from the training problems."""
    source = config.data
    if split == "test" and config.eval_data:
        source = config.eval_data
    if source in ARITHMETIC:
        part = "train" if split == "train" else ARITHMETIC[source]
        count = TRAIN_PROBLEMS if split == "train" else config.eval_problems
        return usable_problems(config, policy, arithmetic_problems(part, count), source)
    rows, shared = read_rows(source, split)
    problems = usable_problems(config, policy, rows, source)
    if split == "train":
        return problems
    if shared and config.eval_data in ("", config.data):
        problems = problems[:max(1, len(problems) // 10)]
    return problems[:config.eval_problems]

def prepare(config):
    """The policy, its training problems (none of them held out) and the held-out ones."""
    policy = load_policy(config)
    held_out = load_problems(config, policy, "test")
    if config.eval_only:
        return policy, [], held_out
    keys = {problem_key(problem["problem"]) for problem in held_out}
    problems = load_problems(config, policy, "train")
    problems = [problem for problem in problems if problem_key(problem["problem"]) not in keys]
    check(len(problems) >= config.prompts,
          f"--prompts {config.prompts}: there are only {len(problems)} training problems; lower it")
    return policy, problems, held_out

@dataclass
class Policy:
    """A language model and what is needed to talk to it."""

    model: torch.nn.Module
    tokenizer: object
    end_ids: list   # tokens that end a response and are no part of its text
    stop_ids: list  # these, and the tokens that contain --stop
    stop: str

    def encode(self, problem, template):
        """The token ids of a problem, a text or a chat, by the template if any, else the tokenizer's own."""
        tokenizer = self.tokenizer
        if tokenizer.chat_template and not template:
            ids = tokenizer(self.chat_text(problem), add_special_tokens=False).input_ids
        else:
            text = (template or "{problem}" + INSTRUCTION + "\n").replace("{problem}", problem_text(problem))
            ids = tokenizer(text).input_ids
            while ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers end each text with it
                ids = ids[:-1]
            if ids[:2] == [tokenizer.bos_token_id] * 2:  # the template's and the tokenizer's
                ids = ids[1:]
        V = self.model.get_input_embeddings().weight.shape[0]
        check(ids and max(ids) < V, "--model: it has no embedding for tokens of its tokenizer")
        checked = set(string.ascii_lowercase + string.digits + string.punctuation)
        asked = set(problem_text(problem).lower()) & checked  # in small letters, for some know no capitals
        lost = asked - set(tokenizer.decode(ids).lower())
        check(not lost, f"--model: its tokenizer cannot write {' '.join(sorted(lost))}, as in a problem")
        return ids

    def chat_text(self, problem):
        """A chat, or a text as a chat of one message, as the model's chat template writes it."""
        chat = problem
        if isinstance(problem, str):
            chat = [{"role": "user", "content": problem + INSTRUCTION}]
        in_parts = [{**m, "content": [{"type": "text", "text": m.get("content", "")}]} for m in chat]
        for messages in [chat, in_parts]:  # some templates take contents as lists of parts
            with suppress(Exception):  # a template may raise anything
                text = self.tokenizer.apply_chat_template(messages, tokenize=False,
                                                          add_generation_prompt=True)
                # All that is asked must be in it; of earlier answers some templates drop the thoughts.
                if all(m["content"].strip() in text for m in chat if m["role"] != "assistant"):
                    return text
        raise UserError("the chat template of --model does not take a problem: give a --prompt-template")

    def response_text(self, ids):
        """The text of a response, up to --stop, without the token that ends it."""
        text = self.tokenizer.decode([i for i in ids if i not in self.end_ids])
        return text.split(self.stop)[0] if self.stop else text

def load_policy(config):
    """The policy of --model on the device: fp32, no dropout (the ratio must be 1 before an update)."""
    device = config.device
    if device == "auto":
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    with user_error(f"--device {device} does not work"):
        torch.zeros(1, device=device).item()
    source = warm_policy(config.seed) if config.model == "tiny" else config.model
    if config.threads:
        torch.set_num_threads(config.threads)
    with user_error(f"--model {config.model}: not tiny, nor a folder or hub model that loads"):
        model, loading = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, trust_remote_code=False, output_loading_info=True)
        missing = sorted(loading["missing_keys"])
        check(not missing, f"it has no weights for {', '.join(missing[:3])}")
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        check(tokenizer("1+1=2 Why?").input_ids, "its tokenizer is missing")
    model.eval()  # and so it stays

    V = model.get_input_embeddings().weight.shape[0]
    found = set()  # what ends a response, as tokenizer and model have it: an id, a list of ids or None
    for ids in [tokenizer.eos_token_id, model.generation_config.eos_token_id]:
        found.update(ids if isinstance(ids, list) else [ids])
    end_ids = sorted(found & set(range(V)))
    check(end_ids, f"--model {config.model}: no token ends a response")
    stop_ids = end_ids
    if config.stop:
        stop_ids = end_ids + [i for i in range(len(tokenizer)) if config.stop in tokenizer.decode([i])]
        check(len(stop_ids) > len(end_ids), f"--stop {config.stop!r}: no token of --model contains it")
    policy = Policy(model, tokenizer, end_ids, stop_ids, config.stop)
    check_policy(config, policy)
    model.to(device)
    return policy

@torch.no_grad()
def check_policy(config, policy):
    """Refuse a model unless three log-probabilities agree: as sampled with the cache, of response_logprobs,
    and the model's own (some have no such cache, some scale their logits after the head). The texts are long
    enough to pass a sliding window where there is one; all in fp32 on the CPU."""
    model = policy.model
    settings = model.config.get_text_config()
    room = getattr(settings, "max_position_embeddings", math.inf) - 8
    window = getattr(settings, "sliding_window", None) or 4
    length = int(min(room, window + 4))
    ids = policy.tokenizer("1+1=2 Why? ").input_ids
    with user_error(f"--model {config.model}: cannot be sampled from with a key-value cache"):
        rollouts = sample_rollouts(model, [(ids * length)[:length], ids[:3]], group_size=2, max_new_tokens=8,
                                   temperature=1.0, eos_token_ids=policy.end_ids,
                                   pad_token_id=policy.end_ids[0], generator=seeded("cpu", "check"))
        T = rollouts.response_mask.shape[1]
        trained, _ = response_logprobs(model, rollouts.input_ids, rollouts.attention_mask, T)
        # Row 0 has no padding before its response, so that the model can be called on it as it is.
        own = model(input_ids=rollouts.input_ids[:1]).logits[:, -T - 1:-1].log_softmax(-1)        # [1, T, V]
        own = own.gather(2, rollouts.input_ids[:1, -T:, None])[:, :, 0]                           # [1, T]
        mask = rollouts.response_mask
        off = torch.cat([(trained[:1] - own)[mask[:1]], (rollouts.logprobs - trained)[mask]]).abs().max()
        check(off < 1e-3, f"its log-probabilities come out wrong here, by {off:.3g}")

# The built-in task: arithmetic modulo 10, as 3+4*7-2?, and a policy that an imperfect crowd has taught.

TRAIN_PROBLEMS = 16_384  # of some 280,000 that exist
OPERANDS = [3, 4]        # how many one-digit numbers a problem has
# Shares of the writers ("brief" at the end of the warm-up), and the chance of a slip in an operation.
CROWD = {"brief": 0.65, "careful": 0.35, "slip": 0.2}

def reduce_once(expression, careful=True, slip=0):
    """Do one operation modulo 10: the first `*` if careful, else the leftmost. 3+4*7 -> 3+8, else 7*7."""
    at = 0
    if careful and "*" in expression:
        at = expression.index("*") - 1
    left = int(expression[at])
    right = int(expression[at + 2])
    results = {"+": left + right, "-": left - right, "*": left * right}
    result = results[expression[at + 1]] + slip
    return expression[:at] + str(result % 10) + expression[at + 3:]

def crowd_solution(expression, rng, brief):
    """One text of the warm-up corpus, by an imperfect writer, so that the policy starts broad.

    A share `brief` of the writers answers at once, the others do one operation at a time, as in
    =3+8-2=1-2\\boxed{9}. Some mind precedence, most work from left to right, which is often right. All slip.
    """
    at_once = rng.random() < brief
    careful = rng.random() < CROWD["careful"]
    text = ""
    while len(expression) > 1:
        slip = rng.choice([-2, -1, 1, 2]) if rng.random() < CROWD["slip"] else 0
        expression = reduce_once(expression, careful, slip)
        if len(expression) > 1 and not at_once:
            text += "=" + expression
    return text + "\\boxed{" + expression + "}"

def arithmetic_problems(split, count):
    """`count` different problems of a split: train, dev (to choose settings) or test (to report).

    A hash of the expression decides its split, so that no problem is in two.
    """
    rng = random.Random(split)
    problems = {}
    while len(problems) < count:
        expression = ""
        for _ in range(rng.choice(OPERANDS)):
            expression += f"{rng.randrange(10)}{rng.choice('+-*')}"
        expression = expression[:-1]
        share = int(hashlib.sha256(expression.encode()).hexdigest(), 16) % 10
        if split == {0: "test", 1: "dev"}.get(share, "train"):
            answer = expression
            while len(answer) > 1:
                answer = reduce_once(answer)
            problems[expression] = {"problem": expression + "?", "answer": answer}
    return list(problems.values())

def tiny_policy(seed, width=64):
    """The built-in policy before training: a GPT-2 of two layers. Characters and \\boxed{ are its tokens."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *TINY_CHARACTERS])}
    tokenizer = GPT2Tokenizer(vocab=vocabulary, merges=[], pad_token="<pad>", eos_token="<eos>",
                              bos_token=None, unk_token="<pad>")
    tokenizer.add_tokens(["\\boxed{"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(GPT2Config(
            vocab_size=len(tokenizer), n_positions=256, n_embd=width, n_layer=2, n_head=width // 32,
            n_inner=3 * width, activation_function="relu", bos_token_id=None, eos_token_id=1, pad_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    return model, tokenizer

def imitate(model, tokenizer, seed, steps=1800, batch_size=128, lr=4e-3):
    """Train the built-in policy on the crowd's texts, more and more of them brief."""
    rng = random.Random(seed)
    problems = arithmetic_problems("train", TRAIN_PROBLEMS)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for step in tqdm(range(steps), "warm-up", disable=None):
        for group in optimizer.param_groups:  # 50 steps up, then a cosine down to a tenth
            group["lr"] = lr * min((step + 1) / 50, 0.55 + 0.45 * math.cos(math.pi * step / steps))
        ids = []
        labels = []
        for problem in rng.choices(problems, k=batch_size):
            prompt = tokenizer(problem["problem"]).input_ids
            solution = crowd_solution(problem["problem"][:-1], rng, CROWD["brief"] * step / steps)
            solution = tokenizer(solution + "<eos>").input_ids
            ids.append(torch.tensor(prompt + solution))
            labels.append(torch.tensor([-100] * len(prompt) + solution))  # the prompt is not learned
        ids = pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)            # [N, S]
        labels = pad_sequence(labels, batch_first=True, padding_value=-100)                        # [N, S]
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

def warm_policy(seed):
    """The folder of the warm built-in policy of a seed, trained once and then kept in the user's cache.

    Its name has a hash of what shapes the weights.
    """
    shaping = [reduce_once, crowd_solution, arithmetic_problems, tiny_policy, imitate]
    key = [TRAIN_PROBLEMS, OPERANDS, CROWD, TINY_CHARACTERS, torch.__version__, transformers.__version__]
    key += [inspect.getsource(function) for function in shaping]
    name = f"tiny-{seed}-{hashlib.sha256(repr(key).encode()).hexdigest()[:12]}"
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    check(not home.startswith("~"), "no home folder to keep the built-in policy in; set XDG_CACHE_HOME")
    folder = Path(home, "entropy_rl", name)
    if folder.exists():
        return str(folder)
    draft = folder.with_name(f"{name}.{os.getpid()}")
    draft.mkdir(parents=True, exist_ok=True)
    print(f"warm-up of the built-in policy of seed {seed}, once: a minute or two", file=sys.stderr)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same weights whatever --threads is
    model, tokenizer = tiny_policy(seed)
    imitate(model, tokenizer, seed)
    torch.set_num_threads(threads)
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    try:
        draft.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(draft)
    return str(folder)


# -----------------------------------------------------------------------------
# 8. The verifier

def extract_answer(text):
    """The final answer of a response, as "7" of "so \\boxed{7}." The content of its last \\boxed{} or
    \\fbox{}, else what its last line "#### ..." says, or an earlier one with a number, else what follows its
    last "answer is" or "answer:", else None. Only what comes after the last </think> and before an unclosed
    <think> counts.
    """
    ### BEGIN SOLUTION
    text = str(text).rpartition("</think>")[2].partition("<think>")[0][-100_000:].rstrip()
    starts = [box.end() for box in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)]
    for start in reversed(starts[-8:]):             # the last box whose braces close
        depth = 1
        for brace in re.finditer(r"(?s)\\.|[{}]", text[start:]):
            depth += (brace[0] == "{") - (brace[0] == "}")
            if depth == 0:
                return text[start:start + brace.start()].strip()
    patterns = (
        r"\\(?:boxed|fbox)(?![A-Za-z])\s*([^\s${}]+)",                          # \boxed 7
        r"(?m)^####(?!.*[Aa]nswer)(.*)\Z",                                      # #### Monday, the last line
        r"(?m)####([^A-Za-z#\n]*[0-9](?: [a-z]+)?[^\w#\n]*)$",                  # #### 18 eggs, on any line
        r"(?is)\A.*answer[*_ ]*(?:is\b|:)[ :*\n]*"                               # the last "answer is",
        r"(?:(?:\$\$?|\\[\[(]|\\begin\{[a-z]+\*?\})\s*\n)?\s*"                # a line that opens a formula,
        r"(.*?)(?:\.\s|\.?\Z|\n|[,;]? (?:since|because|which) |, (?:as|so) )",  # up to an end or a reason
    )
    for pattern in patterns:
        found = re.findall(pattern, text)
        if found:
            return found[-1].strip(" *,;").rstrip(".") or None
    return None
    ### END SOLUTION

def gold_answer(text):
    """The reference answer in a cell of a data set: its box, else what follows its last ####, else the text
    itself; "" if that is long."""
    text = str(text).strip()
    if "\\boxed" in text or "\\fbox" in text:
        return extract_answer(text) or ""
    text = text.rpartition("####")[2].strip()
    return text if len(text) <= 200 else ""

# Step 1: one spelling. Words stand in "quotes", functions have a backslash, variables are single letters.
SPELLINGS = {
    "\\dfrac": "\\frac", "\\tfrac": "\\frac", "√": "\\sqrt", "\\infty": "∞", "\\circ": "°", "π": "π",
    "\\sec": "{1}/\\cos", "\\csc": "{1}/\\sin", "\\cot": "{1}/\\tan", "−": "-", "\\cdot": "*",
    "×": "*", "·": "*", "÷": "/", "per": "/", "**": "^", "²": "^2", "³": "^3", "infinity": "∞", "<=": "≤",
    "⩽": "≤", ">=": "≥", "\\neq": "≠", "≈": "=", "∈": "=", "is": "=", "are": "=", "∪": ",", "and": ",",
    "or": ",", ";": ",", "\\\\": ",", "to": ":", "⟨": "(", "⟩": ")", "percent": "%",
    "\\$": '"$"', "dollars": '"$"', "in": '"inch"', "inches": '"inch"', "ft": '"feet"',
    "two": "2", "eight": "8",  # of bases
}
SHORT_WORDS = {"cm", "mm", "km", "kg", "sq", "am", "pm", "min", "hr", "day", "usd", "no", "not", "yes"}
FUNCTIONS = {"sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "arctan": cmath.atan, "ln": cmath.log,
             "log": cmath.log10, "sqrt": cmath.sqrt, "abs": abs, "frac": operator.truediv,
             "mixed": operator.add}

def spell(match):
    """A word, macro or sign in our spelling: \\dfrac is \\frac, \\theta is θ, Hours is "hour"."""
    token = match[0]
    name = token.strip("\\")
    sign = html.unescape(f"&{name};")               # theta -> θ
    spelling = SPELLINGS.get(token.lower()) or SPELLINGS.get(sign)
    if spelling:
        return f" {spelling} "
    if name in FUNCTIONS:
        return f"\\{name} "
    if token[0] == "\\" and len(sign) == 1:
        return sign
    is_word = len(name) > 3 or name.lower() in SHORT_WORDS
    return f'"{name.lower().rstrip("s")}"' if is_word else name

# In this order, each on what the one before has left.
ARGUMENT = r"(\((?:[^()]|\([^()]*\))*\)|\{[^{}]*\}|\\(?:frac|sqrt)\{[^{}]*\}|[\w.]+(?:\^\w|\^?°)?)"
RULES = [
    (r", ?\\! ?|\{ ?, ?\} ?", ","),                                         # 1{,}234 -> 1,234
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|mathbf|boldsymbol|quad|angle)(?![a-z])"
     r"|(?<!\\)(?:\\[,:;! ()\[\]]|[~$])", " "),                             # \left(x -> (x
    (r"(?<=[\w}])[ \\]*\\(?:text|mathrm) ?\{ *([mgsJLWNCF])\.? *\}", r'"\1"'),  # 5\text{ m} -> 5"m"
    (r"\\(?:text[a-z]*|mathrm|mbox|hbox|operatorname) ?\{([^{}]*)\}", r" \1 "),  # \text{even} -> even
    (r"[(\[]? *\\begin ?\{[pb]?(?:matrix|array)\}(?:\{[lcr|]*\})?", "("),   # \begin{pmatrix} -> (
    (r"(?:\\\\\s*)?\\end ?\{[pb]?(?:matrix|array)\} *[)\]]?", ")"),         # \end{pmatrix} -> )
    (r"√ ?(\d+)", r"\\sqrt{\1}"),                                            # √10 -> \sqrt{10}
    (r"\\?[A-Za-z]+|\\.|[<>]=|\*\*|[^\sA-Za-z0-9_]", spell),                # Hours -> "hour"
    (r"(?<![\w.,^])([1-9]\d?\d?)[, ](\d{3})(?:[, ](\d{3}))?(?:[, ](\d{3}))?(?!\d|,\d|[^(\[]*[)\]])",
     r"\1\2\3\4"),                                       # 1,234,567 -> 1234567; not in brackets, nor 1,2345
    (r"\\log ?_ ?(\w|\{[^{}]*\})", r"(1/\\ln\1)\\ln "),                     # \log_2x -> {1/\ln2}\ln x
    (r"\s+(?!\d)|(?<!\d)\s+", ""),                                          # 2 x, 2 1/3 -> 2x,2 1/3
    (r"(?<![\w.{])0+(?=\d)", ""),                                           # 007 -> 7
    (r"([_^])\{(-?\d+|-?\w|°)\}(?!\d)", r"\1\2"),                           # x^{2} -> x^2
    (r"([)\]])U([(\[])", r"\1,\2"),                                         # [0,1)U(2,3] -> [0,1),(2,3]
    (r"^[=,:*^]+|[ ,.:*^]+$|,(?=,)", ""),                                   # =5. -> 5
    (r"\|([^|]*)\|", r"\\abs(\1)"),                                         # |x| -> \abs(x)
    (r"\\(frac|sqrt)(\w) ?", r"\\\1{\2}"),                                  # \frac12 -> \frac{1}2
    (r"(\\frac\{(?:[^{}]|\{[^{}]*\})*\})(\w)", r"\1{\2}"),                  # \frac{1}2 -> \frac{1}{2}
    (r"\}\{", ","),                                                         # \frac{1}{2} -> \frac{1,2}
    (r"\\frac\{(\d+),(\d+)\}", r"(\1/\2)"),                                 # \frac{1,2} -> (1/2)
    (r"(?<![\w.^_])(\d+)(?: ?\((\d+/\d+)\)| (\d+/\d+))", r"\\mixed{\1,\2\3}"),  # 2(1/3) -> \mixed{2,1/3}
    (r"\\sqrt\[([^\[\]]*)\](\{[^{}]*\})", r"\2^{1/(\1)}"),                  # \sqrt[3]{2} -> {2}^{1/(3)}
    (r"\\(sin|cos|tan)\^(\d)" + ARGUMENT, r"{\\\1\3}^\2"),                  # \sin^2x -> {\sinx}^2
    (r"(\\(?:arc)?(?:sin|cos|tan)|\\ln|\\log)(?![({])" + ARGUMENT, r"\1(\2)"),  # \sin2x -> \sin(2x)
    (r"(\\(?:sin|cos|tan)\([^()]*?)\^?°", r"\1π/180"),                      # \sin(30°) -> \sin(30π/180)
    (r"\^?°", '"degree"'),                                                  # 30° -> 30"degree"
    (r'[({]*(\d+)[)}]?(?:_|"base")[({]*(?:"base")?(\d\d?)[)}]*', r'\1"base\2"'),  # 52_8 -> 52"base8"
    (r'^(?:"option"|"choice")?\(?([A-F])(?:[):.](?:[\w.][^,A-Z"]*|"[^,]*)?)?$', r"\1"),  # (C)12 -> C
    (r"(^|=)\{([^{}]*|.*,.*)\}$", r"\1\2"),                                 # {1,2} -> 1,2
]

def normalize(text):
    """A text in our spelling: "x = \\dfrac12 \\text{ cm}" is 'x=(1/2)"cm"'."""
    for pattern, replacement in RULES:
        text = re.sub(pattern, replacement, text)
    return text

# Step 2: the value of a text, computed on Python's syntax tree of it. Nothing is run; closed, next, infinity
# are mere names there, and f(2) is a call that has no value, for it is no product.
PYTHON = {"[": "(closed,", "]": ",closed)", "^": "**", "=": "==", "≤": "<=", "≥": ">=", "≠": "!=",
          "%": "/100", "∞": "infinity", "&": ",next,"}
TOKEN = r"\\[a-z]+\(|[^\W\d_]\((?=\w\))|[^\W\d_](?:_\d+|_\w|_\(\w+\))?|\d+\.?\d*|\.\d+|\S"
CONSTANTS = {"π": math.pi, "e": math.e, "i": 1j}
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.Pow: operator.pow, ast.USub: operator.neg, ast.UAdd: operator.pos}

def syntax_tree(text):
    """Python's syntax tree of the list of a text's parts, with 2x^{3} read as 2*x**(3); else an error."""
    if len(text) > 400 or not re.fullmatch(r"[\w\\.+*/^(){}\[\],&=<≤>≥≠%∞±-]+", text):
        raise ValueError("unknown signs")
    if "±" in text:
        text = text.replace("±", "+") + "," + text.replace("±", "-")
    tokens = re.findall(TOKEN, text.replace("{", "(").replace("}", ")"))
    python = " ".join(PYTHON.get(token, token) for token in tokens)
    python = re.sub(r"(?<=[\w)]) (?=[^\W\d]|[(\\])", "*", python).replace("\\", "")     # 2 x -> 2*x
    python = re.sub(r"_\((\w+)\)", r"_\1", python)                           # v_(max) -> v_max
    return ast.parse(f"[{python}]", mode="eval").body

def value(tree, point):
    """The value of a syntax tree: a Fraction, else a float or complex number, or a list of values."""
    if isinstance(tree, ast.Constant):
        return Fraction(str(tree.value))
    if isinstance(tree, ast.Name) and tree.id in CONSTANTS:
        return CONSTANTS[tree.id]
    if isinstance(tree, ast.Name):       # a variable is pseudo-random: large, negative or small
        return Fraction(random.Random(f"{tree.id} {point}").randint(40, 99), (10, -20, 20)[point])
    parts = [value(child, point) for child in ast.iter_child_nodes(tree) if isinstance(child, ast.expr)]
    if isinstance(tree, ast.Call):
        return FUNCTIONS[tree.func.id](*parts[1:])  # parts[0], its name read as a variable, is not used
    if isinstance(tree, (ast.List, ast.Tuple)):
        return parts
    if isinstance(tree, ast.Compare):
        return relation(tree, parts)
    size = len(str(parts))
    if isinstance(tree.op, ast.Pow):
        size *= abs(parts[1])
    if size > 100_000 or isinstance(parts[0], list):                        # lists would be joined
        raise ValueError("too large, or a list")
    return OPERATORS[type(tree.op)](*parts)

def relation(tree, sides):
    """The value of a=b, a<b or a chain of them: its signs, and each left - right divided by what it is at
    point 0, so that equations that differ by a factor, as 2x=4 and x=2, have equal values at every point.
    `sides` are the values at this point."""
    starts = [value(side, 0) for side in [tree.left, *tree.comparators]]
    ratios = [type(sign) for sign in tree.ops]
    for n, sign in enumerate(tree.ops):
        start = starts[n] - starts[n + 1]
        either_way = isinstance(sign, (ast.Eq, ast.NotEq))                  # a=b is b=a, a<b is not b<a
        ratios.append((sides[n] - sides[n + 1]) / (start if either_way else abs(start)))
    return ratios

def same_value(x, y):
    """Whether two values are the same: lists entry by entry, fractions exactly, others to twelve digits."""
    if isinstance(x, list) and isinstance(y, list):
        return len(x) == len(y) and all(map(same_value, x, y))
    if isinstance(x, (float, complex)) or isinstance(y, (float, complex)):
        return cmath.isclose(x, y, rel_tol=1e-12)
    return x == y

def same_values(left, right):
    """Whether two texts have the same values at three points; of lists each value as often in both."""
    with suppress(Exception):                       # a text may be anything
        left = syntax_tree(left)
        right = syntax_tree(right)
        for point in range(3):
            xs = value(left, point)
            ys = value(right, point)
            if len(xs) != len(ys):
                return False
            for y in ys:
                on_the_left = sum(same_value(x, y) for x in xs)
                on_the_right = sum(same_value(x, y) for x in ys)
                if on_the_left != on_the_right:
                    return False
        return True
    return False

# Step 3: the comparison.
NAME = r"(?:^|(?<=,))(?!\\sqrt)([^\d=,+*/^-][^=,+*/^-]*(?:\^-1)?(?:\([^()]*\))?|\([^()\d]*\))="  # x=, f(2)=
NO_UNIT = (r'(?!"(?:not?|never|more|le|fewer|negative|factorial|root|half|third|quarter|dozen|\w+ed|am|pm|'
           r'\w*(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand|illion)(?:th)?)")')  # "le" is less
UNIT = rf'"[$]"|(?:%|(?:[*/]?{NO_UNIT}"[^"]+"(?:\^[1-3])?){{1,6}})(?=[^\w\\(\[{{"^|]|$)'   # "$"5, 5%, 5"cm"^2
NUMBER = r"(?:\\mixed|[-\d./(){},])*"           # 5, -1/2, 2 1/3, a list of them
WORKED = r"[\w)}][-+*](?!10\^)|[\d)}][(\[{]"   # 2+3, 2*3, 2(3): still to be worked out

def same_answer(prediction, gold):
    """Whether two texts in our spelling mean the same."""
    if prediction == gold:
        return gold != ""
    if "=" in prediction and not re.search("[=,]", gold):                   # 2+3=5 states 5 (x=5: see NAME)
        sides = prediction.split("=")
        return all(same_values(side, sides[-1]) for side in sides) and same_answer(sides[-1], gold)
    if re.fullmatch(NUMBER, gold) and re.search(WORKED, prediction):        # 2+3 is not yet 5
        return False
    return same_values(prediction, gold)

def same_but_for_units(prediction, gold):
    """Whether two texts in our spelling mean the same; one may lack the other's name or unit."""
    if same_answer(prediction, gold):
        return True
    for part in (NAME, UNIT):
        given = set(re.findall(part, prediction))
        asked = set(re.findall(part, gold))
        differ = given and asked and given != asked
        base_too_many = not asked and '"base' in str(given - {'"base10"'})  # 52_8 is not 52
        if differ or base_too_many or len(asked) > 1:
            continue                                # nothing is taken off, so all must agree
        prediction = re.sub(part, "", prediction)
        gold = re.sub(part, "", gold)
    return same_answer(prediction, gold)

def answers_match(prediction, gold):
    """Whether a predicted answer means the same as the reference answer `gold`. Never raises.

    0.33 is not 1/3, but 6/8 is 3/4 and an expanded product the factored one. A sum or product left to do, as
    2+3 for 5, is refused. `x = 5` and `2+3 = 5` state 5. A unit may be missing on either side, a base in the
    prediction, but neither may be another one. Lists match in any order; tuples, intervals, matrices keep
    order and ends. What cannot be read as mathematics must be equal after `normalize`.
    """
    texts = isinstance(prediction, str) and isinstance(gold, str)
    if not texts or max(len(prediction), len(gold)) > 600:
        return False
    gold = normalize(gold)
    comma = ", " if "," in gold else ","            # 120,150 may be a list where one is asked for
    other_reading = re.sub(r"(?<=\d),[\\\s]*(?=\d)", comma, prediction)
    return any(same_but_for_units(normalize(text), gold) for text in {prediction, other_reading})

def math_reward(response, gold):
    """1.0 where the final answer of the response matches the gold answer, else 0.0."""
    return float(answers_match(extract_answer(response), gold))


# -----------------------------------------------------------------------------
# 9. Reports

LAWFUL = ["grpo", "pg"]  # the paper claims the law for runs that do not intervene
TABLE = {"entropy": "entropy", "response_length": "length", "eval_avg": "avg@k", "eval_pass": "pass@k",
         "eval_greedy": "greedy", "seconds": "s in steps"}

def read_run(run):
    """The settings and the rows of a run folder."""
    with user_error(f"{run}: no run folder that can be read"):
        config = json.loads(Path(run, "config.json").read_text())
        rows = [json.loads(line) for line in whole_lines(Path(run, "metrics.jsonl"))]
        steps = [int(row["step"]) for row in rows]
    check(steps and "method" in config, f"{run}: no step is in its log")
    return config, rows

def whole_lines(path):
    """The lines of a log, without a torn last one, of a run that was killed."""
    return path.read_text().rpartition("\n")[0].splitlines()

def grouped(runs):
    """Run folders as {label: [(config, rows), ...]}: folders that differ in -seedN alone are one group."""
    groups = {}
    for run in dict.fromkeys(Path(run).resolve() for run in runs):
        group = re.sub(r"-seed\d+$", "", str(run))
        groups.setdefault(group, []).append(read_run(run))
    names = [Path(group).name for group in groups]
    if len(set(names)) == len(names):
        return dict(zip(names, groups.values()))
    return groups

def known(rows, key):
    """{step: value} of a key, where it has one."""
    return {row["step"]: row[key] for row in rows if row.get(key) is not None}

def at_end(rows, key):
    """Of seconds the sum, of evaluations the last, of the rest the mean over the last tenth; NaN for none."""
    values = list(known(rows, key).values()) or [math.nan]
    if key == "seconds":
        return sum(values)
    if key.startswith("eval"):
        return values[-1]
    return mean(values[-max(1, len(values) // 10):])

def with_error(values, digits=3):
    """'mean ± its standard error' over replicates, '-' for no value."""
    values = torch.tensor(values, dtype=torch.float64)
    if values.isnan().any():
        return "-"
    if len(values) == 1:
        return f"{values.item():.{digits}f}"
    return f"{values.mean():.{digits}f} ± {values.std() / math.sqrt(len(values)):.{digits}f}"

def show_together(runs, picture):
    """The table and the picture of some runs."""
    groups = grouped(runs)
    print_table(groups)
    draw(groups, picture)

def print_table(groups):
    """A row before training (the first group's) and one at each group's end, mean ± error over seeds; then
    each group's end less the first group's, paired by seed."""
    first = list(groups)[0]
    print(f"\n{'':20}" + "".join(f"{title:>20}" for title in TABLE.values()))
    starts = [(config, rows[:1]) for config, rows in groups[first]]
    for label, members in [("before", starts), *groups.items()]:
        cells = [with_error([at_end(rows, key) for _, rows in members]) for key in TABLE]
        print(f"{label:20}" + "".join(f"{cell:>20}" for cell in cells))
    for label in list(groups)[1:]:
        for key in ["eval_avg", "eval_pass"]:
            more = paired_differences(groups[label], groups[first], key)
            if more and not math.isnan(sum(more)):
                print(f"{label}: {TABLE[key]} less {first}'s, seed by seed: {with_error(more, 4)} "
                      f"(positive on {sum(value > 0 for value in more)} of {len(more)})")

def paired_differences(members, others, key):
    """The end values of a group less those of another group, for the seeds that both have."""
    theirs = {config["seed"]: at_end(rows, key) for config, rows in others}
    both = [(config["seed"], rows) for config, rows in members if config["seed"] in theirs]
    return [at_end(rows, key) - theirs[seed] for seed, rows in both]

def law_points(rows):
    """H and R of Eq. 6 at the evaluated steps: H of the step's rollout, R of the policy after its update."""
    evaluated = [row for row in rows if row.get("eval_avg") is not None]
    return [row["entropy"] for row in evaluated], [row["eval_avg"] for row in evaluated]

def report(run):
    """Print what a run's log says: the law, Table 1, who was selected, two samples."""
    config, rows = read_run(run)
    print(f"\n{run}: {config['method']}, {config['model']} on {config['data']}, seed {config['seed']}")
    updated = [row for row in rows if row.get("cov_mean") is not None]
    if not updated:
        print("  no update was made: it stopped early, or in every group all were right, or all were wrong")
        return
    if config["method"] in LAWFUL:
        report_law(*law_points(rows))
    else:
        print(f"  no law: the paper claims Eq. 6 where nothing intervenes, so here for {', '.join(LAWFUL)}")
    report_covariance(updated)
    for line in whole_lines(Path(run, "samples.jsonl"))[-2:]:
        sample = json.loads(line)
        problem = printable(problem_text(sample["problem"]))
        print(f"  sample: {problem} -> {printable(sample['response'])[:400]} "
              f"(answer {printable(sample['answer'])}, reward {sample['reward']:.0f})")

def report_law(entropy, accuracy):
    """The law (Eq. 6), its prediction (Fig. 5), and how early the entropy is spent (Fig. 2)."""
    n = len(entropy)
    if n < 10 or len(set(entropy[:3])) < 2:
        print(f"  no law: it needs ten evaluations, of different entropies; here are {n} (see --eval-every)")
        return
    law = fit_entropy_law(entropy, accuracy)
    print(f"  law (Eq. 6): R = -a exp(H) + b, a {law.a:.4f}, b {law.b:.4f}, ceiling b - a {law.ceiling:.3f}; "
          f"R2 {law.r2:.3f}, RMSE {law.rmse:.4f} on {n} points")
    for first in sorted({max(3, round(0.15 * n)), round(n / 3)}):  # 15 % as in the paper, and a third
        early = fit_entropy_law(entropy[:first], accuracy[:first])
        errors = early.predict(entropy) - torch.tensor(accuracy, dtype=torch.float64)
        rmse = errors[first:].square().mean().sqrt()
        print(f"  prediction (Fig. 5) from the first {first} points: RMSE {rmse:.4f} over the rest, "
              f"{errors[-1]:+.4f} at the last")
    if accuracy[-1] > accuracy[0] and entropy[-1] < entropy[0]:
        for share, name in [(1 / 12, "1/12"), (1 / 3, "1/3")]:
            at = max(1, round(share * (n - 1)))
            spent = (entropy[at] - entropy[0]) / (entropy[-1] - entropy[0])
            gained = (accuracy[at] - accuracy[0]) / (accuracy[-1] - accuracy[0])
            print(f"  after {name} of the run (Fig. 2): {spent:.0%} of the entropy, {gained:.0%} of the gain")

def report_covariance(updated):
    """Table 1 in the first step and the last tenth, the quadrants, and the tokens selected most."""
    tenth = updated[-max(1, len(updated) // 10):]
    for name, part in [("first step", updated[:1]), ("last tenth", tenth)]:
        shown = [f"top {p:g} % {mean([row[f'cov_top_{p:g}'] for row in part]):.3f}" for p in COV_TOP]
        shown.append(f"all {mean([row['cov_mean'] for row in part]):.3f}")
        print(f"  Cov (Table 1), {name}: {', '.join(shown)}")
    selected = sum(row["selected_tokens"] for row in updated)
    print(f"  {'advantage A, log-probability p above (+) or below (-) the mean':66}" + "   ".join(QUADRANTS))
    for name, key, total in [("share of the tokens", "quadrant_tokens", len(updated)),
                             ("part of the mean Cov", "quadrant_cov", len(updated)),
                             ("share of the selected", "quadrant_selected", max(1, selected))]:
        values = [sum(row[key][q] for row in updated) / total for q in range(4)]
        print(f"    {name:60}" + "".join(f"{value:8.3f}" for value in values))
    most = Counter()
    for row in updated:
        most.update(row["most_selected"])
    if most:
        shown = [f"{printable(token)} {count}" for token, count in most.most_common(10)]
        print(f"  selected most: {', '.join(shown)}")

def draw(groups, path):
    """Four panels: entropy, accuracy, the law, the covariance. Of a group its mean and range over seeds."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: it needs matplotlib (pip install matplotlib)")
        return
    alone = sum(len(members) for members in groups.values()) == 1
    figure = Figure((10, 7), layout="constrained")
    axes = figure.subplots(2, 2).flatten()
    for number, (label, members) in enumerate(groups.items()):
        color = f"C{number}"
        logs = [rows for _, rows in members]
        draw_range(axes[0], logs, "entropy", color, label)
        draw_range(axes[1], logs, "eval_avg", color, label)
        draw_law(axes[2], members, color, label)
        draw_range(axes[3], logs, "cov_mean", color, label)
        if alone:  # Table 1's quantiles too
            for shade, percent in enumerate(COV_TOP):
                draw_range(axes[3], logs, f"cov_top_{percent:g}", f"C{shade + 1}", f"top {percent:g} %")

    axes[0].set(title="Policy entropy (Eq. 5)", xlabel="rollout step", ylabel="nats per token", yscale="log")
    axes[1].set(title="Held-out accuracy", xlabel="rollout step", ylabel="avg@k")
    axes[2].set(title="The law R = -a exp(H) + b (Eq. 6)", xlabel="entropy (nats per token)", ylabel="avg@k")
    axes[3].set(title="Covariance (Eq. 10)", xlabel="rollout step", ylabel="mean Cov")
    if alone:
        axes[3].set_yscale("symlog", linthresh=0.01)  # nearly a logarithm, but a mean Cov may be negative
    for axis in axes:
        axis.grid(alpha=0.25)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    print(f"picture: {path}")

def draw_law(axis, members, color, label):
    """The points of Eq. 6, and a line through ten or more where the law is claimed."""
    rows = []
    for _, log in members:
        rows += log
    entropy, accuracy = law_points(rows)
    axis.plot(entropy, accuracy, ".", color=color, alpha=0.6)
    claimed = members[0][0]["method"] in LAWFUL
    if claimed and len(set(entropy)) >= 10 and max(accuracy) > min(accuracy):
        law = fit_entropy_law(entropy, accuracy)
        grid = torch.linspace(min(entropy), max(entropy), 50)
        axis.plot(grid, law.predict(grid), color=color, label=f"{label}: R² {law.r2:.2f}")

def draw_range(axis, logs, key, color, label):
    """The mean of a key over logs and the range between them, at the steps that all of them have."""
    found = [known(rows, key) for rows in logs]
    steps = sorted(set.intersection(*[set(values) for values in found]))
    values = torch.tensor([[log[step] for step in steps] for log in found])           # [logs, steps]
    axis.plot(steps, values.mean(dim=0), color=color, label=label, linewidth=1.3)
    if len(logs) > 1:
        axis.fill_between(steps, values.amin(dim=0), values.amax(dim=0), color=color, alpha=0.15, linewidth=0)

def compare(given):
    """Table 2 and Fig. 11 in small: every method on every seed; then the table and the picture."""
    out = given.get("out") or "runs"
    seeds = str(given.get("seeds") or given.get("seed", 0)).split(",")
    check(all(seed.isdecimal() for seed in seeds), f"--seeds {given.get('seeds')}: give numbers, as in 0,1,2")
    check("method" not in given, "--compare takes the methods itself: --compare grpo kl_cov")
    configs = []
    for seed in dict.fromkeys(map(int, seeds)):
        for method in dict.fromkeys(given["compare"] or METHODS):
            run = {"method": method, "seed": seed, "out": f"{out}/{method}-seed{seed}", "resume": True}
            configs.append(Config(**{**given, **run}))  # what is done or begun already is not done again
    for number, config in enumerate(configs):
        print(f"[{number + 1}/{len(configs)}] {config.out}", flush=True)
        train(config)
    show_together([config.out for config in configs], Path(out, "comparison.png"))


# -----------------------------------------------------------------------------
# 10. Command line

def printable(text):
    """A text with line ends and control characters escaped, safe to show on a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

class Parser(argparse.ArgumentParser):
    """A wrong flag ends like any other mistake of the user."""

    def error(self, message):
        raise UserError(message)

# In the text of Config: a heading, or a setting and its comment.
SETTING = r"^    (?:# (.*)|(\w+): .*?(?:  # (.*))?)$"

def parse(arguments):
    """The flags that were given, as settings; where --model is given, laid over REAL_MODEL."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for heading, name, comment in re.findall(SETTING, inspect.getsource(Config), re.M):
        if heading:
            group = parser.add_argument_group(heading)
            continue
        default = getattr(Config, name)
        kind = Config.__annotations__[name]
        options = {"help": comment.replace("%", "%%")}
        if default not in (None, "") and default is not False:
            options["help"] += f" [{default}]"
        if name in REAL_MODEL:
            options["help"] += f" [real model: {REAL_MODEL[name]}]"
        if kind is bool:
            options["action"] = "store_true"
        elif kind is list:
            options["nargs"] = "*"
        else:
            options["type"] = kind
            options["metavar"] = "|".join(CHOICES.get(name, [])) or None
        group.add_argument(flag(name), **options)
    given = vars(parser.parse_args(arguments))
    if given.get("model", "tiny") != "tiny":
        return {**REAL_MODEL, **given}
    return given

def run_mode(given):
    """Do what the flags say."""
    config = Config(**given)
    if config.check_theory:
        check_theory()
    elif config.compare is not None:
        compare(given)
    elif config.eval_only:
        policy, _, held_out = prepare(config)
        print(json.dumps({"eval_problems": len(held_out), **evaluate(config, policy, held_out)[0]}, indent=1))
    else:
        runs = config.report
        if runs is None:
            train(config)
            runs = [config.out]
        check(runs, "--report: give one or more run folders")
        for run in runs:
            report(run)
        picture = Path(runs[0], "report.png")
        if len(runs) > 1:
            picture = Path(runs[0]).parent / "comparison.png"
        show_together(runs, picture)

def main(arguments=None):
    """The command line; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not in a notebook
            stream.reconfigure(errors="replace")  # for a terminal without UTF-8
    transformers.utils.logging.disable_progress_bar()
    for library in ("transformers", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # their lines would stand before ours
    try:
        run_mode(parse(arguments))
        print(end="", flush=True)  # a closed pipe is noticed here
        return 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the output went into a pipe that was closed, as of `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, OSError) as error:
        message = str(error)
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        message = "out of memory: lower --micro-batch (updates), or --prompts or --max-new-tokens (sampling)"
    print(f"entropy_rl.py: {printable(message)}", file=sys.stderr)
    return 2

if __name__ == "__main__":
    sys.exit(main())
