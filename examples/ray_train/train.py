"""Train a small network on handwritten digits with Ray Train: some workers, a checkpoint after each epoch.

Runs as a raylaunch job (see job.yaml), and also on its own: ``python train.py`` starts a Ray here.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch
from ray import train
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_data_loader, prepare_model
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

HIDDEN = 64
PIXEL_MAX = 16.0


def network() -> nn.Module:
    """Return the network: 64 pixels in, 10 digits out."""
    return nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))


def train_loop(config: dict[str, float]) -> None:
    """Train as one of the workers. What `train.report` gets becomes the job's metrics, in W&B too."""
    images, digits = load_digits(return_X_y=True)
    pixels = torch.tensor(images / PIXEL_MAX, dtype=torch.float32)
    seen_x, held_x, seen_y, held_y = train_test_split(pixels, torch.tensor(digits), test_size=0.25, random_state=0)
    loader = prepare_data_loader(DataLoader(TensorDataset(seen_x, seen_y), batch_size=16, shuffle=True))
    net, first = network(), 1
    checkpoint = train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            saved = torch.load(Path(folder, "model.pt"), weights_only=True)
        net.load_state_dict(saved["model"])
        first = saved["epoch"] + 1
    model = prepare_model(net)
    optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"])
    device = next(model.parameters()).device

    for epoch in range(first, int(config["epochs"]) + 1):
        losses = []
        for batch_x, batch_y in loader:
            loss = nn.functional.cross_entropy(model(batch_x), batch_y)
            optimizer.zero_grad()
            loss.backward()  # averages the gradients over the workers
            optimizer.step()
            losses.append(loss.item())
        with torch.no_grad():
            accuracy = (model(held_x.to(device)).argmax(1).cpu() == held_y).float().mean().item()
        metrics = {"epoch": epoch, "loss": sum(losses) / len(losses), "accuracy": accuracy}
        with tempfile.TemporaryDirectory() as folder:
            if train.get_context().get_world_rank() == 0:
                torch.save({"model": net.state_dict(), "epoch": epoch}, Path(folder, "model.pt"))
                print(f"epoch {epoch}  loss {metrics['loss']:.4f}  accuracy {accuracy:.4f}", flush=True)
                train.report(metrics, checkpoint=Checkpoint.from_directory(folder))
            else:
                train.report(metrics)


def main() -> None:
    """Train, and keep the last model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="give each worker a GPU")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()
    result = TorchTrainer(
        train_loop,
        train_loop_config={"epochs": args.epochs, "lr": args.lr},
        scaling_config=ScalingConfig(num_workers=args.workers, use_gpu=args.gpu),
        run_config=RunConfig(name="digits", failure_config=FailureConfig(max_failures=1)),
    ).fit()
    output = Path(os.environ.get("RAYLAUNCH_OUTPUT_DIR", "model"))
    result.checkpoint.to_directory(output)
    print(f"accuracy on held-out digits: {result.metrics['accuracy']:.2f}; saved {output / 'model.pt'}")


if __name__ == "__main__":
    main()
