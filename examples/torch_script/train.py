"""Train a small convolutional network with PyTorch, on a GPU when there is one.

The data is the handwritten digits that scikit-learn ships. Alone: ``WANDB_MODE=offline python train.py``.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import wandb
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def network() -> nn.Module:
    """Return a network that takes images, shape (n, 1, 8, 8), and gives ten scores for each."""
    return nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
    )


def main() -> None:
    """Train, log each epoch, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"device: {torch.cuda.get_device_name() if device == 'cuda' else 'cpu'}", flush=True)

    data = load_digits()
    train_x, test_x, train_y, test_y = train_test_split(
        data.images / 16.0, data.target, test_size=0.25, random_state=0, stratify=data.target
    )
    shown = TensorDataset(torch.tensor(train_x, dtype=torch.float32)[:, None], torch.tensor(train_y))
    held_out = torch.tensor(test_x, dtype=torch.float32, device=device)[:, None]
    answers = torch.tensor(test_y, device=device)
    model = network().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)

    with wandb.init(project="digits-torch", config=vars(args) | {"device": device}) as run:
        for epoch in range(1, args.epochs + 1):
            total = 0.0
            for batch_x, batch_y in DataLoader(shown, batch_size=args.batch_size, shuffle=True):
                loss = nn.functional.cross_entropy(model(batch_x.to(device)), batch_y.to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() * len(batch_x)
            with torch.no_grad():
                accuracy = (model(held_out).argmax(dim=1) == answers).float().mean().item()
            run.log({"epoch": epoch, "loss": total / len(shown), "accuracy": accuracy})
            print(f"epoch {epoch:>3}/{args.epochs}  loss {total / len(shown):.4f}  accuracy {accuracy:.4f}", flush=True)

    folder = Path(os.environ.get("RAYLAUNCH_OUTPUT_DIR", "model"))
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), folder / "model.pt")
    print(f"saved {folder / 'model.pt'}")


if __name__ == "__main__":
    main()
