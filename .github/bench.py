"""The measurements of BENCH.md:

    python .github/bench.py trl                 # rollout steps against TRL's trainer
    python .github/bench.py generate            # sampling against model.generate
    python .github/bench.py shape 0.5B [FLAGS]  # a step of a random policy of Qwen2.5's shape (or 1.5B)
    python .github/bench.py memory 0.5B [FLAGS] # its memory, without sampling
    python .github/bench.py verifier [PAIRS]    # rows {"text", "gold", "label"}; by default blind_pairs.jsonl
    python .github/bench.py peers               # losses, gradients, advantages against verl's own functions

FLAGS are entropy_rl.py's. They need trl==1.16.0, math-verify==0.9.0, and verl==0.9.1: `pip install --no-deps verl`
and ray tensordict codetiming hydra-core orjson.
"""
import contextlib
import itertools
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.append(str(Path(__file__).parent.parent))
import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2Config, Qwen2ForCausalLM

import entropy_rl as er


def cheap_reward(text, gold=None):
    """A reward that costs nothing: 1 for a third of all texts."""
    return float(sum(map(ord, text)) % 3 == 0)


def random_text(expression, rng, brief):
    """A string of random length, median 9, with a long tail."""
    length = min(47, int(rng.lognormvariate(2.2, 0.8)) + 1)
    return "".join(rng.choices("0123456789=+-*", k=length))


def long_policy(folder):
    """The folder of a policy of the built-in shape that has learned to write such texts."""
    model, tokenizer = er.tiny_policy(0)
    crowd_solution = er.crowd_solution
    er.crowd_solution = random_text
    er.imitate(model, tokenizer, seed=1, steps=250)
    er.crowd_solution = crowd_solution
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def left_pad(prompts, value):
    """Lists of token ids -> [P, L], the short ones padded on the left."""
    return pad_sequence([torch.tensor(ids) for ids in prompts], True, value, "left")


def prepare(model):
    """GRPO at the default sizes on a policy that does not change."""
    er.math_reward = cheap_reward
    config = er.Config(method="grpo", model=model, lr=1e-9)
    policy, problems, _ = er.prepare(config)
    return config, policy, problems


def step_here(config, policy, problems, steps):
    """Median seconds of a rollout step."""
    optimizer = torch.optim.AdamW(policy.model.parameters(), config.lr, fused=True)
    rows = [er.rollout_step(config, policy, None, optimizer, problems, step) for step in range(1, steps + 1)]
    return median(row["seconds"] for row in rows)


def step_of_trl(policy, problems, steps):
    """The same of TRL, on the same policy, problems, reward and sizes."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    times = []

    def reward(completions, **more):  # called once a rollout
        times.append(time.perf_counter())
        return list(map(cheap_reward, completions))

    policy.tokenizer.padding_side = "left"
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        settings = GRPOConfig(
            folder, per_device_train_batch_size=128, steps_per_generation=4, num_generations=8,
            max_completion_length=48, learning_rate=1e-9, max_steps=4 * (steps + 2), use_cpu=True, bf16=False,
            gradient_checkpointing=False, logging_strategy="no", disable_tqdm=True)
        GRPOTrainer(model=policy.model, reward_funcs=reward, args=settings, processing_class=policy.tokenizer,
                    train_dataset=Dataset.from_list([{"prompt": p["problem"]} for p in problems])).train()
    return median(end - start for start, end in zip(times[1:], times[2:]))  # the first warms up


def trl(rounds=5, steps=4):
    """Rollout steps here and TRL's in turn."""
    with tempfile.TemporaryDirectory() as folder:
        for kind, model in [("short", "tiny"), ("long", long_policy(folder))]:
            config, policy, problems = prepare(model)
            for _ in range(rounds):
                here = step_here(config, policy, problems, steps)
                there = step_of_trl(er.load_policy(config), problems, steps)
                print(f"{kind} answers: here {here:.3f} s, TRL {there:.3f} s, ratio {there / here:.2f}")


