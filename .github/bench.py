"""The measurements of the README's sections on speed, memory and the verifier, each a command:

    python .github/bench.py trl                    # rollout steps against TRL's trainer (pip install trl==1.16.0)
    python .github/bench.py generate               # sampling against model.generate: time and lengths
    python .github/bench.py growth                 # a rollout step by responses and by tokens
    python .github/bench.py shape 0.5B [FLAGS]     # a rollout step of a random policy of Qwen2.5's shape: speed, memory
    python .github/bench.py memory 0.5B [FLAGS]    # its update alone, on random tokens: memory
    python .github/bench.py verifier [PAIRS]       # rows {"text", "gold", "label"}, by default the tests' tables
                                                   # (pip install math-verify==0.9.0 for its line)
"""
import contextlib
import itertools
import json
import logging
import os
import random
import re
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
import transformers
from transformers import Qwen2Config, Qwen2ForCausalLM

import entropy_rl as er

transformers.utils.logging.disable_progress_bar()

SHAPES = {  # of Qwen2.5: width, feed-forward width, layers, heads, key-value heads, tied embeddings
    "0.5B": (896, 4864, 24, 14, 2, True), "1.5B": (1536, 8960, 28, 12, 2, True)}


class Steps:
    """Rollout steps of GRPO on a built-in policy that does not learn (lr 1e-9), with a reward that costs nothing."""
    def __init__(self, model="tiny", **settings):
        self.config = er.Config(**dict(method="grpo", model=model, max_new_tokens=48, lr=1e-9, micro_batch=0, updates=4,
                                       prompt_template="{problem}") | settings)
        self.policy, _, self.problems = er.prepare(self.config, train=True)
        self.optimizer = torch.optim.AdamW(self.policy.model.parameters(), lr=1e-9, weight_decay=0.0, fused=True)
        self.step = itertools.count(1)
        er.math_reward = self.reward

    @staticmethod
    def reward(text, gold=None):
        return float(sum(map(ord, text)) % 3 == 0)

    def rows(self, count):
        return [er.rollout_step(self.config, self.policy, None, self.optimizer, self.problems, next(self.step))
                for _ in range(count)]


def seconds(rows):
    return statistics.median(row["seconds"] for row in rows)


