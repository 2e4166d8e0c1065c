"""The entropy mechanism of reinforcement learning for reasoning language models, in one file.

    python entropy_rl.py --method kl_cov                  # warm up, train, evaluate, draw: minutes on a laptop CPU
    python entropy_rl.py --compare --seeds 0,1,2 --out runs/compare     # all seven methods from the same start
    python entropy_rl.py --report runs/kl_cov-seed0       # the law, the prediction and the covariance, from the log
    python entropy_rl.py --check-theory                   # Theorems 1 and 2, in seconds
    python entropy_rl.py --model Qwen/Qwen2.5-0.5B --data openai/gsm8k --method kl_cov    # the hub, a GPU

The paper is Cui et al., arXiv 2505.22617. The file reads in its order:

    1  Settings                            Config
    2  The reward: a verifier (2.1)        extract_answer, answers_match, math_reward
    3  Problems, and the built-in policy   load_problems, warm_up, load_policy
    4  Rollouts (2.1)                      sample_rollouts, response_logprobs (Eq. 5)
    5  Advantages (Eq. 3)                  group_advantages
    6  Covariance and losses (4.2)         token_covariance (Eq. 10), select_tokens (Eq. 11, 13),
                                           token_losses (Eq. 4, 12, 14), policy_loss
    7  Training and evaluation             evaluate, update, train
    8  The law and the theorems (2.4, 3)   fit_entropy_law (Eq. 6), tabular_entropy_change (Theorems 1, 2)
    9  Reports and pictures                report, draw, compare
   10  Command line                        main

The paper's mathematics is in sections 4 to 6 and 8; section 2 can wait for a second reading.

Shapes: N responses, T response tokens, P prompts, G responses a prompt (N = P G), V vocabulary, M tokens of a batch.
A rollout is one batch of responses; a mini-batch is one optimizer step; a micro-batch is one forward pass.
"""
from __future__ import annotations

import argparse
import cmath
import contextlib
import copy
import glob
import hashlib
import json
import logging
import math
import operator
import os
import random
import re
import signal
import sys
import tempfile
import time
import unicodedata
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from functools import lru_cache
from html.entities import html5
from pathlib import Path
from statistics import fmean

import torch
import transformers
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config,
                          Qwen2ForCausalLM)
from transformers.cache_utils import Cache, DynamicLayer

try:
    import resource
except ImportError:  # on Windows: no peak memory in the log there
    resource = None

SOURCE = Path(__file__).read_text("utf-8")  # as imported: the file may be edited while a run goes on


class UserError(Exception):
    """Something that the user can mend: shown as one line, exit status 2."""


def demand(holds, message: str):
    """Raise UserError with the message where something that a user has to see to does not hold."""
    if not holds:
        raise UserError(message)


# ---------------------------------------------------------------------------------------------------------------
# 1. Settings

METHODS = ("grpo", "clip_higher", "clip_cov", "kl_cov", "entropy_bonus", "ref_kl", "pg")
CLIP = {"clip_higher": (0.2, 0.28), "clip_cov": (1.0, 1.0)}  # else 0.2, 0.2; the authors' Clip-Cov clips to [0, 2]
TINY = {"tiny": 64} | {f"tiny-{width}": width for width in range(16, 1040, 16)}  # the built-in policies: width


def setting(default, help: str, choices=(), low=-1e18, high=1e18):
    """A field of Config with its help and bounds. A pair: the defaults of the built-in policy and of a real model."""
    return field(default=default, metadata=dict(help=help, choices=choices, low=low, high=high))


@dataclass
class Config:
    """Every setting of a run, and every flag of the command line. A wrong one raises UserError with one line."""
    method: str = setting("kl_cov", "what the update minimises (Sec. 4)", choices=METHODS)
    advantage: str = setting("grpo", "advantage estimator (Eq. 3, Fig. 6)", choices=("grpo", "rloo", "reinforce_pp"))
    model: str = setting("tiny", "tiny, tiny-WIDTH (built in, width 64; Fig. 7), or a Hugging Face id or folder")
    data: str = setting("arithmetic", "arithmetic[-dev] (built in), a data set id, a .jsonl .json .csv .parquet file")
    eval_data: str = setting("", "held-out problems, given as --data is (default: its test split, else a tenth)")
    prompt_template: str = setting("", "text with {problem} (default: arithmetic as it is; else the chat template)")

    steps: int = setting((400, 200), "rollout steps", low=1)
    prompts: int = setting(64, "prompts a rollout step (paper: 256)", low=1)
    group_size: int = setting(8, "G, responses a prompt (Sec. 4.3)", low=2)
    updates: int = setting((4, 8), "mini-batches (optimizer steps) a rollout (Sec. 4.3); divides --prompts", low=1)
    micro_batch: int = setting((0, 8), "responses in one forward; 0: the whole mini-batch", low=0)
    max_new_tokens: int = setting((48, 1024), "longest response, in tokens", low=1)
    temperature: float = setting(1.0, "of sampling and of the trained log-probabilities (Sec. 4.3)", low=1e-3)
    lr: float = setting((2e-4, 1e-6), "AdamW, constant (authors' code: 5e-7 for 7B, 1e-6 for 32B)", low=1e-12)
    seed: int = setting(0, "of sampling, data order and random picks", low=0)

    clip_low: float = setting(None, "PPO clip: ratio from 1 - this (Eq. 4; not pg, kl_cov) [0.2; clip_cov 1]", low=0)
    clip_high: float = setting(None, "ratio up to 1 + this [0.2; clip_higher 0.28, Sec. 4.3; clip_cov 1]", low=0)
    clip_cov_ratio: float = setting((0.01, 2e-4), "r, share of the tokens detached (Eq. 11, Fig. 12)", low=0, high=1)
    clip_cov_low: float = setting(1.0, "omega_low, covariance window (Sec. 4.3)")
    clip_cov_high: float = setting((20.0, 5.0), "omega_high (Sec. 4.3)")
    kl_cov_fraction: float = setting((0.1, 2e-3), "k, share penalised (Eq. 13; 7B 2e-3, 32B 2e-4)", low=0, high=1)
    kl_cov_coef: float = setting((2.0, 1.0), "beta, weight of the penalty (Eq. 14, Sec. 4.3, Fig. 12)", low=0)
    kl_estimator: str = setting("abs", "|d| (authors), d^2/2, e^d-1-d; d = log pi/pi_old", choices=("abs", "k2", "k3"))
    entropy_coef: float = setting((0.1, 5e-3), "alpha of entropy_bonus (Sec. 4.1, Fig. 9)", low=0)
    ref_kl_coef: float = setting((0.03, 1e-2), "beta of ref_kl (Sec. 4.1, Fig. 10)", low=0)

    eval_every: int = setting((10, 20), "rollout steps between evaluations; 0: never", low=0)
    eval_problems: int = setting((256, 200), "held-out problems", low=1, high=20_000)
    eval_samples: int = setting((8, 4), "k of avg@k and pass@k (paper: 32)", low=1)
    eval_temperature: float = setting(0.6, "sampling temperature of the evaluation (Sec. 4.3)", low=1e-3)
    gradient_checkpointing: bool = setting(False, "less memory, more time in updates")
    checkpoint_every: int = setting((1, 20), "rollout steps between checkpoints", low=1)
    probe: bool = setting(False, "measure the first-order change of entropy (Fig. 8); needs --updates 1")
    device: str = setting("auto", "auto (cuda, mps, cpu), or one by name")
    threads: int = setting(0, "CPU threads; 0: all", low=0, high=1024)
    out: str = setting("", "run folder (default runs/METHOD-seedSEED)")

    resume: bool = setting(False, "go on from the run folder's checkpoint; repeat all other flags")
    compare: bool = setting(False, "every method from the same start; goes on where it was stopped")
    seeds: str = setting("", "seeds of --compare, as in 0,1,2 (default: --seed)")
    report: list = setting(None, "no training: law, prediction, covariance, pictures from these run folders")
    check_theory: bool = setting(False, "no training: Theorems 1 and 2 on a tabular softmax policy")
    eval_only: bool = setting(False, "no training: evaluate --model")

    def __post_init__(self):
        below, above = CLIP.get(self.method, (0.2, 0.2))
        self.clip_low = below if self.clip_low is None else self.clip_low
        self.clip_high = above if self.clip_high is None else self.clip_high
        self.threads = self.threads or torch.get_num_threads()
        self.out = self.out or f"runs/{self.method}-seed{self.seed}"
        for f in fields(self):
            value, flag, meta = getattr(self, f.name), "--" + f.name.replace("_", "-"), f.metadata
            if isinstance(value, tuple):
                value = value[0 if self.model in TINY else 1]
                setattr(self, f.name, value)
            demand(value in (meta["choices"] or [value]), f"{flag} {value}: choose from {', '.join(meta['choices'])}")
            number, low, high = dict(int=int, float=(int, float)).get(f.type, object), meta["low"], meta["high"]
            demand(isinstance(value, number) and (number is object or low <= value <= high),
                   f"{flag} {value}: must be a number from {low} to {high}")
        demand(self.prompts % self.updates == 0, f"--updates {self.updates} does not divide --prompts {self.prompts}")
        demand(self.clip_cov_low < self.clip_cov_high,
               f"--clip-cov-low {self.clip_cov_low} must be below --clip-cov-high {self.clip_cov_high}")
        demand("{problem}" in (self.prompt_template or "{problem}"), "--prompt-template must contain {problem}")
        demand(self.compare or not self.seeds, "--seeds is for --compare; one run takes --seed")
        demand(self.updates == 1 or not self.probe, "--probe measures one optimizer step: add --updates 1")


def seeded(device, *key) -> torch.Generator:
    """A generator that is a function of its key, as (seed, step, "rollout"): a resumed run needs no random state."""
    return torch.Generator(device).manual_seed(int(hashlib.sha256(repr(key).encode()).hexdigest()[:14], 16))