def generate(rounds=8, longest=128):
    """64 prompts of 8 responses by sample_rollouts and by model.generate in turn."""
    with tempfile.TemporaryDirectory() as folder:
        _, policy, problems = prepare(long_policy(folder))
    prompts = [problem["prompt_ids"] for problem in problems[:64]]
    ids = left_pad(prompts, 0)
    for seed in range(rounds):
        start = time.perf_counter()
        er.sample_rollouts(policy.model, prompts, group_size=8, max_new_tokens=longest, temperature=1.0,
                           eos_token_ids=[1], pad_token_id=0, generator=er.seeded("cpu", seed))
        middle = time.perf_counter()
        policy.model.generate(ids, attention_mask=(ids > 0).long(), do_sample=True, num_return_sequences=8,
                              max_new_tokens=longest)
        end = time.perf_counter()
        here = middle - start
        there = end - middle
        print(f"here {here:.3f} s, generate {there:.3f} s, ratio {there / here:.2f}")


SHAPES = {  # of Qwen2.5: width, feed-forward width, layers, heads, tied embeddings
    "0.5B": (896, 4864, 24, 14, True),
    "1.5B": (1536, 8960, 28, 12, True),
}


def random_policy(size):
    """A random policy of a shape of Qwen2.5, with the built-in tokenizer."""
    width, inner, layers, heads, tied = SHAPES[size]
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=151_936, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=2, tie_word_embeddings=tied))
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return er.Policy(model, er.tiny_policy(0)[1], end_ids=[1], stop_ids=[1], stop="")


def shape(size, *flags):
    """One update, prompts of 100 tokens, responses that hardly ever stop early; bf16 products on a CPU too."""
    rewards = itertools.cycle([0.0, 1.0])
    er.math_reward = lambda text, gold: next(rewards)
    er.mixed_precision = lambda device: torch.autocast(device.type, torch.bfloat16)
    er.load_policy = lambda config: random_policy(size)
    er.save_checkpoint = lambda *given: None
    with tempfile.TemporaryDirectory() as folder:
        given = er.parse(["--model", size, "--data", "arithmetic", "--prompt-template", "0" * 94 + "{problem}",
                          "--steps", "1", "--eval-every", "0", "--out", folder, *flags])
        before, row = er.train(er.Config(**given))
    print(f"{row['tokens']} tokens in {row['seconds']:.1f} s, of which sampling {row['sampling_seconds']:.1f} s; "
          f"peak {row['peak_memory_mb']:.0f} MB, before the update {before['peak_memory_mb']:.0f} MB")


def memory(size, *flags):
    """The same without the time of sampling: all responses are sevens."""

    def sevens(model, prompts, *, group_size, max_new_tokens, **sampling):
        prompt_ids = left_pad(prompts, 9).repeat_interleave(group_size, dim=0)  # [N, L]
        ids = pad(prompt_ids, (0, max_new_tokens), value=9).to(model.device)  # [N, L+T]
        zeros = torch.zeros(len(ids), max_new_tokens, device=model.device)  # [N, T]
        return er.Rollouts(ids, torch.ones_like(ids), zeros == 0, zeros, zeros)

    er.sample_rollouts = sevens
    shape(size, *flags)


def verifier(path=Path(__file__).with_name("blind_pairs.jsonl")):
    """How often the verifier (and math-verify, where it is installed) is wrong on labelled pairs, and the speed."""
    rows = [json.loads(line) for line in open(path)]
    judges = {"here": er.math_reward}
    try:
        from math_verify import parse, verify
        judges["math-verify"] = lambda text, gold: verify(parse(f"${gold}$"), parse(text))
    except ImportError:
        print("math-verify is not installed: no line for it")
    for name, judge in judges.items():
        start = time.perf_counter()
        verdicts = [bool(judge(row["text"], row["gold"])) for row in rows]
        print(f"{name}: {len(rows) / (time.perf_counter() - start):.0f} pairs/s")
        for label in [True, False]:
            errors = [verdict != label for verdict, row in zip(verdicts, rows) if row["label"] == label]
            print(f"  wrong on {sum(errors)} of {len(errors)} pairs labelled {label}, {sum(errors) / len(errors):.2%}")


