"""Fig. 8 on the real policy: what an update does to the entropy, beside what the theory says it does.

    python .github/probe.py runs/probe [FLAGS]      # on-policy policy gradient: one update a rollout, no clip

The flags are those of entropy_rl.py. At every step it measures, on the responses of the rollout,

- the change of entropy (Eq. 5) that the update makes;
- its first-order prediction <grad H, d theta>, from the change d theta of the weights;
- the paper's covariance, of advantage and length-normalised log-probability inside each group, also by how many of
  the group are right;

and writes them to probe.jsonl in the folder. At the end it prints how measured and predicted change go together.
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch

import entropy_rl as er


def mean_entropy(config, model, rollouts, with_gradient):
    """Eq. 5 on the responses of a rollout: mean over tokens, then over responses; its gradient goes into .grad."""
    mask = rollouts.response_mask
    total = 0.0
    for rows in torch.arange(len(mask), device=mask.device).split(config.micro_batch):
        with torch.set_grad_enabled(with_gradient):
            _, entropy = er.response_logprobs(model, rollouts.input_ids[rows], rollouts.attention_mask[rows],
                                              mask.shape[1])
            part = (entropy.sum(1) / mask[rows].sum(1)).sum() / len(mask)
        if with_gradient:
            part.backward()
        total += part.item()
    return total


def probed_update(config, policy, optimizer, rollouts, rewards, step):
    """Measure, update, measure. Returns the measured change and its prediction."""
    parameters = list(policy.model.parameters())
    before = mean_entropy(config, policy.model, rollouts, with_gradient=True)
    gradient = [p.grad.double() for p in parameters]
    weights = [p.detach().clone() for p in parameters]
    policy.model.zero_grad()
    er.update(config, policy, None, optimizer, rollouts, rewards, step)
    change = mean_entropy(config, policy.model, rollouts, with_gradient=False) - before
    first_order = 0.0
    for p, old, g in zip(parameters, weights, gradient):
        first_order += (g * (p.detach() - old)).sum().item()
    return change, first_order


def group_covariance(config, rollouts, rewards):
    """Cov of advantage and length-normalised log-probability in each group: [P]."""
    G = config.group_size
    mask = rollouts.response_mask
    logprob = ((rollouts.logprobs * mask).sum(1) / mask.sum(1)).cpu().view(-1, G)   # [P, G]
    advantage = er.group_advantages(rewards, G, config.advantage).view(-1, G)        # [P, G]
    logprob = logprob - logprob.mean(dim=1, keepdim=True)
    advantage = advantage - advantage.mean(dim=1, keepdim=True)
    return (logprob * advantage).mean(dim=1)


def correlation(predictor, change):
    """Pearson's r, and the slope of change on the predictor."""
    variance = torch.tensor([predictor, change], dtype=torch.float64).cov()
    r = variance[0, 1] / (variance[0, 0] * variance[1, 1]).sqrt()
    return f"r {r:.3f}, slope {variance[0, 1] / variance[0, 0]:.3g}"


def main():
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    given = {"method": "pg", "updates": 1, "lr": 5e-5, "steps": 150, **er.parse(sys.argv[2:])}
    config = er.Config(**given)
    policy, problems, _ = er.prepare(config)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=config.lr, weight_decay=0.0, fused=True)
    rows = []
    by_right = {}  # covariances of the groups with so many right responses
    with open(folder / "probe.jsonl", "w") as log:
        for step in range(1, config.steps + 1):
            batch = er.step_problems(config, problems, step)
            generator = er.seeded(policy.model.device, config.seed, step, "rollout")
            rollouts, rewards, _ = er.sample_and_reward(config, policy, batch, config.group_size,
                                                        config.temperature, generator)
            covariance = group_covariance(config, rollouts, rewards)
            for right, value in zip(rewards.view(-1, config.group_size).sum(1).int().tolist(), covariance.tolist()):
                by_right.setdefault(right, []).append(value)
            change, first_order = probed_update(config, policy, optimizer, rollouts, rewards, step)
            rows.append({"step": step, "entropy_change": change, "first_order": first_order,
                         "covariance": covariance.mean().item()})
            log.write(json.dumps(rows[-1]) + "\n")
            log.flush()
    change = [row["entropy_change"] for row in rows]
    print("change of entropy on <grad H, d theta>:", correlation([row["first_order"] for row in rows], change))
    print("change of entropy on the covariance:", correlation([row["covariance"] for row in rows], change))
    for right in sorted(by_right):
        print(f"  covariance of groups with {right} right: {er.mean(by_right[right]):.4f} ({len(by_right[right])})")


if __name__ == "__main__":
    main()
