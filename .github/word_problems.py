#!/usr/bin/env python3
"""English word problems for a small pretrained language model: small numbers, one or two steps, an
operation to choose.

    python word_problems.py FOLDER
    python entropy_rl.py --method grpo --model google/gemma-3-270m --data FOLDER/train.jsonl \\
        --eval-data FOLDER/test.jsonl --prompt-template "$(cat FOLDER/prompt.txt)" --stop $'\\n'

FOLDER gets train.jsonl (2,000 problems), dev.jsonl (200), test.jsonl (200), in which no problem
stands twice, prompt.txt (worked examples, then {problem}) and words.txt (every prompt with its
worked solution: what a model whose vocabulary is trimmed must be able to write). A response ends
with its line.
"""
import json
import random
import sys
from pathlib import Path

SIZES = {"train": 2000, "dev": 200, "test": 200}
PROMPT = """Question: 3 tables have 4 cups each. How many cups are there?
Solution: 3 * 4 = 12. Answer: 12
Question: {problem}
Solution:"""
NAMES = """Adam Alice Anna Ben Carl Clara David Emma Eric Grace Henry Jack Jane John Kate Laura Leo
Lucy Mark Mary Nina Oscar Paul Peter Rosa Sam Sara Tina Tom Will""".split()
THINGS = """apples balls beads books buttons cakes cards coins cookies eggs flowers keys lemons
marbles nuts oranges pencils pens shells stamps stickers stones tickets toys""".split()
TEXTS = {
    "a + b": [
        "{x} has {a} {things} and {y} has {b}. How many {things} do they have together?",
        "{x} has {a} {things} and buys {b} more. How many {things} does {x} have now?",
        "There are {a} {things} on a table and {b} in a bag. How many {things} are there in all?"],
    "a - b": [
        "{x} has {a} {things} and loses {b}. How many {things} are left?",
        "There are {a} {things} in a box. {x} takes {b}. How many {things} are in the box now?",
        "{x} has {a} {things} and gives {b} to {y}. How many {things} does {x} have now?"],
    "n * c": [
        "{x} has {n} bags with {c} {things} in each. How many {things} does {x} have?",
        "{x} buys {n} boxes of {c} {things}. How many {things} does {x} buy?",
        "{x} finds {c} {things} a day. How many {things} does {x} find in {n} days?"],
    "a + b - d": [
        "{x} has {a} {things}, buys {b} more and loses {d}. How many {things} are left?"],
    "n * c + b": [
        "{x} buys {n} boxes of {c} {things} and finds {b}. How many {things} does {x} have now?"],
    "n * c - d": [
        "{x} has {n} bags of {c} {things} and gives {d} to {y}. How many {things} are left?"]}
WEIGHTS = [4, 4, 4, 1, 1, 1]


def answers(a, b, c, d, n):
    """The answer of every formula for these numbers."""
    return {"a + b": a + b, "a - b": a - b, "n * c": n * c,
            "a + b - d": a + b - d, "n * c + b": n * c + b, "n * c - d": n * c - d}


def make_problem(rng):
    """One problem: its text, the calculation and the answer as text."""
    formula = rng.choices(list(TEXTS), WEIGHTS)[0]
    b = rng.randint(2, 9)
    numbers = {"a": b + rng.randint(2, 12), "b": b, "c": rng.randint(2, 9),
               "d": rng.randint(2, 5), "n": rng.randint(2, 5)}
    x, y = rng.sample(NAMES, 2)
    text = rng.choice(TEXTS[formula])
    problem = text.format(x=x, y=y, things=rng.choice(THINGS), **numbers)
    calculation = " ".join(str(numbers.get(part, part)) for part in formula.split())
    return problem, calculation, str(answers(**numbers)[formula])


def main():
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    seen = set()
    words = []
    for split, size in SIZES.items():
        rows = []
        while len(rows) < size:
            problem, calculation, answer = make_problem(rng)
            if problem in seen:
                continue
            seen.add(problem)
            rows.append(json.dumps({"problem": problem, "answer": answer}) + "\n")
            solution = f" {calculation} = {answer}. Answer: {answer}\n"
            words.append(PROMPT.replace("{problem}", problem) + solution)
        (folder / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
    (folder / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    (folder / "words.txt").write_text("".join(words), encoding="utf-8")


if __name__ == "__main__":
    main()