def random_mini_batch(seed):
    """Rewards [N], log-probabilities before and after some updates and mask, [N, T] each; and G."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    G = rng.randint(2, 8)
    N = G * rng.randint(2, 16)
    T = rng.randint(4, 64)
    rewards = (torch.rand(N) < rng.uniform(0.2, 0.8)).double()
    rewards[::G] = 1  # no group is all right or all wrong, for an update leaves those out
    rewards[1::G] = 0
    old = -rng.uniform(0.5, 3) * torch.randn(N, T, dtype=torch.float64).abs()
    new = old * (rng.uniform(0, 0.5) * torch.randn(N, T, dtype=torch.float64)).exp()
    return rewards, old, new, torch.arange(T) < torch.randint(1, T + 1, (N, 1)), G


def loss_gap(method, name, seed):
    """How far loss and gradient are from verl's, under random settings."""
    from verl.trainer.ppo import core_algos
    from verl.workers.config import PolicyLossConfig
    rng = random.Random(seed)
    config = er.Config(
        method=method, clip_low=rng.choice([0.2, 1.0]), clip_high=rng.choice([0.28, 1.0]), clip_cov_low=0.5,
        clip_cov_ratio=rng.choice([2e-4, 0.01, 0.5]), kl_cov_fraction=rng.choice([2e-4, 0.02, 0.2]))
    selection = PolicyLossConfig(
        clip_cov_ratio=config.clip_cov_ratio, clip_cov_lb=config.clip_cov_low, clip_cov_ub=config.clip_cov_high,
        kl_cov_ratio=config.kl_cov_fraction, ppo_kl_coef=config.kl_cov_coef)
    verl_config = core_algos.ActorConfig(
        strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, clip_ratio_low=config.clip_low,
        clip_ratio_high=config.clip_high, clip_ratio_c=1e9, policy_loss=selection)  # 1e9: no third clip
    rewards, old, new, mask, G = random_mini_batch(seed)
    advantages = er.group_advantages(rewards, G)

    ours = new.clone().requires_grad_()
    loss = er.policy_loss(config, ours, old, advantages, mask, torch.Generator().manual_seed(seed))
    loss.backward()
    theirs = new.clone().requires_grad_()
    torch.manual_seed(seed)  # Clip-Cov picks by the global generator there: the same state, the same pick
    verl_loss, _ = core_algos.get_policy_loss_fn(name)(
        old, theirs, advantages[:, None] * mask, mask.long(), "token-mean", verl_config)
    verl_loss.backward()
    return max((loss - verl_loss).abs(), (ours.grad - theirs.grad).abs().max()).item()


def advantage_gap(estimator, name, seed):
    """How far advantages are from verl's."""
    from verl.trainer.ppo import core_algos
    rewards, _, _, mask, G = random_mini_batch(seed)
    ours = er.group_advantages(rewards, G, estimator)
    last = torch.arange(mask.shape[1]) == mask.sum(1, keepdim=True) - 1  # [N, T], where verl has rewards
    groups = (torch.arange(len(mask)) // G).numpy()
    theirs, _ = core_algos.get_adv_estimator_fn(name)(
        rewards[:, None] * last, mask.long(), index=groups, config=core_algos.AlgoConfig())
    return (ours[:, None] * mask - theirs).abs().max().item()


def peers(count=200):
    """The largest differences from verl on random mini-batches in float64."""
    cases = [(loss_gap, "grpo", "vanilla"), (loss_gap, "clip_cov", "clip_cov"), (loss_gap, "kl_cov", "kl_cov"),
             (advantage_gap, "grpo", "grpo"), (advantage_gap, "rloo", "rloo"),
             (advantage_gap, "reinforce_pp", "reinforce_plus_plus")]
    for gap, ours, theirs in cases:
        gaps = [gap(ours, theirs, seed) for seed in range(count)]
        print(f"{gap.__name__} {ours}: {max(gaps):.1e}, median {median(gaps):.1e}")
        if max(gaps) > 1e-9 and ours != "reinforce_pp":  # which differs on purpose, see group_advantages
            sys.exit("too far from verl")


if __name__ == "__main__":
    commands = {command.__name__: command for command in [trl, generate, shape, memory, verifier, peers]}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    commands[sys.argv[1]](*sys.argv[2:])
