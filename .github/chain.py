"""Draws chain.png from the eval.json of the runs that README lists. Run it in the repository."""

import json
from pathlib import Path

from matplotlib.figure import Figure


def top1(name):
    return json.loads(Path(f"runs/{name}/eval.json").read_text())["linear_top1"]


figure = Figure((10, 3.4), layout="constrained")
left, right = figure.subplots(1, 2)
chain = ["vicreg", "chain-0.5", "vicreg-exp", "chain-1.5", "vicreg-ctr", "chain-2.5", "simclr"]
for t, name in enumerate(chain):
    for run in Path("runs").glob(f"{name}-[0-2]"):
        left.plot(t / 2, top1(run.name), "o", color="C0", alpha=0.7)
untrained = json.loads(Path("runs/vicreg-0/eval-random-init.json").read_text())["linear_top1"]
left.axhline(untrained, color="grey", linestyle=":")
left.text(0, untrained + 0.5, "untrained encoder", color="grey")
left.set_xticks(range(4), chain[::2])
left.set(title="the chain, 40 epochs, up to 3 seeds", ylabel="linear top-1 (%)", ylim=(50, 76))
sizes = [64, 256, 1024, 4096]
for color, name in zip(("C0", "C1", "C2"), ("vicreg", "vicreg-ctr", "simclr")):
    for kind, style in (("wide", "-"), ("narrow", "--")):
        values = [top1(f"{name}-{kind}-{d}") for d in sizes]
        right.semilogx(sizes, values, style, marker=".", color=color, label=f"{name}, {kind}")
right.set_xticks(sizes, sizes)
right.set(title="figure 1: projectors 2048-2048-d and d-d-d", xlabel="d")
right.legend(loc="upper left", bbox_to_anchor=(1, 1))
figure.savefig(".github/chain.png", dpi=120)
