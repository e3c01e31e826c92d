"""Train a small neural network on the handwritten digits that scikit-learn ships (1,797 real images of 8 by 8 pixels).

Runs as a raylaunch job, and also on its own: ``WANDB_MODE=offline python train.py``.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
import wandb
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

try:
    import raylaunch
except ImportError:  # not installed where this runs on its own: train without it
    raylaunch = None  # type: ignore[assignment]  # a module or nothing


HELD_OUT = 0.25
PIXEL_MAX = 16.0


def save(model: MLPClassifier, folder: Path, facts: dict[str, object]) -> None:
    """Write the network as plain arrays and JSON, which can be loaded without running anybody's code."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {f"weights_{layer}": weights for layer, weights in enumerate(model.coefs_)}
    arrays |= {f"bias_{layer}": bias for layer, bias in enumerate(model.intercepts_)}
    np.savez(folder / "model.npz", **arrays)
    (folder / "model.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Train, log each epoch, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=128, help="units in the hidden layer")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    images, digits = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        images / PIXEL_MAX, digits, test_size=HELD_OUT, random_state=args.seed, stratify=digits
    )
    model = MLPClassifier(hidden_layer_sizes=(args.hidden,), learning_rate_init=args.lr, random_state=args.seed)
    shuffle = np.random.default_rng(args.seed)
    accuracy = 0.0

    with wandb.init(project="digits", config=vars(args)):
        for epoch in range(1, args.epochs + 1):
            losses = []
            for batch in np.array_split(shuffle.permutation(len(train_x)), len(train_x) // args.batch_size):
                model.partial_fit(train_x[batch], train_y[batch], classes=range(10))
                losses.append(model.loss_)
            loss, accuracy = float(np.mean(losses)), float(model.score(test_x, test_y))
            wandb.log({"epoch": epoch, "loss": loss, "accuracy": accuracy})
            if raylaunch:
                raylaunch.report(step=epoch, total=args.epochs)
            print(f"epoch {epoch:>3}/{args.epochs}  loss {loss:.4f}  accuracy {accuracy:.4f}", flush=True)

    folder = Path(os.environ.get("RAYLAUNCH_OUTPUT_DIR", "model"))
    save(model, folder, {"accuracy": accuracy, "held_out": HELD_OUT, "pixel_max": PIXEL_MAX, **vars(args)})
    print(f"saved {folder / 'model.npz'}")


if __name__ == "__main__":
    main()