def printable(text: str) -> str:
    """A text with control characters, line ends and lone surrogates escaped, safe to show on a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextlib.contextmanager
def explain(what: str, then: str = ""):
    """Any error of the system or a library inside, as a UserError: what it means, its cause, and what to do."""
    try:
        yield
    except Exception as error:  # whatever a reader of files raises
        lines = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{what} ({lines[0][:300]}){then}")


# ---------------------------------------------------------------------------------------------------------------
# 2. The reward: a verifier (Sec. 2.1)

def extract_answer(text):
    """The final answer of a response: the content of its last \\boxed{} or \\fbox{} with balanced braces, else of
    `\\boxed 7`, else the last line `#### n` (a unit may follow), else what follows the last "answer is" or "answer:",
    to the end of the sentence or line or to a reason (since, because, which; ", as"), else None. Only what comes after
    the last </think> and before an unclosed <think> counts. Its time is linear in the length."""
    ### BEGIN SOLUTION
    text = str(text).rpartition("</think>")[2].partition("<think>")[0][-300000:]
    box, opened = (0, 0), []
    for token in re.finditer(r"(?s)\\(?:boxed|fbox)\s*\{|\\.|[{}]", text):
        if token[0] == "}" and opened:
            box = max(box, (opened.pop(), token.start()))
        elif len(token[0]) != 2 and token[0] != "}":            # \{ and \} are text
            opened.append(token.end() if token[0] != "{" else 0)
    if box[0]:
        return text[slice(*box)].strip()
    for pattern in (r"\\(?:boxed|fbox)(?![A-Za-z])\s*([^\s${}]+)",
                    r"(?m)####([^A-Za-z#\n]*[0-9](?: [a-z]+)?[^\w#\n]*)$",
                    r"(?is)\A.*answer[*_ ]*(?:is\b|:)[ :*\n]*(.*?)"
                    r"(?:\.\s|\.?\Z|\n|[,;]? (?:since|because|which) |, as )"):
        if found := re.findall(pattern, text):
            return found[-1].lstrip(" *,;").rstrip(" *.,;") or None
    return None
    ### END SOLUTION


# Step 1: one plain notation, tokens parted by spaces: a comma joins answers ("and", "or", unions) and matrix rows,
# words and units stand in "quotes", other letters are names; 1⁄2 is a fraction of digits, 2_1/3 a mixed number.
_FUNCTIONS = {name: getattr(cmath, name.replace("arc", "a")) for name in "sin cos tan arcsin arccos arctan".split()}
_FUNCTIONS |= {"exp": cmath.exp, "ln": cmath.log, "log": cmath.log10, "abs": abs, "frac": 2, "binom": 2, "sqrt": 2}
_FUNCTIONS.update(secant=lambda z: 1 / cmath.cos(z), csc=lambda z: 1 / cmath.sin(z), cot=lambda z: 1 / cmath.tan(z))
_CONSTANTS = {"pi": math.pi, "e": math.e, "i": 1j, "°": math.pi / 180, "%": Fraction(1, 100)}
_NAME = "|".join([*_FUNCTIONS, "pi", "[A-Za-z]"])
_PLAIN = {spelling: plain for plain, spellings in {
    "": r"\left \right \big \Big \bigl \Bigl \Bigr \displaystyle \textstyle \angle \quad \mathbf \boldsymbol \bm "
        r"\bf \rm \underline \hat \vec \large \Large \therefore \, \: \; \! ~ $ \( \) \[ \]", "φ": "ϕ", "ε": "ϵ",
    "-": "− – negative", "*": r"\cdot × ·", "/": "÷ per", "^": "**", "=": "∈ is are", "≤": "<= ⩽", "≥": ">= ⩾",
    "≠": r"\neq !=", "frac": r"\dfrac \tfrac \cfrac", "…": r"\ldots \dots ...", "log": r"\lg", "secant": r"\sec",
    ",": r"∪ ⋃ ; and or \\", ":": "to", "(": "⟨", ")": "⟩",
    "°": r"\circ", "pi": "π", "sqrt": "√", "|": r"\lvert \rvert", "∞": r"\infty infinity", "binom": r"\dbinom \tbinom",
    '"overline"': r"\bar \dot", '"square"': "sq", '"%"': "% percent pct percentage", '"$"': r"\$ dollar", '"£"': "£",
    '"€"': "€ euro", '"cm"': "cm centimeter", '"m"': "meter", '"inch"': "in inche", '"foot"': "ft feet",
    '"pound"': "lb", '"s"': "second sec", '"minute"': "min", '"hour"': "hr", '"a" "m"': "am", '"p" "m"': "pm",
    '"mile" / "hour"': "mph", '"km" / "hour"': "kph", '"g"': "gram"}.items() for spelling in spellings.split()} | {
    word: f'"{word}"' for word in "mm km kg oz day yes no dne odd of the for at red cup".split()} | {
    w: str(n) for n, w in enumerate("zero one two three four five six seven eight nine ten eleven twelve".split())}
_REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"(?:\\\\\s*)?\\(begin|end) ?\{[pbBsmal]*(?:matrix|array)\}(?: ?\{[lcr|]*\})?", lambda it: "()"[it[1] == "end"]),
    (r"(?<=\\\\)\[ ?[0-9.]+ ?[a-z]{2} ?\]|(?<=\b[AaPp])\.(?=[Mm]\b)", ""),                # \\[4pt], p.m.
    (r"(?:, ?\\!|\{ ?, ?\}) ?(?=[0-9]{3})", ""),                                          # 1{,}234 and 1,\!234
    (r"_(?:\{(\w)\}(?![0-9])|([A-Za-z]))", r"_\1\2 "),                                    # x_{a} and x_ab
    (r"\{([^{}]*)\\over\b([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"\\l(floor|ceil)\b(.*?)\\r\1\b", lambda it: f"{'⌊⌈'[it[1] == 'ceil']} ({it[2]})"),
    (r"([⁻⁰¹²³⁴-⁹]+)|[¼-¾⅐-⅞]",                                                           # x⁻², ¾
     lambda it: ("^{%s}" if it[1] else " %s ") % unicodedata.normalize("NFKC", it[0])),
    (r"\\mathbb ?(?:R|\{R\})|\\text ?\{[Aa]ll reals?(?: numbers)?\}", "(-∞,∞)"),
    (r"\\(?:text|math|mbox|hbox|bold|operator)[a-z]* ?\{([^{}]*)\}",                      # \text{ cm.} is "cm"
     lambda box: re.sub(r"([^\W\d_]+)\.?", r'"\1"', box[1]) + " "),
    (r'"[^"]*"|\\?[A-Za-z]+|\\.|[<>]=|(?<= )!=|\*\*|\.\.\.|[^\sA-Za-z0-9_]', lambda match: _plain(match)),
    (r"\s+(_?)", lambda it: it[1] or " "),
    (r"\b(sin|cos|tan) ?\^ ?\{ ?- ?1 ?\}", r"arc\1 "),
    (r'^ ?(?:"(?:option|choice)" )?\(? ?"?([A-E])"? ?(?:\)(?: ?[\w.\\$-][^,A-Z"]*)?)?$', r"\1"),      # (C) 12
    (r'"(?:(square)|cubic)" ("[^"]*")', lambda unit: f"{unit[2]} ^ {2 if unit[1] else 3} "),   # square inches
    (r"([)\]]) ?U ?(?=[(\[])", r"\1,"),                                                   # [0,1) U (2,3]
    (r"\^ ?(?:°|\{ ?° ?\})", "°"),
    (r"\|([^|]*)\|", r" abs(\1)"),
    (r"(\.[0-9]*?)([0-9]{1,9}?)\2{1,9} *…", r'\1"overline"{\2}'),                    # 0.1666...
    (r"^[ ,:=*^≈]+|[ ,.:*^]+$", ""),
    (r"(?<![\w.,^'])[1-9][0-9]{0,2}([, '_])[0-9]{3}(?:\1[0-9]{3})*(?![0-9]|,[0-9]|[^(\[]*[)\]])",
     lambda number: number[0].replace(number[1], "")),                                    # 1,234, but not (1,234)
    (r"(^.*(?:sin|cos|tan|csc|sec|cot).*)|°", lambda it: it[1] or ' "degree" '),           # else a unit like others
    (r'([0-9]*\.([0-9]*)) *"overline" ?\{([0-9]+)\}',                                     # 0.1 and 6/90
     lambda number: f" 0{number[1]}0_{number[3]}⁄{'9' * len(number[3])}{'0' * len(number[2])} "),
    (r" *,[ ,]*", ","),
    (r"([0-9)}]) *≈ *-?[0-9]*\.[0-9 .]*$", r"\1"),
    (r"frac *(?:\{ ?([0-9]+) ?\}|([0-9])) ?(?:\{ ?([0-9]+) ?\}|([0-9]))", r" \1\2⁄\3\4 "),    # \frac12 is 1⁄2
    (r'([0-9)]|[0-9] ?\}) ?(?:_|"base") ?(?:\{[^{}0-9]*([0-9]{1,2})[ )]*\}|([0-9]{1,2})(?![0-9⁄]))', r'\1 "base\2\3"'))]
_TOKEN = re.compile(r"""[0-9]+\ +[0-9]+[⁄/][0-9]+|(?:[0-9.]+_)?[0-9]+⁄[0-9]+|"[^"]*"|[a-z]{2,}|
    (?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,2}(?![0-9]))?|\w(?:_(?:\w|\{\w+\}))?'*|\S""", re.VERBOSE)
_DENIAL = "not?|none|neither|never|false|wrong|incorrect|undefined|error|minus|double|half|opposite"  # no name or unit
_STATED = re.compile(rf'(?:^|(?<=, ))((?: ?(?:[^\W\d]\S*(?!\S)|_ \{{ [\w" ]+ \}}|"(?!(?:{_DENIAL})")[^"]*"|'
                     r'(?<!\w )\( [^()0-9]* \)|(?<=\w )(?:\^ \{ - 1 \} )?\( [^()]* \)))+) = (?!\1$)')
_UNIT = re.compile(rf'"[$€£]" |(?<=[\w)}}\]])(?:(?: [*/])? "(?!(?:{_DENIAL}|except|but|maybe|plus|negative|less|halve|'
                   r'third|tens|dozen|hundred|thousand|\w+(?:illion|teen|bled)|\w+(?<!mon)th|squared|cubed|factorial|'
                   r'repeating|[b-fi-kn-rt-zBD-EGHIMO-SUX-Z])")[^"]+"(?: \^ (?:[23]|\{ - [1-3] \}))?)+'
                   r'(?= [^\w\\(\[{"^|]|$)')
_NUMBER = re.compile(r'("[^"]*" )?[-0-9./_ ()]*("[^"]*"[^0-9]*)?')     # a plain number; an operation left to do:
_WORKED = re.compile(r"(?![0-9]+ \+ [0-9]+/[0-9]+$).*(?:[\w)}\"] [-+*] (?!10 \^)|[0-9)}] [(\[]|[0-9)] \{)")


def _plain(match):
    """A sign, macro or word by the table, by HTML's character of that name, as names if short, else in "quotes"."""
    token = match[0].strip('"') or " "
    if token[0] == "\\" and token not in _PLAIN:
        token = html5.get(token[1:] + ";", token[1:])
    word = re.sub("(?<=..[^us])s$", "", token.lower()) if len(token) > 1 else token
    names = re.findall(_NAME, token)
    plain = f'"{word}"' if match[0][0] == '"' or len(names) > 3 - token.istitle() else " ".join(names) or token
    plain = _PLAIN.get(token, _PLAIN.get(word, plain))
    return plain if len(plain) == 1 else f" {plain} "


@lru_cache(maxsize=1024)
def _normalise(text):
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return " ".join(re.sub(" +", "_", token).replace("⁄", "/") for token in _TOKEN.findall(text))


# Step 2: one precedence parser reads the plain notation into a value: a Fraction where that is exact, else a float,
# or the tuple of a kind and its entries: "," (list), ":" (ratio), "&" (row of a matrix), "=", brackets ("[1" for []).
_BINDING = dict(zip("!^*/+-:=<≤>≥&,", (9, 8, 6, 6, 5, 5, 4, 3, 3, 3, 3, 3, 2, 1)))
_OPERATORS = {"+": operator.add, "/": operator.truediv, "^": operator.pow} | dict.fromkeys("-=<≤", operator.sub)
_VARIABLE = re.compile(r"[∞⌊⌈A-Za-df-hj-zΑ-ϵℏ]|\"(?![ei%]\").*|[A-Za-zΑ-ϵ][_'].*")


def _combine(token, left, right):
    if token in ",:&":
        parts = [value[1:] if isinstance(value, tuple) and value[0] == token else (value,) for value in (left, right)]
        return (token, *parts[0], *parts[1])
    if token in ">≥":
        return _combine("<≤"[token == "≥"], right, left)
    if token == "!" and left.denominator == 1 and 0 <= left < 3000:
        return Fraction(math.factorial(left.numerator))
    bits = sum((side.numerator * side.denominator).bit_length() for side in (left, right) if type(side) is Fraction)
    if isinstance(right, tuple) and token not in _OPERATORS:      # a multiple of a vector or matrix
        return (right[0], *(_combine("*", left, part) for part in right[1:]))
    if token == "!" or isinstance(left, tuple) or bits * (abs(right) if token == "^" else 1) > 50000:
        raise ValueError("no number, or too large a one")
    value = _OPERATORS.get(token, operator.mul)(left, right)
    return (token, value) if token in "=<≤" else value      # of a relation, the difference of the sides counts


def _parse(tokens, point):
    """The value of a text's tokens, the last one first, at a sample point; uses them up as far as it can read them."""
    def operand():
        token = tokens.pop()
        if token[0] in ".0123456789":
            return sum(map(Fraction, token.split("_")))
        if _VARIABLE.fullmatch(token):      # whole, or a positive or negative fraction; f(x) and I(0) by their argument
            called = tokens[-1:] == ["("] and (token in "fgFG⌊⌈" or tokens[-3:-2] == [")"])
            code = zlib.crc32(f"{token.strip(chr(34))}{operand() if called else ''}/{point}".encode())
            return Fraction(code % 97 + 2, (1, 101, 1, -101, 1)[point])
        if token.strip('"') in _CONSTANTS:
            return _CONSTANTS[token.strip('"')]
        if token in "+-":
            return _combine("*", Fraction(f"{token}1"), parse(7))
        if token in "([{":
            part, end = parse(), ")]}".index(tokens.pop())
            return (f"{token}{end}", *part[1:]) if token != "{" and type(part) is tuple and part[0] == "," else part
        if token in ("frac", "binom", "sqrt"):
            first, second = operand() if token != "sqrt" or tokens[-1] == "[" else Fraction(2), operand()
            if token == "binom":
                return _combine("!", first, 0) / (_combine("!", second, 0) * _combine("!", first - second, 0))
            return first / second if token == "frac" else _combine("^", second, 1 / first)
        base, power = [operand() if tokens[-1] == mark and tokens.pop() else None for mark in "_^"]
        argument = operand() if tokens[-1] in "([{" else parse(6.5)             # \sin 2x \cos y has two factors
        return _combine("^", _FUNCTIONS[token](argument) / (cmath.log10(base) if base else 1), power or Fraction(1))

    def parse(binding=0):
        """The value up to an operator that does not bind tighter than `binding`, or a closing bracket."""
        left = operand()
        while tokens and tokens[-1] not in ")]}":
            token = tokens[-1]
            strength = _BINDING.get(token, 7 if binding == 6.5 and token not in _FUNCTIONS else 6)
            if strength <= binding or token[0] in ".0123456789" and "/" not in token:       # "2 3" is no product
                break
            if token in _BINDING:
                tokens.pop()
            left = _combine(token, left, parse(strength - (token == "^")) if token != "!" else 0)
        return left

    return parse()


