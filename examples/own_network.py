"""A diffusion model that knows nothing of this package becomes a meta flow map: train, wrap, check, distil, steer.

The network is a small U-Net of diffusers, trained to predict noise (DDPM) on the 8×8 digits that come with the package;
yours takes its place. Wrapped, it draws from its posteriors by GLASS, in 30 evaluations a draw; distilled, in one.
Under ten minutes on two cores: python examples/own_network.py [OUT] [fraction of the steps]"""

import sys
import time
from pathlib import Path

import diffusers
import torch

import metaflowmaps as mfm
from metaflowmaps.checkpoint import load_classifier
from metaflowmaps.data import Digits
from metaflowmaps.metrics import frechet_distance

OUT = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own-network")
FRACTION = float(sys.argv[2]) if len(sys.argv) > 2 else 1.0
FEW = FRACTION < 0.5  # a trial: everything happens, nothing is learned


def unet():
    """The network, as diffusers has it: unet(x, step) -> an object with .sample."""
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(24, 48),
        norm_num_groups=8, down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def trained(network, images, scheduler, steps):
    """Predict the noise that was added at a random step, as everybody does."""
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x = images[torch.randint(len(images), (64,))]
        noise, step = torch.randn_like(x), torch.randint(1000, (64,))
        loss = (network(scheduler.add_noise(x, noise, step), step).sample - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    return network.eval().requires_grad_(False)


def timed(name, make):
    """What it made, and the seconds of this process that it took."""
    began = time.process_time()
    made = make()
    print(f"{name}: {time.process_time() - began:.0f} s", flush=True)
    return made


torch.manual_seed(0)
train, held_out = (part.tensor() for part in Digits().load())
scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000)
network = timed("training the U-Net", lambda: trained(unet(), train, scheduler, round(800 * FRACTION)))

# 1. say in which convention it speaks, and have it checked on data: None, or a line that says what looks wrong
model = mfm.wrap(network, "noise", time="data-at-0", schedule=scheduler, clip=1.0)
print("check:", model.check(train))

# 2. distil, in two runs: a network of ours learns the wrapped drift, then the map begins as it and is taught by it
settings = {"batch_size": 128, "optimizer": {"name": "soap", "lr": 2e-3, "betas": (0.95, 0.99)}, "check": not FEW}
ours = {"network": {"name": "mlp", "width": 256, "depth": 6, "modulation": True}}
alone = {"loss": {"consistency": {"name": "none"}}, "times": {"context_at_zero": 1.0, "last": 1.0, "late_share": 0.5}}
few, many = (max(2, round(steps * FRACTION)) for steps in (1000, 2000))
drift = timed(
    "learning its drift", lambda: mfm.distill(model, train, OUT / "drift", steps=few, model=ours, **alone, **settings)
)
distilled = timed("distilling", lambda: mfm.distill(drift, train, OUT / "map", steps=many, **settings))

# 3. posterior draws of noised digits that neither has seen: one evaluation against 30
judge, n = load_classifier("digits-judge"), 4 if FEW else len(held_out)
for t in (0.2, 0.5, 0.8):
    x_t = model.path.interpolate(torch.randn(n, 1, 8, 8), held_out[:n], t)
    for name, draw in (("map, 1", distilled.draw), ("GLASS, 30", model.draw)):
        with torch.no_grad():
            draws = timed(f"  t = {t}, {name} evaluations", lambda draw=draw, t=t, x_t=x_t: draw(t, x_t, 1)[0])
        apart = frechet_distance(judge.features(draws), judge.features(held_out[:n]))
        print(f"    Fréchet distance to digits {apart:.2f}")

# 4. steer both to sevens: the reward is one classifier's, judged by another
reward = mfm.rewards.LogitMargin(load_classifier("digits-guide"), 7, strength=0.5)
process, count = mfm.ODE(steps=2 if FEW else 20), 2 if FEW else 16
for name, subject in (("map", distilled), ("wrapped network, GLASS", model)):
    method = mfm.MFMGF(num_draws=4)
    result = timed(f"steering the {name}", lambda s=subject, m=method: mfm.steer(s, reward, count, m, process, seed=0))
    sevens = (judge(result.samples).argmax(1) == 7).float().mean()
    rewarded, calls = float(result.rewards.mean()), result.cost["nfe"]
    print(f"    {float(sevens):.0%} sevens, mean reward {rewarded:.2f}, {calls:.0f} calls each")
