"""Train a small network step by step, and log the loss and accuracy of every step to W&B."""

import os
import sys

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # the matrices are small, and threads would blur what is measured

import numpy as np
import wandb

steps = int(sys.argv[1])
dice = np.random.default_rng(0)
centers = dice.normal(size=(10, 64))
labels = dice.integers(10, size=4096)
images = (centers[labels] + dice.normal(scale=2.0, size=(4096, 64))).astype(np.float32)
first = dice.normal(scale=0.1, size=(64, 64)).astype(np.float32)
second = dice.normal(scale=0.1, size=(64, 10)).astype(np.float32)

with wandb.init(project="bench") as run:
    for step in range(steps):
        batch = slice(step * 64 % 4096, step * 64 % 4096 + 64)
        x, y = images[batch], labels[batch]
        hidden = np.maximum(x @ first, 0)
        scores = hidden @ second
        odds = np.exp(scores - scores.max(axis=1, keepdims=True))
        odds /= odds.sum(axis=1, keepdims=True)
        loss = -np.log(odds[np.arange(64), y]).mean()
        right = (odds.argmax(axis=1) == y).mean()
        odds[np.arange(64), y] -= 1
        back = (odds @ second.T) * (hidden > 0)
        second -= 0.01 / 64 * hidden.T @ odds
        first -= 0.01 / 64 * x.T @ back
        run.log({"loss": float(loss), "accuracy": float(right)})