@lru_cache(maxsize=1024)
def _read(text):
    """The value at each sample point of pseudo-random variables and words, or without them at None; else the text."""
    if re.search(r'" ["\w(\[{]|! !', text) or text.count("±") > 3 or text.count(" ") >= 200:
        return {None: text}         # a word is no operator, and n!! another function
    if "±" in text:                 # the list of the answers for both signs
        up, down = [_read(text.replace("±", sign, 1)) for sign in "+-"]
        return {point: tuple(dict.fromkeys(_combine(",", up[point], down[point]))) for point in up.keys() & down}
    values, scale = {}, None
    for point in range(5) if any(map(_VARIABLE.fullmatch, text.split())) else [None]:
        tokens = text.split()[::-1]
        with contextlib.suppress(ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError):
            value = _parse(tokens, point)
            if isinstance(value, tuple) and value[0] in "=<≤":          # relations of variables may be scaled
                if point is None:
                    break
                scale = scale or (value[1] if value[0] == "=" else abs(value[1]))
                value = value[0], value[1] / scale
            if not tokens:
                values[point] = value
    return values or {None: text}


# Step 3: one comparison of values: fractions exactly, floats to 1e-12, lists in any order.
def _same(prediction, gold):
    if isinstance(prediction, tuple) and isinstance(gold, tuple) and len(prediction) == len(gold):
        return all(map(_same, prediction, gold)) or gold[0] == "," and all(         # each as often as in the gold
            sum(_same(item, one) for one in prediction) == sum(_same(item, one) for one in gold) for item in gold)
    if {type(prediction), type(gold)} & {tuple, str} or type(prediction) is type(gold) is Fraction:
        return prediction == gold
    simple = all(side.denominator < 20000 for side in (prediction, gold) if type(side) is Fraction)
    return simple and cmath.isclose(prediction, gold, rel_tol=1e-12, abs_tol=1e-13)


def answers_match(prediction, gold):
    """Whether a predicted answer means the same as the reference answer `gold`. Never raises; only text matches.

    - Exact: 0.33 is not 1/3, 3.14 is not pi; 6/8 is 3/4; factored or expanded is the same. Roots are principal.
    - For a plain number, a sum, difference or product left to do (`2+3` for 5) is refused; only 2+1/3 is 2 1/3.
    - A missing unit (most words count) or base is fine, another not, none is converted. 25% is 25 and 0.25.
    - `x = 5` and `2+3 = 5` state 5, unless the gold names another thing; `(C) 12` is choice C.
    - Equations and inequalities may be rearranged or scaled.
    - Several answers match only as many, in any order; tuples, intervals and matrices keep order and ends.
    - Variables (and f(x), I(0)) keep name and case; words ignore case. What is not read, as 1 < x < 3, stays text.
    - Not told apart: CAB and ABC, {1}, {2, 3} and {1, 2}, {3}, £5 and an unescaped $5, floats within 1e-12."""
    texts = isinstance(prediction, str) and isinstance(gold, str)
    if not texts or prediction.split() == gold.split() or max(len(prediction), len(gold)) > 600:
        return texts and prediction.split() == gold.split() != []
    gold = _normalise(gold)
    comma = ", " if "," in gold else ","            # 120,150 is a list where one is asked for, else a number
    forms = [(_normalise(re.sub(r"(?<=[0-9]),[\\\s]*(?=[0-9])", comma, prediction)), gold)]
    for part in (_STATED, _UNIT):   # one name, unit or base may be missing, but not another one
        given, asked = [{*map(str.strip, part.findall(side))} for side in forms[0]]
        added = not asked and not re.search("base(?!10)", str(given))
        if len(asked) < 2 and (not given or added or given == asked):
            forms += [[part.sub("", side) for side in form] for form in forms]
    for text, gold in forms:        # a true calculation, as 2 + 3 = 5, states its last side
        *sides, text = [text] if "=" in gold or "," in text else text.split(" = ")
        values, golds = _read(text), _read(gold)
        points = () if _NUMBER.fullmatch(gold) and _WORKED.match(text) else values.keys() & golds
        with contextlib.suppress(OverflowError):
            if points and all(_same(values[point], golds[point]) for point in points) and all(
                    None in values and _same(_read(side).get(None, ""), values[None]) for side in sides):
                return True
    return False


def math_reward(response, gold):
    """1.0 where the final answer of the response (`extract_answer`) matches the gold (`answers_match`), else 0.0."""
    return float(answers_match(extract_answer(response), gold))


# ---------------------------------------------------------------------------------------------------------------
# 3. Problems, and the built-in policy

BOX = r"\boxed{"
INSTRUCTION = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}."
ARITHMETIC = {"arithmetic": "test", "arithmetic-dev": "dev"}  # the built-in data, and what each holds out
OPERANDS = (3, 4)             # how many one-digit numbers an arithmetic problem has
TRAIN_PROBLEMS = 16_384       # of some 280,000 that exist
BRIEF, CAREFUL, SLIP = 0.65, 0.25, 0.2  # shares: answer at once (in the end, from 0), mind precedence; err in a step
WARM_UP_STEPS, WARM_UP_BATCH, WARM_UP_LR = 1800, 128, 4e-3
WARM_UP_SEED = 0              # another one gives another policy to start from (see the README: it matters)


def reduce_once(expression: str, careful: bool = True, slip: int = 0) -> str:
    """Do one operation of one-digit numbers modulo 10, the first `*` (if careful) or the leftmost, plus a slip."""
    at = max(expression.find("*") - 1, 0) if careful else 0
    left, operator, right = int(expression[at]), expression[at + 1], int(expression[at + 2])
    value = left + right if operator == "+" else left - right if operator == "-" else left * right
    return expression[:at] + str((value + slip) % 10) + expression[at + 3:]


def crowd_solution(expression: str, rng: random.Random, brief: float) -> str:
    """One text of the warm-up corpus, by an imperfect writer, so that the policy starts broad, like a base model. A
    share `brief` of the writers answers at once, the others one operation at a time, as in =3+8-2=1-2\\boxed{9}. Some
    mind precedence, the others work from left to right, a habit that is often right. All slip now and then."""
    at_once, careful, steps = rng.random() < brief, rng.random() < CAREFUL, ""
    while len(expression) > 1:
        slip = rng.choice((-2, -1, 1, 2)) if rng.random() < SLIP else 0
        expression = reduce_once(expression, careful, slip)
        steps += "=" + expression if len(expression) > 1 and not at_once else ""
    return steps + BOX + expression + "}"


def arithmetic_problems(split: str, count: int) -> list[dict]:
    """`count` different problems of a split: train, dev (to choose settings on) or test (to report on). A hash of the
    expression decides its split, so that no problem is in two, whatever is drawn."""
    rng, problems = random.Random(split), {}
    while len(problems) < count:
        numbers = rng.choice(OPERANDS)
        text = "".join(f"{rng.randrange(10)}{rng.choice('+-*')}" for _ in range(numbers))[:-1]
        share = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 10
        if split == ("test", "dev")[share] if share < 2 else split == "train":
            answer = text
            while len(answer) > 1:
                answer = reduce_once(answer)
            problems[text] = dict(problem=text + "?", answer=answer)
    return list(problems.values())


def tiny_policy(width: int):
    """The built-in policy before any training: a Qwen2 of two layers, and a tokenizer of characters, \\boxed{ one."""
    words = ["<pad>", "<eos>", BOX, "}", *"0123456789+-*=?"]
    spec = dict(
        version="1.0", added_tokens=[], normalizer=None, post_processor=None, decoder=dict(type="Fuse"),
        pre_tokenizer=dict(type="Split", pattern=dict(Regex=r"\\boxed\{|."), behavior="Isolated", invert=False),
        model=dict(type="WordLevel", vocab={word: i for i, word in enumerate(words)}, unk_token="?"))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tokenizer.json").write_text(json.dumps(spec))
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json", pad_token="<pad>",
                                            eos_token="<eos>")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(WARM_UP_SEED)
        model = Qwen2ForCausalLM(Qwen2Config(
            vocab_size=len(words), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=2,
            num_attention_heads=width // 16, num_key_value_heads=width // 16, max_position_embeddings=1024,
            tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None))
    return model, tokenizer


