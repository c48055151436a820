"""The figure of docs/what-bmr-is.md: of two weights, one that goes and one that stays."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.distributions import Normal

from pyro_bmr.plots.theme import BLUE

PRIOR = Normal(0.0, 1.0)

figure, both = plt.subplots(1, 2, figsize=(7.5, 2.9), sharey=True, layout="constrained")
theta = torch.linspace(-2.6, 2.6, 600)
zero = torch.tensor(0.0)
for axes, mean in zip(both, (0.1, 0.75), strict=True):
    posterior = Normal(mean, 0.25)
    before, after = PRIOR.log_prob(zero), posterior.log_prob(zero)
    delta_f = float(before - after)
    axes.plot(theta, PRIOR.log_prob(theta).exp(), "--", color="0.45")
    axes.plot(theta, posterior.log_prob(theta).exp(), color=BLUE)
    axes.axvline(0.0, color="0.85", zorder=0)
    axes.plot(0.0, before.exp(), "o", color="0.45")
    axes.plot(0.0, after.exp(), "o", color=BLUE)
    axes.text(-1.35, 0.27, "prior p", color="0.35", ha="right")
    axes.text(mean + 0.42, 1.0, "posterior q", color=BLUE)
    more = "more" if delta_f < 0 else "less"
    signed = f"{delta_f:+.1f}".replace("-", "−")
    fate = "goes" if delta_f < 0 else "stays"
    axes.set_title(f"zero is {more} likely than before:\nΔF = {signed} nats, the weight {fate}")
    axes.set(xlabel="weight θ", ylim=(0.0, 1.75))
    axes.spines[["top", "right"]].set_visible(False)
both[0].set_ylabel("density")
figure.savefig(Path(__file__).parent / "images" / "what-bmr-is.png", dpi=110)
