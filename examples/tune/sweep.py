"""Look for a good network for handwritten digits with Ray Tune: four trials, each with a W&B run of its own.

Runs as a raylaunch job (see job.yaml), and also on its own: ``WANDB_MODE=offline python sweep.py`` starts a Ray
here.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
from ray import tune
from ray.air.integrations.wandb import WandbLoggerCallback
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

PIXEL_MAX = 16.0


def trial(config: dict[str, float]) -> None:
    """Train one network, and report after each epoch how good it is."""
    images, digits = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(images / PIXEL_MAX, digits, test_size=0.25, random_state=0)
    model = MLPClassifier((int(config["hidden"]),), learning_rate_init=config["lr"], random_state=0)
    shuffle = np.random.default_rng(0)
    for epoch in range(1, int(config["epochs"]) + 1):
        for batch in np.array_split(shuffle.permutation(len(train_x)), len(train_x) // 16):
            model.partial_fit(train_x[batch], train_y[batch], classes=range(10))
        tune.report({"epoch": epoch, "loss": model.loss_, "accuracy": model.score(test_x, test_y)})


def main() -> None:
    """Run the sweep, and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()
    os.environ.setdefault("WANDB_PROJECT_NAME", "digits")  # raylaunch sets it; the callback asks for it
    tuner = tune.Tuner(
        trial,
        param_space={
            "hidden": tune.grid_search([16, 64]),
            "lr": tune.grid_search([1e-4, 1e-3]),
            "epochs": args.epochs,
        },
        tune_config=tune.TuneConfig(metric="accuracy", mode="max", max_concurrent_trials=2),
        run_config=tune.RunConfig(name="digits", callbacks=[WandbLoggerCallback()]),
    )
    best = tuner.fit().get_best_result()
    found = {"config": best.config, "accuracy": best.metrics["accuracy"]}
    output = Path(os.environ.get("RAYLAUNCH_OUTPUT_DIR", "best"))
    output.mkdir(parents=True, exist_ok=True)
    (output / "best.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"best accuracy on held-out digits: {found['accuracy']:.2f} with {found['config']}")


if __name__ == "__main__":
    main()