def imitate(model, tokenizer):
    """Train the built-in policy on the crowd's texts, the longer ones first, for they teach more."""
    rng, problems = random.Random(WARM_UP_SEED), arithmetic_problems("train", TRAIN_PROBLEMS)
    optimizer = torch.optim.AdamW(model.parameters(), WARM_UP_LR, betas=(0.9, 0.95), weight_decay=0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / 50, 0.1 + 0.45 * (1 + math.cos(math.pi * step / WARM_UP_STEPS))))
    for step in tqdm(range(WARM_UP_STEPS), "warm-up", disable=None):  # None: only on a terminal
        batch = rng.choices(problems, k=WARM_UP_BATCH)
        solutions = [crowd_solution(p["problem"][:-1], rng, BRIEF * step / WARM_UP_STEPS) for p in batch]
        rows = left_pad([tokenizer(p["problem"]).input_ids for p in batch], 0)                         # [N, L]
        # The text, <eos> (1), then <pad> (0): written and padded backwards, then turned round.
        responses = left_pad([[1] + tokenizer(text).input_ids[::-1] for text in solutions], 0).flip(1)  # [N, T]
        ids = torch.cat([rows, responses], 1)                                                          # [N, L+T]
        logprobs, _ = response_logprobs(model, ids, (ids != 0).long(), responses.shape[1], with_entropy=False)
        (-logprobs.sum() / (responses != 0).sum()).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def warm_up(name: str) -> Path:
    """The folder of the warm built-in policy: trained once on the crowd's texts, then cached under a key of all that
    shapes the weights: the source of sections 3 and 4, the versions and the width."""
    sections = SOURCE[SOURCE.index("\n# 3. Problems"):SOURCE.index("\n# 5. Advantages")]
    key = hashlib.sha256(repr((sections, torch.__version__, transformers.__version__)).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "entropy_rl"
    folder = cache / f"tiny-{TINY[name]}-{key}"
    if (folder / "config.json").exists():
        return folder
    told = f"the cache {cache} cannot be written", "; set XDG_CACHE_HOME"
    with explain(*told):
        cache.mkdir(parents=True, exist_ok=True)
        draft = tempfile.TemporaryDirectory(dir=cache)
    print("warm-up of the built-in policy, once: a minute or two", flush=True)
    torch.set_num_threads(1)  # so that the start of a run does not depend on which run came first
    model, tokenizer = tiny_policy(TINY[name])
    imitate(model, tokenizer)
    with explain(*told), draft:
        model.save_pretrained(f"{draft.name}/policy")
        tokenizer.save_pretrained(f"{draft.name}/policy")
        with contextlib.suppress(OSError):  # another process may have been faster
            Path(draft.name, "policy").rename(folder)
    return folder


def read_rows(source: str, split: str):
    """A data file or Hugging Face data set id as (rows, whether the same rows serve training and evaluation)."""
    import datasets
    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # as in main; its import has set another
    kind = Path(source).suffix[1:].removesuffix("l")
    with explain(f"{source}: not a data set of the hub, nor a .jsonl, .json, .csv or .parquet file with rows in it"):
        if kind in ("json", "csv", "parquet"):
            splits = datasets.load_dataset(kind, data_files=glob.escape(source))
        else:
            names = datasets.get_dataset_config_names(source)
            splits = datasets.load_dataset(source, "main" if "main" in names else names[0])
        train = next(name for name in ("train", "test", "validation", *splits) if name in splits)
        test = next(name for name in ("test", "validation", "train", *splits) if name in splits)
        return splits[train if split == "train" else test].flatten(), train == test


def load_problems(config: Config, split: str) -> list[dict]:
    """The problems of a split, train or test, as [{"problem": text or chat, "answer": text}]. Rows that serve as both
    are divided: a tenth, at most --eval-problems, is held out, picked by a hash of the text."""
    source = config.data if split == "train" else config.eval_data or config.data
    if source in ARITHMETIC:
        return (arithmetic_problems("train", TRAIN_PROBLEMS) if split == "train" else
                arithmetic_problems(ARITHMETIC[source], config.eval_problems))
    rows, shared = read_rows(source, split)
    columns = {name.split(".")[-1]: name for name in reversed(rows.column_names)}
    question = next((columns[name] for name in ("problem", "question", "prompt") if name in columns), None)
    answer = next((columns[name] for name in ("answer", "ground_truth", "solution") if name in columns), None)
    demand(question and answer, f"{source}: needs a column problem, question or prompt, and a column answer, "
                                f"ground_truth or solution; found {', '.join(rows.column_names)}")
    problems = {}
    for text, gold in zip(rows[question], rows[answer]):
        text = text if isinstance(text, list) else str(text or "")  # a list is a chat
        readable = isinstance(text, str) or all(isinstance(m, dict) and type(m.get("content")) is str for m in text)
        gold = "" if gold is None or isinstance(gold, (list, dict)) else str(gold).strip()
        gold = extract_answer(gold) or (gold if len(gold) <= 200 else "")  # a long text without an answer in it
        if text and readable and gold:
            problems[hashlib.sha256(repr(text).encode()).digest()] = dict(problem=text, answer=gold)
    divided = shared and config.eval_data in ("", config.data)
    if len(problems) < len(rows) and not (divided and split == "train"):  # else it was said of the test split
        print(f"{source}: {len(rows) - len(problems)} of {len(rows)} rows skipped (no readable answer, or repeated)")
    demand(problems, f"{source}: no row has a problem and an answer")
    found = [problem for _, problem in sorted(problems.items())]
    count = min(config.eval_problems, max(1, len(found) // 10)) if divided else config.eval_problems
    return found[:count] if split == "test" else found[count:] if divided else found


@dataclass
class Policy:
    """A language model with what is needed to talk to it."""
    model: torch.nn.Module
    tokenizer: object
    eos_token_ids: list[int]
    pad_token_id: int

    def encode(self, problem, template: str) -> list[int]:
        """The token ids of a problem, a text or a chat: by the template if any, else by the tokenizer's own."""
        if self.tokenizer.chat_template and not template:
            chat = [dict(role="user", content=INSTRUCTION.replace("{problem}", str(problem)))]
            with explain("the model's chat template does not take a problem", "; give a --prompt-template"):
                return self.tokenizer.apply_chat_template(problem if isinstance(problem, list) else chat,
                                                          add_generation_prompt=True, return_dict=False)
        text = problem if isinstance(problem, str) else "\n".join(message["content"] for message in problem)
        return self.tokenizer((template or INSTRUCTION + "\n").replace("{problem}", text)).input_ids


def load_policy(config: Config) -> Policy:
    """The policy of --model on the device: fp32 weights, dropout off (the ratio must be 1 before an update)."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = best if config.device == "auto" else config.device
    with explain(f"--device {device} does not work"):
        torch.zeros(1, device=device).item()
    transformers.utils.logging.disable_progress_bar()
    source = str(warm_up(config.model)) if config.model in TINY else config.model
    torch.set_num_threads(config.threads)
    with explain(f"--model {source}: no folder or hub model that loads, nor tiny or tiny-WIDTH, a multiple of 16"):
        settings = AutoConfig.from_pretrained(source, trust_remote_code=False)
        settings.update({k: 0.0 for k, v in vars(settings).items() if "drop" in k and isinstance(v, float)})
        model = AutoModelForCausalLM.from_pretrained(source, config=settings, dtype=torch.float32,
                                                     trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        demand(tokenizer("1+1=2 Why?").input_ids, "its tokenizer is missing")
    if config.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # new, old
        enable(dict(use_reentrant=False))
    model.to(device).train(config.gradient_checkpointing)  # without dropout the two modes compute the same
    stops = [model.generation_config.eos_token_id, tokenizer.eos_token_id]
    stops = sorted({i for s in stops if s is not None for i in (s if isinstance(s, list) else [s])})
    with torch.no_grad():  # section 4 projects the hidden states itself
        ids = torch.arange(4, device=device)[None]                                                 # [1, 4]
        ours = model.get_output_embeddings()(model.base_model(input_ids=ids).last_hidden_state)    # [1, 4, V]
        demand(stops and torch.allclose(model(input_ids=ids).logits, ours, atol=1e-3),
               f"--model {source}: needs a stop token, and logits that are its output layer's alone")
    return Policy(model, tokenizer, stops, stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


# ---------------------------------------------------------------------------------------------------------------
# 4. Rollouts (Sec. 2.1)

PACKED_ROW = 96  # tokens of a row of the forward pass, or its longest sequence; more cost more attention
LOGITS_AT_ONCE = 2 ** 25  # floats of one chunk of logits: 134 MB (below 32 MB malloc fragments its heap on a CPU)


def left_pad(prompts: list[list[int]], pad_token_id: int) -> Tensor:
    """P lists of token ids -> [P, L]."""
    longest = max(map(len, prompts))
    return torch.tensor([[pad_token_id] * (longest - len(ids)) + list(ids) for ids in prompts])


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, [rows, heads, length, width], with spare room at the end. The library's
    DynamicLayer concatenates, which copies the whole cache for every token sampled."""
    used, room = 0, ()

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        key_states = key_states.to(value_states.dtype)  # rotary positions leave them in fp32 under autocast
        start, self.used = self.used, self.used + key_states.shape[2]
        if not self.room or self.room[0].shape[2] < self.used:
            old, size = self.room, self.used + max(16, self.used // 2)
            self.room = [x.new_empty(*x.shape[:2], size, x.shape[3]) for x in (key_states, value_states)]
            for room, x in zip(self.room, old):
                room[:, :, :start] = x[:, :, :start]
        for room, x in zip(self.room, (key_states, value_states)):
            room[:, :, start:self.used] = x
        self.is_initialized, self.dtype, self.device = True, key_states.dtype, key_states.device
        return self.view()

    def view(self):
        """The part of the room that is in use, as the library reads it."""
        self.keys, self.values = (room[:, :, :self.used] for room in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor):
        """Keep these rows, in this order; a row may be taken several times."""
        self.room = [room[indices] for room in self.room]
        self.view()


@dataclass
class Rollouts:
    """N = P G responses, grouped by prompt; L prompt tokens (padded on the left) and T response tokens."""
    input_ids: Tensor       # [N, L+T]
    attention_mask: Tensor  # [N, L+T]
    response_mask: Tensor   # [N, T] true up to and including the stop token
    logprobs: Tensor        # [N, T] of the sampled tokens, under the distribution sampled from; 0 off the mask
    entropy: Tensor         # [N, T] of the policy at temperature 1 (Eq. 5), in nats; 0 off the mask


@torch.no_grad()
def sample_rollouts(model, prompts, *, group_size, max_new_tokens, temperature, eos_token_ids, pad_token_id,
                    greedy=False, generator=None) -> Rollouts:
    """Sample `group_size` responses to each of P prompts (lists of token ids) on the model's KV cache (Sec. 2.1). A
    prompt is read once and its cache repeated for the group; rows that have stopped leave the batch and the cache.
    The entropy is Eq. 5's, over the whole vocabulary."""
    device, training, length = model.device, model.training, max(map(len, prompts))
    model.eval()  # in training mode gradient checkpointing would drop the cache
    stops = torch.tensor(eos_token_ids, device=device)
    prompt_ids = left_pad(prompts, pad_token_id).to(device)                                        # [P, L]
    prompt_mask = left_pad([[1] * len(ids) for ids in prompts], 0).to(device)                      # [P, L]
    each = torch.arange(len(prompts), device=device).repeat_interleave(group_size)                 # [N]
    rows, live = torch.arange(len(each), device=device), torch.ones(len(each), dtype=torch.bool, device=device)
    tokens = torch.full((len(each), max_new_tokens), pad_token_id, device=device)                  # [N, T]
    logprobs, entropy = torch.zeros(2, len(each), max_new_tokens, device=device)                   # [N, T] each
    # The attention mask as the model adds it, made once: the library would make it anew for every token.
    hidden_from = torch.nn.functional.pad(prompt_mask == 0, (0, max_new_tokens))[each]             # [N, L+T]
    attention = torch.zeros(1, device=device).masked_fill(hidden_from, -math.inf)[:, None, None]   # [N, 1, 1, L+T]
    position, cache = prompt_mask.sum(1, keepdim=True)[each], Cache(layer_class_to_replicate=RoomyLayer)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):  # over weights in fp32
        logits = model(input_ids=prompt_ids, attention_mask=prompt_mask, past_key_values=cache, use_cache=True,
                       position_ids=(prompt_mask.cumsum(1) - 1).clamp(min=0), logits_to_keep=1).logits[:, -1]
        demand(torch.isfinite(logits).all(), "the policy's logits are not finite any more: lower --lr")
        cache.batch_select_indices(each)
        logits = logits[each]                                       # [n, V], n of the N responses are not over
        for t in range(max_new_tokens):
            at_one = logits.float().log_softmax(-1)                                                # [n, V]
            sampled_from = at_one if temperature == 1 else (at_one / temperature).log_softmax(-1)
            chances = sampled_from.exp()
            token = logits.argmax(-1) if greedy else torch.multinomial(chances, 1, generator=generator)[:, 0]  # [n]
            tokens[rows, t] = token
            logprobs[rows, t] = sampled_from.gather(1, token[:, None])[:, 0]
            entropy[rows, t] = -((chances if temperature == 1 else at_one.exp()) * at_one).sum(-1)
            live = live & ~torch.isin(token, stops)
            still = int(live.sum())
            if not still or t + 1 == max_new_tokens:
                break
            if still <= 0.9 * len(live):  # not for every row: leaving copies the cache of those that stay
                stay = live.nonzero()[:, 0]
                cache.batch_select_indices(stay)
                rows, live, token, attention, position = (x[stay] for x in (rows, live, token, attention, position))
            logits = model(input_ids=token[:, None], attention_mask=attention[..., :length + t + 1],
                           past_key_values=cache, use_cache=True, position_ids=position + t).logits[:, -1]
    model.train(training)
    tokens, stopped = tokens[:, :t + 1], torch.isin(tokens[:, :t + 1], stops).long()               # [N, T]
    response_mask = stopped.cumsum(1) == stopped       # up to and including the first stop token
    return Rollouts(torch.cat([prompt_ids[each], tokens.where(response_mask, pad_token_id)], 1),
                    torch.cat([prompt_mask[each], response_mask.long()], 1), response_mask,
                    logprobs[:, :t + 1] * response_mask, entropy[:, :t + 1] * response_mask)


def token_logprobs(hidden: Tensor, targets: Tensor, head, temperature: float, with_entropy=True) -> list[Tensor]:
    """log pi of each target and, if asked for, the entropy there (Eq. 5), both [M]: hidden [M, d], targets [M],
    `head` turns hidden states to logits."""
    ### BEGIN SOLUTION
    logprobs = (head(hidden).float() / temperature).log_softmax(-1)                                # [M, V]
    chosen = logprobs.gather(1, targets[:, None])[:, 0]
    return [chosen, -(logprobs.exp() * logprobs).sum(-1)] if with_entropy else [chosen]
    ### END SOLUTION


def pack(prompts: list, prompt_lengths: list[int], lengths: list[int], capacity: int) -> list[tuple[int, int, int]]:
    """For each response (its prompt, the lengths of both): its packed row, and the places where its prompt and it
    start there. First fit; a prompt stands in a packed row once, whatever number of its responses do."""
    used, starts, places = [], [], []
    for prompt, prompt_length, length in zip(prompts, prompt_lengths, lengths):
        for row, taken in enumerate(used):
            if taken + length + (0 if prompt in starts[row] else prompt_length) <= capacity:
                break
        else:
            row = len(used)
            used.append(0)
            starts.append({})
        if prompt not in starts[row]:
            starts[row][prompt] = used[row]
            used[row] += prompt_length
        places.append((row, starts[row][prompt], used[row]))
        used[row] += length
    return places


def response_logprobs(model, input_ids, attention_mask, response_length, *, temperature=1.0, with_entropy=True):
    """log pi(y_t | y_<t, x) of the response tokens, and the entropy there, both [N, T] and differentiable. The
    responses are the last `response_length` columns; off the mask both results are 0. The distribution is
    softmax(logits / temperature), so the entropy is Eq. 5's at temperature 1 only. Two things keep it small: many
    sequences share a row of the forward pass, and a group its prompt, behind an attention mask; and only response
    tokens are projected onto the vocabulary, LOGITS_AT_ONCE at a time, which the backward pass computes again."""
    width, mask, device = input_ids.shape[1] - response_length, attention_mask.bool(), input_ids.device   # L
    is_response = mask[:, width:]                                                                  # [N, T]
    fed = mask & torch.nn.functional.pad(mask[:, 1:], (0, 1))     # the last token predicts nothing
    prompt_ids = input_ids[:, :width].where(mask[:, :width], -1)                                   # [N, L]
    prompts = (prompt_ids != prompt_ids.roll(1, 0)).any(1).cumsum(0)  # [N], a number for each run of rows of one
    prompt_lengths, lengths = fed[:, :width].sum(1), fed[:, width:].sum(1)                         # [N]
    longest = max(PACKED_ROW, int((prompt_lengths + lengths).max()))
    places = pack(prompts.tolist(), prompt_lengths.tolist(), lengths.tolist(), longest)
    row, prompt_at, response_at = torch.tensor(places, device=device).T[..., None]                 # [N, 1] each
    count = 1 + int(row.max())
    position = mask.cumsum(1) - 1                                                                  # [N, L+T]
    in_response = torch.arange(width + response_length, device=device) >= width                    # [L+T]
    # the cell of each token in the packed rows: where its prompt or response starts, and its place in that
    cells = row * longest + position + torch.where(in_response, response_at - prompt_lengths[:, None], prompt_at)
    owner = torch.where(in_response, torch.arange(len(mask), device=device)[:, None], -1)          # [N, L+T]

    def packed(values, default):
        flat = torch.full((count * longest,), default, device=device)
        return flat.index_copy(0, cells[fed], values[fed]).view(count, longest)       # [B, S], B packed rows of S

    prompt, owner = packed(prompts[:, None].expand_as(mask), -1), packed(owner, -1)
    place = torch.arange(longest, device=device)
    seen = ((prompt[:, :, None] == prompt[:, None]) & ((owner[:, None] == -1) | (owner[:, :, None] == owner[:, None]))
            & (place[:, None] >= place))                                                           # [B, S, S]
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        hidden = model.base_model(
            input_ids=packed(input_ids, 0), position_ids=packed(position, 0), use_cache=False,
            attention_mask=torch.zeros(1, device=device).where(seen, -math.inf)[:, None]).last_hidden_state
        # [M, d]; not by [...]: a group shares its prompt's last cell, and threads would add its gradients in any order
        hidden = torch.nn.functional.embedding(cells[:, width - 1:-1][is_response], hidden.flatten(0, 1))
        targets, head = input_ids[:, width:][is_response], model.get_output_embeddings()           # [M]
        size = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
        again = len(targets) > size and torch.is_grad_enabled()
        chunks = [(h, y, head, temperature, with_entropy) for h, y in zip(hidden.split(size), targets.split(size))]
        found = [checkpoint(token_logprobs, *chunk, use_reentrant=False) if again else token_logprobs(*chunk)
                 for chunk in chunks]
    empty = torch.zeros(is_response.shape, device=device)
    logprobs, *entropy = (empty.masked_scatter(is_response, torch.cat(values)) for values in zip(*found))  # [N, T]
    return logprobs, entropy[0] if with_entropy else None


# ---------------------------------------------------------------------------------------------------------------
# 5. Advantages (Sec. 2.1)

def group_advantages(rewards: Tensor, group_size: int, estimator: str = "grpo") -> Tensor:
    """A(y) of each response from the rewards of its group: [N] -> [N], rows grouped by prompt.

    grpo: Eq. 3, (r - mean of the group) / std of the group, unbiased std + 1e-6 as in the authors' code.
    rloo: r - mean of the *other* responses of the group. reinforce_pp: as grpo, but over all rewards given here (in
    training, those of the prompts that are neither all right nor all wrong).
    """
    ### BEGIN SOLUTION
    if estimator == "reinforce_pp":
        return (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    groups = rewards.view(-1, group_size)                                                          # [P, G]
    centred = groups - groups.mean(1, keepdim=True)                                                # [P, G]
    if estimator == "rloo":  # r - (sum - r) / (G - 1) = (r - mean) G / (G - 1)
        return (centred * group_size / (group_size - 1)).flatten()
    return (centred / (groups.std(1, keepdim=True) + 1e-6)).flatten()                              # [N]
    ### END SOLUTION


# ---------------------------------------------------------------------------------------------------------------
# 6. Covariance and losses (Sec. 4.2)

def token_covariance(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Eq. 10: Cov(y_t) = (log pi(y_t) - mean log pi) (A(y_t) - mean A), means over the tokens of the mask. [N, T],
    [N], [N, T] -> [N, T], 0 off the mask, without gradient. Its mean over the mask is their covariance in the
    batch; Theorem 2, which ties one to the fall of entropy, takes it in each state, over the policy's actions."""
    ### BEGIN SOLUTION
    logprobs, mask = logprobs.detach(), mask.bool()
    advantages = advantages.detach()[:, None].expand_as(logprobs)                                  # [N, T]
    deviation = (logprobs - logprobs[mask].mean()) * (advantages - advantages[mask].mean())        # [N, T]
    return torch.where(mask, deviation, 0.0)
    ### END SOLUTION


def clipped_ratio(config: Config, ratio: Tensor) -> Tensor:
    """clip(rho, 1 - eps_low, 1 + eps_high) of Eq. 4; without bounds for pg (Fig. 8) and kl_cov (as in the authors'
    code; the paper does not say)."""
    if config.method in ("pg", "kl_cov"):
        return ratio
    return ratio.clamp(1 - config.clip_low, 1 + config.clip_high)


def ppo_stopped(config: Config, ratio: Tensor, gain: Tensor) -> Tensor:
    """The tokens that have no gradient left, for the minimum in Eq. 4 takes the clipped ratio: bool."""
    return clipped_ratio(config, ratio) * gain < ratio * gain


def select_tokens(config: Config, logprobs, old_logprobs, advantages, mask, generator=None) -> Tensor:
    """The tokens that Clip-Cov detaches (Eq. 11) or KL-Cov penalises (Eq. 13): [N, T] bool; all False otherwise.
    clip_cov: floor(r M) tokens picked at random among those with omega_low < Cov < omega_high, but none that the PPO
    clip has stopped already (the open bounds and this are the authors' code's). kl_cov: the floor(k M) tokens of the
    highest Cov. M counts the tokens of the mask. A positive r or k selects at least one token, as in the authors'
    code, but never more than there are."""
    ### BEGIN SOLUTION
    mask = mask.bool()
    selected = torch.zeros_like(mask)
    share = dict(clip_cov=config.clip_cov_ratio, kl_cov=config.kl_cov_fraction).get(config.method, 0)
    count = max(1, int(share * int(mask.sum())))
    if share == 0:
        return selected
    covariance = token_covariance(logprobs, advantages, mask)                                      # [N, T]
    if config.method == "clip_cov":
        gain, ratio = advantages[:, None], (logprobs.detach() - old_logprobs).exp()
        window = (covariance > config.clip_cov_low) & (covariance < config.clip_cov_high)
        candidates = (window & mask & ~ppo_stopped(config, ratio, gain)).flatten().nonzero()[:, 0]
        order = torch.randperm(len(candidates), generator=generator, device=generator.device if generator else None)
        picked = candidates[order[:count].to(candidates.device)]
    else:
        picked = covariance.masked_fill(~mask, -math.inf).flatten().topk(min(count, int(mask.sum()))).indices
    selected.view(-1)[picked] = True
    return selected
    ### END SOLUTION


def token_losses(config: Config, logprobs, old_logprobs, advantages, selected, entropy=None, ref_logprobs=None):
    """The loss of each token, minimised: [N, T], from log-probabilities [N, T], advantages [N] and the selection.

    rho = pi / pi_old. Every method starts from the PPO surrogate, -min(rho A, clip(rho) A) (Eq. 4), and then
    clip_cov:      the selected tokens have no gradient, and loss 0 (Eq. 12)
    kl_cov:        no clip; the selected tokens pay beta KL(pi_old || pi) (Eq. 14), estimated on the token from
                   d = log pi - log pi_old: |d| (abs), d^2 / 2 (k2) or e^d - 1 - d (k3)
    entropy_bonus: minus alpha times the entropy (Sec. 4.1); ref_kl: plus beta KL(pi || pi_ref), the k3 estimator
    grpo, clip_higher: the surrogate itself; pg: without clip, the setting of Fig. 8
    """
    ### BEGIN SOLUTION
    log_ratio = logprobs - old_logprobs.detach()                                                   # [N, T]
    ratio, gain = log_ratio.exp(), advantages[:, None]
    loss = -torch.minimum(ratio * gain, clipped_ratio(config, ratio) * gain)
    if config.method == "clip_cov":
        return torch.where(selected, 0.0, loss)
    if config.method == "kl_cov":
        penalty = dict(abs=log_ratio.abs(), k2=log_ratio ** 2 / 2, k3=ratio - 1 - log_ratio)[config.kl_estimator]
        return loss + config.kl_cov_coef * torch.where(selected, penalty, 0.0)
    if config.method == "entropy_bonus":
        return loss - config.entropy_coef * entropy
    if config.method == "ref_kl":
        to_ref = ref_logprobs - logprobs
        return loss + config.ref_kl_coef * (to_ref.exp() - 1 - to_ref)
    return loss
    ### END SOLUTION


def policy_loss(config: Config, logprobs, old_logprobs, advantages, mask, generator=None, *, entropy=None,
                ref_logprobs=None) -> Tensor:
    """The scalar that one optimizer step minimises: selection (Eq. 11, 13), then the token losses (Eq. 4, 12, 14) as
    their mean over the mask, whatever response they are of. The arguments hold the whole mini-batch, [N, T] and
    advantages [N], whatever the micro-batch size; entropy_bonus also needs entropy, ref_kl ref_logprobs, [N, T]."""
    ### BEGIN SOLUTION
    selected = select_tokens(config, logprobs, old_logprobs, advantages, mask, generator)
    losses = token_losses(config, logprobs, old_logprobs, advantages, selected, entropy, ref_logprobs)
    return losses[mask.bool()].mean()
    ### END SOLUTION


# ---------------------------------------------------------------------------------------------------------------
# 7. Training and evaluation

def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that one of k responses drawn from n, of which c are right, is right: 1 - C(n-c, k) / C(n, k)."""
    ### BEGIN SOLUTION
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)
    ### END SOLUTION


def collect(config: Config, policy: Policy, problems: list[dict], group_size: int, **sampling):
    """Responses to the problems, their rewards [N], and their texts; `sampling` is how, as of sample_rollouts."""
    rollouts = sample_rollouts(
        policy.model, [p["ids"] for p in problems], group_size=group_size, max_new_tokens=config.max_new_tokens,
        eos_token_ids=policy.eos_token_ids, pad_token_id=policy.pad_token_id, **sampling)
    mask = rollouts.response_mask
    responses = zip(rollouts.input_ids[:, -mask.shape[1]:].tolist(), mask.sum(1).tolist())
    texts = policy.tokenizer.batch_decode([ids[:length] for ids, length in responses], skip_special_tokens=True)
    golds = [p["answer"] for p in problems for _ in range(group_size)]
    return rollouts, torch.tensor([math_reward(text, gold) for text, gold in zip(texts, golds)]), texts


def evaluate(config: Config, policy: Policy, problems: list[dict]) -> tuple[dict, list[dict]]:
    """avg@k with its standard error over problems, pass@k and greedy accuracy, and a few responses to read. The same
    problems and random numbers at every evaluation of a run, so that two of them differ by the policy alone."""
    k, right, greedy, samples = config.eval_samples, [], [], []
    size = max(1, config.prompts * config.group_size // k)
    noise = seeded(policy.model.device, config.seed, "evaluation")
    for start in range(0, len(problems), size):
        batch = problems[start:start + size]
        _, rewards, texts = collect(config, policy, batch, k, temperature=config.eval_temperature, generator=noise)
        right += rewards.view(-1, k).sum(1).int().tolist()
        greedy += collect(config, policy, batch, 1, temperature=1.0, greedy=True)[1].tolist()
        samples += [dict(problem=p["problem"], response=text, extracted=extract_answer(text), answer=p["answer"],
                         reward=reward) for p, text, reward in zip(batch, texts[::k], rewards[::k].tolist())]
    average = torch.tensor(right, dtype=torch.float64) / k
    error = average.std(correction=min(1, len(right) - 1)).item() / len(right) ** 0.5
    return dict(eval_avg=average.mean().item(), eval_avg_se=error,
                eval_pass=fmean(pass_at_k(k, c, k) for c in right), eval_greedy=fmean(greedy), eval_k=k), samples[:8]


COV_TOP = (0.02, 0.2, 2, 20, 50)  # per cent of the tokens, Table 1
UPDATE_KEYS = ("updates", "skipped_updates", "loss", "grad_norm", "clip_fraction", "approx_kl", "cov_mean",
               *(f"cov_top_{p}" for p in COV_TOP), "selected_tokens", "selected_fraction", "quadrant_tokens",
               "quadrant_cov", "quadrant_selected", "most_selected")


def anatomy(config: Config, logprobs, old_logprobs, advantages, mask, selected) -> dict[str, Tensor]:
    """What a mini-batch looked like to the selection; arguments as of select_tokens, values scalars or [4]. The share
    of tokens stopped by the PPO clip; KL(pi_old || pi), k3; the mean of the top p % of Cov (Table 1); and of each
    quadrant (QUADRANTS) the share of the tokens, their part of the mean Cov, and the number selected."""
    gain, log_ratio = advantages[:, None].expand_as(logprobs)[mask], (logprobs - old_logprobs)[mask]  # [M]
    ratio, covariance = log_ratio.exp(), token_covariance(logprobs, advantages, mask)[mask]        # [M]
    ranked = covariance.sort(descending=True).values
    quadrant = 2 * (gain <= gain.mean()).long() + (logprobs[mask] <= logprobs[mask].mean()).long()
    share, part, count = (torch.zeros(4, device=gain.device).index_add_(0, quadrant, x.float()) for x in
                          (torch.full_like(gain, 1 / len(gain)), covariance / len(gain), selected[mask]))
    return dict(clip_fraction=ppo_stopped(config, ratio, gain).float().mean(),
                approx_kl=(ratio - 1 - log_ratio).mean(), cov_mean=covariance.mean(),
                **{f"cov_top_{p}": ranked[:max(1, int(len(ranked) * p / 100))].mean() for p in COV_TOP},
                quadrant_tokens=share, quadrant_cov=part, quadrant_selected=count)


def mini_batches(config: Config, rollouts: Rollouts, rewards: Tensor, step: int) -> tuple[list[Tensor], Tensor]:
    """The rows of each mini-batch, whole groups in random order, and the advantages [N]. Prompts whose responses are
    all right or all wrong are left out (Sec. 4.3)."""
    size, device = config.group_size, rollouts.input_ids.device
    kept = (rewards.view(-1, size).std(1) > 0).nonzero()[:, 0]                                     # [P'] groups
    if not len(kept):
        return [], rewards
    members = kept[:, None] * size + torch.arange(size)                                            # [P', G]
    advantages = torch.zeros(len(rewards))
    advantages[members.flatten()] = group_advantages(rewards[members.flatten()], size, config.advantage)
    order = torch.randperm(len(kept), generator=seeded("cpu", config.seed, step, "mini-batches"))
    batches = [members[part].flatten().to(device) for part in order.tensor_split(min(config.updates, len(kept)))]
    return batches, advantages.to(device)


def update(config: Config, policy: Policy, reference, optimizer, rollouts, rewards: Tensor, step: int) -> dict:
    """The optimizer steps of one rollout step (Sec. 4.3), one a mini-batch, and what they looked like. policy_loss
    sees the log-probabilities of the whole mini-batch, as leaves of the graph. Their gradients are then carried into
    the model one micro-batch at a time, so that its size changes nothing but memory."""
    model, width = policy.model, rollouts.response_mask.shape[1]
    batches, advantages = mini_batches(config, rollouts, rewards, step)
    row, seen, picked = dict(updates=len(batches), skipped_updates=0), [], []

    def forward(model, rows):
        return response_logprobs(model, rollouts.input_ids[rows], rollouts.attention_mask[rows], width,
                                 temperature=config.temperature, with_entropy=config.method == "entropy_bonus")

    @torch.no_grad()
    def values(model, batch):
        parts = [forward(model, part) for part in batch.split(config.micro_batch or len(batch))]
        return [None if x[0] is None else torch.cat(x) for x in zip(*parts)]

    # The old log-probabilities come from the same rows in the same micro-batches as the new ones, so that every
    # ratio is exactly 1 before the first update. The first mini-batch's are its own: no forward is spent on them.
    old = [None] + [values(model, batch)[0] for batch in batches[1:]]
    for number, (batch, before) in enumerate(zip(batches, old)):
        parts = batch.split(config.micro_batch or len(batch))
        graph = forward(model, batch) if len(parts) == 1 else None
        logprobs, entropy = leaves = [x if x is None else x.detach().requires_grad_()              # [n, T] each
                                      for x in graph or values(model, batch)]
        arguments = (config, logprobs, logprobs.detach() if before is None else before, advantages[batch],
                     rollouts.response_mask[batch])
        key = (model.device, config.seed, step, number, "selection")
        loss = policy_loss(*arguments, seeded(*key), entropy=entropy,
                           ref_logprobs=values(reference, batch)[0] if reference else None)
        loss.backward()
        for part, index in zip(parts, torch.arange(len(batch), device=model.device).split(len(parts[0]))):
            pairs = [(x, leaf.grad[index]) for x, leaf in zip(graph or forward(model, part), leaves)
                     if x is not None and leaf.grad is not None]        # a loss need not use the entropy
            torch.autograd.backward(*zip(*pairs))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # as the authors' code
        if finite := torch.isfinite(loss + norm).item():  # anything else must not reach the weights
            optimizer.step()
        row["skipped_updates"] += not finite
        optimizer.zero_grad()
        with torch.no_grad():
            selected = select_tokens(*arguments, seeded(*key))  # a generator of the same seed: the same tokens
            seen.append(dict(loss=loss.detach(), grad_norm=norm) | anatomy(*arguments, selected))
            picked += rollouts.input_ids[batch, -width:][selected].tolist()
    if batches:
        row |= {key: torch.stack([s[key] for s in seen]).mean(0).tolist() for key in seen[0]}
        row["quadrant_selected"] = [round(x * len(batches)) for x in row["quadrant_selected"]]
        row["selected_fraction"] = len(picked) / int(rollouts.response_mask[torch.cat(batches)].sum())
        row["most_selected"] = dict(Counter(policy.tokenizer.convert_ids_to_tokens(picked)).most_common(20))
    return row | dict(selected_tokens=len(picked))


@contextlib.contextmanager
def entropy_probe(config: Config, policy: Policy, rollouts: Rollouts, rewards: Tensor, row: dict):
    """Fig. 8 on the real policy: around an update, the change of entropy on the same responses, measured; its
    first-order prediction <grad H, d theta> from the update that the optimizer made; and the paper's covariance, of
    advantage and length-normalised log-probability inside each group, also by how many of the group are right."""
    parameters, size, mask = list(policy.model.parameters()), config.group_size, rollouts.response_mask

    def mean_entropy() -> float:  # Eq. 5, mean over tokens, then over responses; its gradient is added up where on
        total = 0.0
        for part in torch.arange(len(mask), device=mask.device).split(config.micro_batch or len(mask)):
            _, entropy = response_logprobs(policy.model, rollouts.input_ids[part], rollouts.attention_mask[part],
                                           mask.shape[1])
            share = (entropy.sum(1) / mask[part].sum(1)).sum() / len(mask)
            if torch.is_grad_enabled():
                share.backward()
            total += share.item()
        return total

    before = mean_entropy()
    slope = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    start = [p.detach().clone() for p in parameters]
    policy.model.zero_grad()
    yield
    with torch.no_grad():
        row["probe_entropy_change"] = mean_entropy() - before
        row["probe_first_order"] = sum((g * (p - s)).sum(dtype=None if g.is_mps else torch.float64).item()
                                       for g, p, s in zip(slope, parameters, start))
    logprob = (rollouts.logprobs.sum(1) / mask.sum(1)).cpu().view(-1, size)                        # [P, G]
    gain = group_advantages(rewards, size, config.advantage).view(-1, size)                        # [P, G]
    covariance = ((logprob - logprob.mean(1, keepdim=True)) * (gain - gain.mean(1, keepdim=True))).mean(1)  # [P]
    row["probe_covariance"] = covariance.mean().item()
    right = rewards.view(-1, size).sum(1)                                                          # [P]
    row["probe_covariance_by_right"] = [covariance[right == n].mean().item() for n in range(size + 1)]  # NaN for none


# What does not shape a run's rows, so that --resume may change it.
NOT_OF_THE_RUN = "steps out resume compare seeds report check_theory eval_only checkpoint_every".split()


def open_run(config: Config) -> tuple[dict, dict]:
    """Make the run folder; under --resume, what its checkpoint holds, or {}, and the log in that: settings, rows and
    samples. It is the truth: the log's files are written anew from it, and what they had beyond is done again."""
    run, path, state = Path(config.out), Path(config.out, "checkpoint.pt"), {}
    settings = {k: v for k, v in asdict(config).items() if k not in NOT_OF_THE_RUN}
    log = dict(settings=settings, rows=[], samples=[])
    with explain(f"--out {run}: no file can be written there"):
        run.mkdir(parents=True, exist_ok=True)
    begun = path.exists() or (run / "metrics.jsonl").exists()
    demand(begun and config.resume or not any(run.iterdir()),
           f"--out {run} is in use: add --resume to go on with its run if it holds one, or choose another folder")
    if config.resume and not (begun or config.compare):
        print(f"note: nothing to resume in {run}: a new run starts there")
    if path.exists():
        with explain(f"{path} is damaged", ": start again in another --out"):
            state = torch.load(path, map_location="cpu", weights_only=True)
            log = json.loads(state["log"])
            demand(log["rows"] and state["model"] and state["optimizer"], "it is not whole")
    changed = [f"--{k.replace('_', '-')} (was {was}, now {v})" for k, v in settings.items()
               if (was := log["settings"].get(k, v)) != v]
    demand(not changed, f"--resume {run}: these settings would change its result: {', '.join(changed)}")
    rows = log["rows"]
    demand(len(rows) <= config.steps + 1, f"--steps {config.steps}: {run} has {len(rows) - 1} behind it already")
    if rows and config.eval_every and len(rows) <= config.steps and rows[-1]["step"] % config.eval_every:
        rows[-1] = {k: v for k, v in rows[-1].items() if not k.startswith("eval_")}  # was due at the old end only
        log["samples"] = [s for s in log["samples"] if s["step"] < rows[-1]["step"]]
    return state, log


def write(path: Path, data):
    """Save with torch so that the file is whole or the old one: to a draft, which is then renamed."""
    draft = path.with_name(path.name + ".tmp")
    with explain(f"{path} cannot be written", "; an older file is untouched"), contextlib.ExitStack() as tidy:
        tidy.callback(draft.unlink, missing_ok=True)
        with open(draft, "wb") as file:
            torch.save(data, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)


def append(path: Path, rows: list[dict], mode="a"):
    """Add rows to a log, at once and for good; or write it anew, by mode "w"."""
    with explain(f"{path} cannot be written", "; a checkpoint is whole: --resume"), open(path, mode) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def read_log(run, name="metrics.jsonl") -> list[dict]:
    """The rows of a log; a torn last line, of a run that was killed, is left out."""
    path = Path(run, name)
    with explain(f"{path} is damaged: not a JSON object with a step on every line"):
        text = path.read_text("utf-8").rpartition("\n")[0] if path.exists() else ""
        rows = json.loads(f"[{text}]".replace("\n", ",\n"))  # as one list, so that an error tells its line
        return sorted(rows, key=lambda row: operator.index(row["step"]))


def read_config(run) -> dict:
    """The settings of a run folder."""
    with explain(f"{run}: no readable config.json in it", "; is it a run folder?"):
        return json.loads(Path(run, "config.json").read_text()) | {}


def train(config: Config) -> list[dict]:
    """Train --model on --data by --method and return the rows of metrics.jsonl, one a rollout step. Row 0 is the
    policy before any update. Row s > 0 tells the rollout of step s, sampled before its update, the update, and, on
    evaluation steps, the policy after it. Everything random is a function of (seed, step) and the checkpoint holds
    the rest, so a run that is killed and resumed writes the rows of an unbroken one."""
    run, (state, log) = Path(config.out), open_run(config)
    rows, samples = log["rows"], log["samples"]
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        policy, held_out, problems = prepare(config, train=True)
        reference = copy.deepcopy(policy.model).requires_grad_(False) if config.method == "ref_kl" else None
        optimizer = torch.optim.AdamW(policy.model.parameters(), lr=config.lr, weight_decay=0.0, fused=True)
        parts = dict(model=policy.model, optimizer=optimizer) | (dict(reference=reference) if reference else {})
        with explain(f"{run}/checkpoint.pt does not fit --model {config.model}", ": start again in another --out"):
            for name in parts if state else ():
                parts[name].load_state_dict(state[name])
        append(run / "metrics.jsonl", rows, "w")
        append(run / "config.json", [log["settings"] | dict(steps=config.steps, torch=torch.__version__)], "w")
        append(run / "samples.jsonl", samples, "w")
        if (config.method, config.updates) == ("kl_cov", 1):
            print("note: with --updates 1 KL-Cov cannot act: at ratio 1 its penalty has no gradient")
        interrupted = []

        def handler(*signal_and_frame):  # the first Ctrl-C finishes the step
            interrupted.append(True)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)

        stack.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, handler))
        bar, accuracy = stack.enter_context(tqdm(range(len(rows), config.steps + 1), "training", disable=None)), ""
        for step in bar:
            row, end = rollout_step(config, policy, reference, optimizer, problems, step), step == config.steps
            shown = f"entropy {row['entropy']:.3f}, reward {row['reward']:.3f}, length {row['response_length']:.1f}"
            if config.eval_every and (step % config.eval_every == 0 or end):
                result, some = evaluate(config, policy, held_out)
                row |= result
                samples += [dict(step=step) | sample for sample in some]
                append(run / "samples.jsonl", samples[-len(some):])
                accuracy = f", avg@{row['eval_k']} {row['eval_avg']:.3f}"
                if bar.disable:  # no terminal
                    print(f"step {step}: {shown}{accuracy}", flush=True)
            bar.set_postfix_str(shown + accuracy)
            if row["skipped_updates"] and not any(r["skipped_updates"] for r in rows):
                print(f"step {step}: a loss or gradient was not finite; the update was skipped")
            rows.append(json.loads(json.dumps(row), parse_constant=lambda name: None))  # JSON has no NaN
            append(run / "metrics.jsonl", rows[-1:])
            hopeless = step > 2 and all(r["skipped_updates"] == r["updates"] > 0 for r in rows[-3:])
            if step % config.checkpoint_every == 0 or end or interrupted or hopeless:
                state = {name: part.state_dict() for name, part in parts.items()}
                write(run / "checkpoint.pt", state | dict(log=json.dumps(log)))
            demand(not hopeless, f"stopped at step {step}: no finite update in three steps; {run} holds the last "
                                 "good weights; try a lower --lr")
            if interrupted and not end:
                print(f"stopped after step {step}; to go on, repeat the command with --resume")
                raise KeyboardInterrupt
        with explain(f"{run}/policy cannot be written", "; the checkpoint is whole: --resume"):
            policy.model.save_pretrained(run / "policy")
            policy.tokenizer.save_pretrained(run / "policy")
        if interrupted:  # in the last step
            raise KeyboardInterrupt
        return rows


def prepare(config: Config, train: bool):
    """The policy, the held-out problems, and the training problems without those, each with its prompt's ids."""
    held_out, problems = load_problems(config, "test"), load_problems(config, "train") if train else []
    texts = {repr(p["problem"]) for p in held_out}
    problems = [p for p in problems if repr(p["problem"]) not in texts]
    demand(len(problems) >= config.prompts or not train,
           f"--data {config.data}: {len(problems)} training problems, but --prompts {config.prompts}")
    policy = load_policy(config)
    for source, found in ((config.data, problems), (config.eval_data or config.data, held_out)):
        template = config.prompt_template or ("{problem}" if source in ARITHMETIC else "")
        for p in found:
            p["ids"] = policy.encode(p["problem"], template)
    longest = max(len(p["ids"]) for p in problems + held_out)
    room = getattr(policy.model.config, "max_position_embeddings", math.inf)
    demand(longest + config.max_new_tokens <= room, f"--max-new-tokens {config.max_new_tokens}: with a prompt of "
           f"{longest} tokens this is more than the {room} that --model {config.model} reads")
    return policy, held_out, problems


def rollout_step(config: Config, policy: Policy, reference, optimizer, problems: list[dict], step: int) -> dict:
    """Sample, reward, update (Sec. 4.3): one row of metrics.jsonl. Step 0 only looks, at the problems of step 1."""
    begun, device, size = time.perf_counter(), policy.model.device, config.prompts
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    epoch, place = divmod(max(step - 1, 0), len(problems) // size)
    order = torch.randperm(len(problems), generator=seeded("cpu", config.seed, epoch, "data")).tolist()
    batch = [problems[i] for i in order[place * size:(place + 1) * size]]
    rollouts, rewards, _ = collect(config, policy, batch, config.group_size, temperature=config.temperature,
                                   generator=seeded(device, config.seed, step, "rollout"))
    lengths, sampled = rollouts.response_mask.sum(1), time.perf_counter()
    last = rollouts.input_ids.gather(1, rollouts.attention_mask.cumsum(1).argmax(1, keepdim=True))  # [N, 1]
    stopped = torch.isin(last, torch.tensor(policy.eos_token_ids, device=device))
    entropy = (rollouts.entropy.sum(1) / lengths).mean().item()  # Eq. 5: over tokens, then over responses
    row = dict(step=step, reward=rewards.mean().item(), entropy=entropy,
               response_length=lengths.float().mean().item(), truncated=1 - stopped.float().mean().item(),
               zero_std_groups=int((rewards.view(-1, config.group_size).std(1) == 0).sum()),
               tokens=int(lengths.sum()), **dict.fromkeys(UPDATE_KEYS))
    if step:
        with entropy_probe(config, policy, rollouts, rewards, row) if config.probe else contextlib.nullcontext():
            row |= update(config, policy, reference, optimizer, rollouts, rewards, step)
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else math.nan  # KiB, on a Mac bytes
    memory = (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else
              peak * (1 if sys.platform == "darwin" else 1024))
    return row | dict(seconds=seconds, sampling_seconds=sampled - begun, update_seconds=begun + seconds - sampled,
                      tokens_per_second=row["tokens"] / seconds, peak_memory_mb=memory / 2 ** 20)


# ---------------------------------------------------------------------------------------------------------------
# 8. The law and the theorems (Sec. 2.4, 3.2)

@dataclass
class EntropyLaw:
    """R = -a exp(H) + b (Eq. 6): the accuracy R that a policy of entropy H has bought, and how well the law fits."""
    a: float
    b: float
    r2: float
    rmse: float

    @property
    def ceiling(self) -> float:
        """The accuracy at entropy 0, b - a: what is left to gain when nothing is left to spend."""
        return self.b - self.a

    def predict(self, entropy):
        """R at an entropy, or at each of a list."""
        return -self.a * torch.as_tensor(entropy, dtype=torch.float64).exp() + self.b


def fit_entropy_law(entropy, accuracy) -> EntropyLaw:
    """Eq. 6 (Fig. 1, 3, 4) by least squares, linear in exp(H), of two lists; UserError unless two entropies differ."""
    ### BEGIN SOLUTION
    spent, gained = torch.as_tensor(entropy, dtype=torch.float64).exp(), torch.as_tensor(accuracy, dtype=torch.float64)
    demand(len(spent) and spent.max() > spent.min(), "the law needs points of at least two different entropies")
    slope = ((spent - spent.mean()) * (gained - gained.mean())).sum() / ((spent - spent.mean()) ** 2).sum()
    law = EntropyLaw(-slope.item(), (gained.mean() - slope * spent.mean()).item(), 0.0, 0.0)
    squares = ((gained - law.predict(entropy)) ** 2).sum()
    law.r2 = (1 - squares / ((gained - gained.mean()) ** 2).sum()).item()
    law.rmse = (squares / len(gained)).sqrt().item()
    return law
    ### END SOLUTION


def tabular_step(logits: Tensor, rewards: Tensor, lr: float, rule: str) -> Tensor:
    """The logits' change in one exact policy-gradient step (App. E): eta pi A ("pg") or eta A ("npg"), [..., V]."""
    policy = logits.softmax(-1)
    advantage = rewards - (policy * rewards).sum(-1, keepdim=True)
    return lr * (policy * advantage if rule == "pg" else advantage)


def tabular_entropy_change(logits: Tensor, rewards: Tensor, lr: float, rule: str) -> tuple[Tensor, Tensor]:
    """Theorems 1 and 2 on a softmax policy with a logit per action: (actual, predicted) change of entropy. actual: H
    after one step minus H before. predicted: -eta Cov_{a~pi}(log pi, pi A) for the vanilla policy gradient ("pg",
    Theorem 1), -eta Cov_{a~pi}(log pi, A) for the natural one ("npg", Theorem 2). Both are Lemma 1, -Cov(log pi,
    change of the logits). logits, rewards [..., V] -> two tensors [...]."""
    ### BEGIN SOLUTION
    change = tabular_step(logits, rewards, lr, rule)                         # eta pi A, or eta A: [..., V]
    logprobs, after = logits.log_softmax(-1), (logits + change).log_softmax(-1)
    policy = logprobs.exp()
    actual = (policy * logprobs).sum(-1) - (after.exp() * after).sum(-1)
    mean_change = (policy * change).sum(-1, keepdim=True)
    predicted = -(policy * (logprobs - (policy * logprobs).sum(-1, keepdim=True)) * (change - mean_change)).sum(-1)
    return actual, predicted
    ### END SOLUTION


def check_theory(out: str):
    """Theorems 1 and 2 along a run of exact updates: a table and a picture. First order: the error goes as eta^2."""
    panels = []
    for rule, lr, name in (("pg", 0.2, "Theorem 1, vanilla policy gradient: -eta Cov(log pi, pi A)"),
                           ("npg", 0.02, "Theorem 2, natural policy gradient: -eta Cov(log pi, A)")):
        generator = torch.Generator().manual_seed(0)
        path = [torch.randn(16, 10, generator=generator, dtype=torch.float64)]                     # [states, V] each
        rewards = torch.rand(16, 10, generator=generator, dtype=torch.float64)
        while len(path) < 2000:
            path.append(path[-1] + tabular_step(path[-1], rewards, lr, rule))
        logits = torch.stack(path)                                                       # [steps, states, V]
        (actual, predicted), half = (tabular_entropy_change(logits, rewards, eta, rule) for eta in (lr, lr / 2))
        ratios = (actual - predicted).norm(dim=-1) / (half[0] - half[1]).norm(dim=-1)              # [steps]
        entropy = torch.distributions.Categorical(logits=logits).entropy()                         # [steps, states]
        columns = torch.stack([entropy.mean(1), actual.mean(1), predicted.mean(1), ratios])        # [4, steps]
        print(f"\n{name}; 16 states, 10 actions, eta {lr}\n   step   entropy   measured dH  predicted dH  "
              "error(eta) / error(eta/2)")
        for step in (0, 1, 10, 50, 100, 200, 500, 1000, 1999):
            print("{:7d} {:9.4f} {:13.3e} {:13.3e} {:12.3f}".format(step, *columns[:, step].tolist()))
        print(f"halving eta divides the error by {ratios.mean():.3f} on average (4: second order)")
        curves = [("measured", range(2000), columns[1:2], dict(color=COLORS["grpo"])),
                  ("predicted", range(2000), columns[2:3], dict(color=COLORS["kl_cov"], linestyle="--"))]
        panels.append((name.split(":")[0], "update", "change of entropy (nats)", curves, dict(xscale="symlog")))
    picture(Path(out, "theory.png"), panels)


# ---------------------------------------------------------------------------------------------------------------
# 9. Reports and pictures

COLORS = dict(grpo="#000000", clip_higher="#E69F00", clip_cov="#0072B2", kl_cov="#D55E00", entropy_bonus="#009E73",
              ref_kl="#CC79A7", pg="#56B4E9")  # Okabe and Ito's, safe for the colour-blind
SHADES = ("#440154", "#3B528B", "#21918C", "#5EC962", "#D0B000")  # of the curves that are no methods: viridis
QUADRANTS = ("A+ p+", "A+ p-", "A- p+", "A- p-")  # advantage A, probability p; + above the mean, - below
COLUMNS = dict(entropy="entropy", response_length="length", eval_avg="avg@k", eval_avg_se="± se", eval_pass="pass@k",
               eval_greedy="greedy", seconds="total s")  # of the table that ends a run


def law_points(rows: list[dict]) -> tuple[list[float], list[float]]:
    """H and R of Eq. 6 at the evaluated steps: H of the step's rollout, R of the policy after its update."""
    points = [(r["entropy"], r["eval_avg"]) for r in rows if None not in (r.get("entropy"), r.get("eval_avg"))]
    return [h for h, _ in points], [r for _, r in points]


def report(run) -> None:
    """Print what a run's log says: its end, the law (Eq. 6), Fig. 2, 5, 8, Table 1, the selected tokens, samples."""
    config, rows = read_config(run), read_log(run)
    print("\n{}: {}, {} on {}, seed {}, {} rows".format(
        run, *(config.get(key) for key in ("method", "model", "data", "seed")), len(rows)))
    if len(rows) < 2:
        return print("  too short to report on: no update is in the log")
    table([("end", [rows])])
    report_law(config, rows)
    updates = [r for r in rows if r.get("cov_mean") is not None]
    if updates:
        first, last = updates[:1], updates[-max(1, len(updates) // 10):]
        for name, part in ((f"step {first[0]['step']}", first), ("last tenth", last)):
            tops = [f"top {p} % {fmean(r[f'cov_top_{p}'] for r in part):.3f}" for p in COV_TOP]
            print(f"  Cov (Table 1), {name}: {', '.join(tops)}, all {fmean(r['cov_mean'] for r in part):.3f}")
        print(f"  {'quadrants (A: advantage, p: probability; + above the mean)':64}" + "    ".join(QUADRANTS))
        selected = sum(r["selected_tokens"] for r in updates) or 1
        for name, key, total in (("share of the tokens", "quadrant_tokens", len(updates)),
                                 ("part of the mean Cov", "quadrant_cov", len(updates)),
                                 ("share of the selected", "quadrant_selected", selected)):
            sums = map(sum, zip(*(r[key] for r in updates)))
            print(f"    {name:60s}" + "  ".join(f"{x / total:7.3f}" for x in sums))
        most = sum((Counter(r["most_selected"]) for r in updates), Counter()).most_common(10)
        print("  most selected tokens: " + (", ".join(f"{printable(t)} {n}" for t, n in most) or "none"))
    keys = ("probe_first_order", "probe_covariance", "probe_entropy_change")
    probed = [r for r in rows if None not in map(r.get, keys)]
    if len(probed) > 2:
        for name, key in (("<grad H, d theta>", "probe_first_order"), ("the covariance", "probe_covariance")):
            spread = torch.tensor([[r[key], r["probe_entropy_change"]] for r in probed], dtype=torch.float64).T.cov()
            print(f"  entropy change per update (Fig. 8), measured on {name}: r = "
                  f"{spread[0, 1] / spread.diag().prod().sqrt():.3f}, slope {spread[0, 1] / spread[0, 0]:.3g}")
        for right, values in enumerate(zip(*(r["probe_covariance_by_right"] for r in probed))):
            if found := [x for x in values if x is not None]:
                print(f"    covariance of prompts with {right} right: {fmean(found):.4f}")
    for sample in read_log(run, "samples.jsonl")[-2:]:
        problem, response, answer = (printable(str(sample[key])) for key in ("problem", "response", "answer"))
        print(f"  sample: {problem} -> {response[:400]} (answer {answer}, reward {sample['reward']:.0f})")


def report_law(config: dict, rows: list[dict]):
    """What `report` says of the law (Eq. 6), its prediction (Fig. 5) and the shares of Fig. 2."""
    entropy, accuracy = law_points(rows)
    if len(set(entropy)) < 2:
        return print(f"  no law: no two different entropies ({len(entropy)} evaluations found; see --eval-every)")
    law = fit_entropy_law(entropy, accuracy)
    print(f"  law (Eq. 6): R = {-law.a:.4f} exp(H) {'-' if law.b < 0 else '+'} {abs(law.b):.4f}; ceiling b - a = "
          f"{law.ceiling:.3f}; R2 {law.r2:.3f}, RMSE {law.rmse:.4f} on {len(entropy)} points")
    for holds, remark in (
            (config.get("method") not in ("grpo", "pg"),
             "the method intervenes on entropy: the paper claims the law for runs without intervention only"),
            (len(entropy) < 10, "few points: a law needs more evaluations than this"),
            (not law.r2 >= 0.9, "a poor fit: do not read a and b as properties of the policy"),
            (max(accuracy) - accuracy[0] < 0.02, "accuracy did not rise by 0.02: this run did not learn"),
            (entropy[-1] > 1.2 * entropy[0], "entropy rose, an explosion: lower --kl-cov-fraction, --clip-cov-ratio, "
                                             "--entropy-coef or --updates")):
        if holds:
            print(f"    {remark}")
    for share, name in ((0.15, "15 %"), (1 / 3, "third")):
        first = max(3, round(share * len(entropy)))
        if first < len(entropy) and len(set(entropy[:first])) > 1:
            early = fit_entropy_law(entropy[:first], accuracy[:first])
            errors = early.predict(entropy[first:]) - torch.tensor(accuracy[first:], dtype=torch.float64)
            print(f"  prediction (Fig. 5) from the first {name} ({first} points): RMSE "
                  f"{errors.square().mean().sqrt():.4f} over the other {len(errors)}, {errors[-1]:+.4f} at the last")
    for share, name in ((1 / 12, "1/12"), (1 / 3, "1/3")):
        at = round(share * (len(entropy) - 1))
        if at and accuracy[-1] > accuracy[0] and entropy[-1] != entropy[0]:  # else there is nothing to share out
            spent, gained = ((x[at] - x[0]) / (x[-1] - x[0]) for x in (entropy, accuracy))
            print(f"  after {at / (len(entropy) - 1):.1%} of the run (Fig. 2: {name}): {spent:.0%} of the entropy spent"
                  f", {gained:.0%} of the gain")


def picture(path: Path, panels: list[tuple]):
    """Draw panels (title, x label, y label, curves, more settings of the axis), an even number, two to a row.
    A curve is (label or None, x, y [seeds, x], style): the mean over the seeds, and their range."""
    try:  # nothing else needs it
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return print("no pictures: they need matplotlib (pip install matplotlib)")
    matplotlib.rcParams.update({"axes.grid": True, "grid.alpha": 0.25, "font.size": 9, "axes.titlesize": 10,
                                "legend.fontsize": 8, "legend.frameon": False, "lines.linewidth": 1.3})
    figure = Figure((9, 1.8 * len(panels)), layout="constrained")
    for axis, (title, across, up, curves, more) in zip(figure.subplots(len(panels) // 2, 2).flat, panels):
        for label, x, y, style in curves:
            y = torch.as_tensor(y, dtype=torch.float64)
            axis.plot(x, y.mean(0), label=label, **style)
            axis.fill_between(x, y.amin(0), y.amax(0), color=style["color"], alpha=0.15, linewidth=0)
        axis.set(title=title, xlabel=across, ylabel=up, **more)
        if "yscale" in more:  # 0.2, not 2 x 10^-1
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.17))
    with explain(f"{path} cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=90, pil_kwargs=dict(optimize=True))
    print(f"picture: {path}")


PANELS = [  # title, unit, keys of the rows that are drawn; beside them stands the law
    ("Policy entropy (Eq. 5)", "nats per token", ["entropy"]),
    ("Held-out accuracy", "avg@k", ["eval_avg"]),
    ("Response length", "tokens", ["response_length"]),
    ("Covariance and the fall of entropy (Fig. 8)", "mean Cov; nats", ["cov_mean", "fall of H in ten steps"]),
    ("Largest covariances (Table 1)", "mean Cov of the top", [f"cov_top_{p}" for p in COV_TOP]),
    ("Mean Cov by quadrant (A advantage, p probability)", "part of the mean Cov", [f"cov {q}" for q in QUADRANTS]),
    ("Tokens selected by quadrant (+ above the mean)", "tokens a step", [f"selected {q}" for q in QUADRANTS])]


def smooth(logs: list[list[dict]], key: str):
    """Steps, and values [logs, steps] of a key: at the steps that every log has, the mean over the nine steps around,
    but evaluations as they are."""
    reach = 0 if key.startswith("eval") else 4
    known = [{r["step"]: r[key] for r in rows if r.get(key) is not None} for rows in logs]
    steps = sorted(set.intersection(*map(set, known)))
    return steps, [[fmean(seed[near] for near in range(step - reach, step + reach + 1) if near in seed)
                    for step in steps] for seed in known]


def draw(runs: list, path: Path):
    """Entropy, accuracy, length and the law for any number of runs, the seeds of a method as their mean and range, and
    their table; for one run also Cov beside the fall of entropy, the quantiles of Table 1, and the quadrants."""
    shown, groups, seen = PANELS[:7 if len(runs) == 1 else 3], {}, Counter()
    panels = [(title, "rollout step" + ", mean of nine" * (keys != ["eval_avg"]), unit, [], {})
              for title, unit, keys in shown]
    panels.append(("The law R = -a exp(H) + b (Eq. 6, Fig. 1)", "entropy (nats per token)", "avg@k", law := [], {}))
    for run in runs:
        label, rows = re.sub(r"-seed\d+$", "", Path(run).resolve().name), read_log(run)
        if not rows and len(runs) > 1:
            continue
        groups.setdefault((Path(run).resolve().parent, label, read_config(run).get("method")), []).append(rows)
        for row, later in zip(rows, rows[10:] + [{}] * 10):  # the keys that only PANELS has
            if None not in (row.get("entropy"), later.get("entropy")):
                row["fall of H in ten steps"] = row["entropy"] - later["entropy"]
            for name in ("cov", "selected"):
                row |= zip((f"{name} {q}" for q in QUADRANTS), row.get(f"quadrant_{name}") or ())
    if groups and len(runs) > 1:
        table([(label, logs) for (_, label, _), logs in groups.items()])
    for (_, label, method), logs in groups.items():
        style = dict(color=COLORS.get(method, "#777777"), linestyle=("-", "--", ":", "-.")[seen[method] % 4])
        seen[method] += 1
        for (*_, curves, more), (_, _, keys) in zip(panels, shown):
            for key, color in zip(keys, SHADES if len(keys) > 1 else [style["color"]]):
                name = key if len(keys) > 1 else label if key == "entropy" else None
                curves.append((name, *smooth(logs, key), style | dict(color=color)))
            if keys[0] in ("entropy", "cov_top_0.02") and any(map(any, curves[-1][2])):  # they span decades
                more["yscale"] = "log"
        entropy, accuracy = (sum(x, []) for x in zip(*map(law_points, logs)))
        dots = style | dict(linestyle="", marker=".", alpha=0.6)
        law.append((None, entropy, [accuracy], dots))
        probed = [(1e3 * r["probe_first_order"], 1e3 * r["probe_entropy_change"]) for rows in logs for r in rows
                  if None not in (r.get("probe_first_order"), r.get("probe_entropy_change"))]
        if probed and len(runs) == 1:  # in the place of the selections, for pg makes none
            predicted, measured = zip(*probed)
            panels[6] = ("Entropy change in an update (Fig. 8)", "<grad H, d theta> (millinats)",
                         "measured (millinats)", [(None, predicted, [measured], dots)], {})
        with contextlib.suppress(UserError):  # too few points for a law
            fit, grid = fit_entropy_law(entropy, accuracy), torch.linspace(min(entropy), max(entropy), 50)
            law.append((f"{label}: R² {fit.r2:.2f}", grid, fit.predict(grid)[None], style))
    picture(path, panels)


def at_end(rows: list[dict], key: str) -> float:
    """A column of the table for one log, NaN for none: all seconds, the last evaluation, else the last tenth's mean."""
    known = [r[key] for r in rows if r.get(key) is not None] or [math.nan]
    return (sum(known) if key == "seconds" else
            known[-1] if key.startswith("eval") else fmean(known[-max(1, len(known) // 10):]))


def table(groups: list[tuple[str, list]]):
    """Print the start and the end of each (name, logs): the mean over its seeds, and the standard error of that."""
    width = max(16, *(len(name) + 1 for name, _ in groups))
    print(f"{'se over problems':{width}}" + "".join(f"{title:>9}" for title in COLUMNS.values()))
    for name, logs in [("before", [rows[:1] for rows in groups[0][1]]), *groups]:
        columns = [[at_end(rows, key) for rows in logs] for key in COLUMNS]
        print(f"{name:{width}}" + "".join(f"{fmean(x):9.3f}" for x in columns).replace("nan", "  -"))
        if len(logs) > 1:
            errors = [torch.tensor(x).std() / len(x) ** 0.5 for x in columns]
            print(f"{'  ± over seeds':{width}}" + "".join(f"{x:9.3f}" for x in errors).replace("nan", "  -"))


def compare(given: dict):
    """Table 2 and Fig. 11 in small: every method on every seed, from the same start; a table and a picture."""
    out = given.get("out") or "runs"
    with explain(f"--seeds {given.get('seeds')}: give numbers with commas, as in 0,1,2"):
        seeds = {int(seed): None for seed in str(given.get("seeds") or given.get("seed") or 0).split(",")}
    runs = [Config(**given | dict(method=method, seed=seed, out=f"{out}/{method}-seed{seed}", resume=True))
            for seed in seeds for method in METHODS]
    for number, config in enumerate(runs, 1):
        print(f"[{number}/{len(runs)}] {config.out}", flush=True)
        train(config)
    draw([config.out for config in runs], Path(out, "comparison.png"))


# ---------------------------------------------------------------------------------------------------------------
# 10. Command line

def parse(arguments: list[str] | None) -> dict:
    """The flags that were given, by the names of Config's fields."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = lambda message: demand(False, message)
    for f in fields(Config):
        default = "{} tiny, {} real".format(*f.default) if isinstance(f.default, tuple) else f.default
        text = f.metadata["help"] + ("" if default in ("", None) or default is False else f" [{default}]")
        options = dict(bool=dict(action="store_true"), list=dict(nargs="+", metavar="RUN")).get(f.type, dict(
            type=dict(int=int, float=float).get(f.type, str), metavar="|".join(f.metadata["choices"]) or None))
        parser.add_argument("--" + f.name.replace("_", "-"), help=text, **options)
    return vars(parser.parse_args(arguments))


def main(arguments: list[str] | None = None) -> int:
    """Do what the flags say; the exit status."""
    for library in ("transformers", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # their lines would stand before ours
    try:
        given = parse(arguments)
        config = Config(**given)
        if config.check_theory:
            check_theory(given.get("out", "runs"))
        elif config.compare:
            compare(given)
        elif config.eval_only:
            policy, held_out, _ = prepare(config, train=False)
            print(json.dumps(dict(data=config.eval_data or config.data, eval_problems=len(held_out)) |
                             evaluate(config, policy, held_out)[0], indent=1))
        else:
            if not config.report:
                train(config)
            runs = list(dict.fromkeys(map(Path, config.report or [config.out])))
            for run in runs:
                report(run)
            draw(runs, Path(runs[0], "report.png") if len(runs) == 1 else Path(runs[0]).parent / "comparison.png")
        return 0
    except KeyboardInterrupt:
        return 130
    except UserError as error:
        message = str(error)
    except RuntimeError as error:  # torch.OutOfMemoryError is one; a CPU raises no more than this
        if not re.search("out of memory|can't allocate memory", str(error)):
            raise
        message = "out of memory: lower --micro-batch (updates), or --prompts or --max-new-tokens (sampling)"
    print(f"entropy_rl.py: {printable(message)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