def long_policy(folder):
    """The built-in policy, taught to write strings of random length: median 9, a long tail."""
    model, tokenizer = er.tiny_policy(64)
    rng, problems = random.Random(1), er.arithmetic_problems("train", 4096)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(250):
        batch = rng.choices(problems, k=64)
        texts = ["".join(rng.choice("0123456789=+-*") for _ in range(min(47, int(rng.lognormvariate(2.2, 0.8)) + 1)))
                 for _ in batch]
        prompts = er.left_pad([tokenizer(p["problem"]).input_ids for p in batch], 0)
        responses = er.left_pad([[1] + tokenizer(text).input_ids[::-1] for text in texts], 0).flip(1)
        ids = torch.cat([prompts, responses], 1)
        logprobs, _ = er.response_logprobs(model, ids, (ids != 0).long(), responses.shape[1], with_entropy=False)
        (-logprobs.sum() / (responses != 0).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trl_seconds(ours, steps, folder):
    """The median time of TRL's rollout steps on the same policy, problems, reward and sizes, and its mean length."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    warnings.filterwarnings("ignore")
    import datasets
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    times, lengths, policy = [], [], er.load_policy(ours.config)

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            times.append(time.perf_counter())

    def reward(completions, completion_ids, **_):
        lengths.extend(map(len, completion_ids))
        return [ours.reward(text) for text in completions]

    policy.tokenizer.padding_side = "left"
    arguments = GRPOConfig(
        output_dir=folder, per_device_train_batch_size=128, steps_per_generation=4, num_generations=8, beta=0.0,
        max_completion_length=48, temperature=1.0, learning_rate=1e-9, lr_scheduler_type="constant", weight_decay=0.0,
        max_steps=4 * (steps + 3), use_cpu=True, bf16=False, gradient_checkpointing=False, dataloader_pin_memory=False,
        report_to=[], logging_steps=10_000, save_strategy="no", disable_tqdm=True, log_completions=False)
    GRPOTrainer(model=policy.model, reward_funcs=reward, args=arguments, processing_class=policy.tokenizer,
                train_dataset=datasets.Dataset.from_list([dict(prompt=p["problem"]) for p in ours.problems]),
                callbacks=[Clock()]).train()
    ends = times[3::4]                      # four optimizer steps a rollout; the first rollouts warm up
    return statistics.median(b - a for a, b in zip(ends[1:], ends[2:])), statistics.fmean(lengths)


def trl(steps=12):
    with tempfile.TemporaryDirectory() as folder:
        for kind, model in (("short", "tiny"), ("long", long_policy(f"{folder}/long"))):
            ours = Steps(model)
            ours.rows(3)
            before = ours.rows(steps)
            theirs, length = trl_seconds(ours, steps, folder)
            mine = seconds(before + ours.rows(steps))
            print(f"{kind} answers, {statistics.fmean(r['response_length'] for r in before):.1f} tokens: here {mine:.3f} "
                  f"s, TRL {theirs:.3f} s ({length:.1f} tokens), ratio {theirs / mine:.2f}")


def generate(rounds=8):
    with tempfile.TemporaryDirectory() as folder:
        ours = Steps(long_policy(folder))
    model, prompts = ours.policy.model, [p["ids"] for p in ours.problems[:64]]
    ids, times, lengths = er.left_pad(prompts, 0), ([], []), ([], [])
    for seed in range(rounds):
        begun = time.perf_counter()
        rollouts = er.sample_rollouts(model, prompts, group_size=8, max_new_tokens=128, temperature=1.0,
                                      eos_token_ids=[1], pad_token_id=0, generator=torch.Generator().manual_seed(seed))
        middle = time.perf_counter()
        torch.manual_seed(seed)
        with torch.no_grad():
            found = model.generate(ids, attention_mask=(ids != 0).long(), do_sample=True, num_return_sequences=8, top_k=0,
                                   top_p=1.0, temperature=1.0, max_new_tokens=128, pad_token_id=0, eos_token_id=1)
        times[0].append(middle - begun)
        times[1].append(time.perf_counter() - middle)
        stopped = (found[:, ids.shape[1]:] == 1).long()
        lengths[0].append(rollouts.response_mask.sum(1))
        lengths[1].append((stopped.cumsum(1) == stopped).sum(1))
    here, there = map(statistics.median, times)
    a, b = map(torch.cat, lengths)
    at = torch.arange(130)[:, None]
    distance = ((a <= at).float().mean(1) - (b <= at).float().mean(1)).abs().max()
    print(f"here {here:.3f} s, generate {there:.3f} s, ratio {there / here:.2f}; {len(a)} lengths a side, median "
          f"{a.median()} and {b.median()}, up to {a.max()} and {b.max()}, Kolmogorov-Smirnov distance {distance:.3f}")


def growth():
    sample = er.sample_rollouts
    er.sample_rollouts = lambda *a, **k: sample(*a, **k | dict(eos_token_ids=[999]))    # nothing stops
    for what, cases in (("responses a prompt", [(g, 16) for g in (4, 8, 16, 32)]),
                        ("tokens a response", [(8, t) for t in (16, 32, 64, 128)])):
        found = [seconds(Steps(group_size=g, max_new_tokens=t).rows(5)[1:]) for g, t in cases]
        print(f"{what} {[g if what[0] == 'r' else t for g, t in cases]}: {[round(x, 2) for x in found]} s a rollout step")


def shape(size, *flags):
    """One update of a random policy, every second response rewarded; nothing stops, so every response has full length.
    On a CPU the products are bf16 as on a GPU, for the sake of the memory."""
    width, inner, layers, heads, kv_heads, tied = SHAPES[size]
    rewards, autocast = itertools.cycle((0.0, 1.0)), torch.autocast
    er.math_reward = lambda text, gold: next(rewards)
    torch.autocast = lambda *ours, **more: autocast(*ours, **more | (dict(enabled=True) if ours else {}))
    with tempfile.TemporaryDirectory() as folder:
        _, tokenizer = er.tiny_policy(16)
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(
            vocab_size=151_936, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied, rope_theta=1e6,
            max_position_embeddings=32_768, pad_token_id=0, eos_token_id=1, bos_token_id=None))
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
        model.save_pretrained(f"{folder}/policy")
        tokenizer.save_pretrained(f"{folder}/policy")
        del model
        with open(f"{folder}/data.jsonl", "w") as file:
            for number in range(1000):
                file.write(json.dumps(dict(problem=f"{number:0100d}", answer="0")) + "\n")
        config = er.Config(**dict(model=f"{folder}/policy", data=f"{folder}/data.jsonl", prompt_template="{problem}",
                                  steps=1, eval_every=0, checkpoint_every=1000, out=f"{folder}/run") | er.parse(flags))
        row = er.train(config)[1]
    print({key: row[key] for key in ("tokens", "sampling_seconds", "update_seconds", "tokens_per_second",
                                     "peak_memory_mb", "clip_fraction", "approx_kl")})


def memory(size, *flags):
    """The same update on random tokens in the place of sampled ones: its memory without the time of sampling."""
    def random_tokens(model, prompts, *, group_size, max_new_tokens, **sampling):
        length, count = len(prompts[0]), len(prompts) * group_size
        ids = torch.randint(2, 20, (count, length + max_new_tokens), generator=torch.Generator().manual_seed(0))
        ids[:, :length] = torch.tensor(prompts).repeat_interleave(group_size, 0)
        ids, shape = ids.to(model.device), (count, max_new_tokens)
        mask, zeros = torch.ones(shape, dtype=torch.bool, device=model.device), torch.zeros(shape, device=model.device)
        return er.Rollouts(ids, torch.ones_like(ids), mask, zeros, zeros)

    er.sample_rollouts = random_tokens
    shape(size, *flags)


def verifier(path=None):
    if path:
        rows = [json.loads(line) for line in open(path)]
    else:
        from test_entropy_rl import ANSWERS
        rows = [dict(text=rf"The answer is $\boxed{{{answer}}}$.", gold=gold, label=label)
                for cases in ANSWERS.values() for answer, gold, label in cases]

    def normalised(text):
        return re.sub(r"\s|\$|\\left|\\right|\\text|\\[,!]", "", text)

    verifiers = {"this file": er.math_reward,
                 "spaces removed": lambda text, gold: normalised(er.extract_answer(text) or "") == normalised(gold)}
    with contextlib.suppress(ImportError):
        import math_verify
        logging.disable(logging.CRITICAL)
        verifiers["math-verify"] = lambda text, gold: math_verify.verify(
            math_verify.parse(f"${gold}$"), math_verify.parse(text))
    for name, judge in verifiers.items():
        begun = time.perf_counter()
        verdicts = [bool(judge(row["text"], row["gold"])) for row in rows]
        speed = len(rows) / (time.perf_counter() - begun)
        for label, wrong in ((True, "true ones refused"), (False, "false ones accepted")):
            group = [verdict == label for verdict, row in zip(verdicts, rows) if row["label"] == label]
            print(f"{name}: {wrong}: {1 - sum(group) / len(group):.2%} of {len(group)}; {speed:.0f} pairs/s")


if __name__ == "__main__":
    what = dict(trl=trl, generate=generate, growth=growth, shape=shape, memory=memory, verifier=verifier)
    if len(sys.argv) < 2 or sys.argv[1] not in what:
        sys.exit(__doc__)
    what[sys.argv[1]](*sys.argv[2:])
