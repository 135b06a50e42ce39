"""An optimizer that zeta does not have: Lion (Chen et al. 2023, algorithm 2)."""

import torch


class Lion(torch.optim.Optimizer):
    """Steps of one size in the direction of an average of gradients."""

    def __init__(self, groups, lr, weight_decay=0.0, short=0.9, long=0.99):
        super().__init__(
            groups, {"lr": lr, "weight_decay": weight_decay, "short": short, "long": long}
        )

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["exp_avg"] = torch.zeros_like(weight)
                average = state["exp_avg"]
                direction = average.lerp(weight.grad, 1 - group["short"]).sign()
                average.lerp_(weight.grad, 1 - group["long"])
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(direction, alpha=group["lr"])
