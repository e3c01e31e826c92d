"""Train a small network on several ranks with PyTorch's DistributedDataParallel: one a GPU, or two on CPUs.

The data is the handwritten digits that scikit-learn ships. Alone, where raylaunch is installed:
``WANDB_MODE=offline torchrun --standalone --nproc-per-node=2 train.py``.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
import wandb
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import raylaunch


def images() -> tuple[TensorDataset, torch.Tensor, torch.Tensor]:
    """Return what is shown to the network; and images, shape (n, 64), with their digits, that are held out."""
    pixels, digits = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    shown_x, held_out, shown_y, answers = train_test_split(pixels.float() / 16, digits, test_size=0.25, random_state=0)
    return TensorDataset(shown_x, shown_y), held_out, answers


def main() -> None:
    """Train, log each epoch from rank 0, leave a checkpoint an epoch, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16, help="images of one rank")
    args = parser.parse_args()

    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, ranks, job = dist.get_rank(), dist.get_world_size(), raylaunch.context()

    shown, held_out, answers = images()
    sampler = DistributedSampler(shown, seed=0)  # each rank is shown another part
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(device))
    optimizer = torch.optim.Adam(model.parameters())

    done, latest = 0, job.checkpoint_dir / "latest.pt"
    if latest.exists():
        saved = torch.load(latest, map_location=device, weights_only=True)
        model.module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["epoch"]

    print(f"rank {rank} of {ranks} on {device}, after epoch {done}", flush=True)
    with wandb.init(project="digits-ddp", config=vars(args), mode=None if rank == 0 else "disabled") as run:
        for epoch in range(done + 1, args.epochs + 1):
            sampler.set_epoch(epoch)
            total = torch.zeros(2, device=device)  # loss and images, of this rank, then of all
            for batch_x, batch_y in DataLoader(shown, batch_size=args.batch_size, sampler=sampler):
                loss = nn.functional.cross_entropy(model(batch_x.to(device)), batch_y.to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += torch.tensor([loss.item() * len(batch_x), len(batch_x)], device=device)
            print(f"epoch {epoch:>3}/{args.epochs}  rank {rank}  {total[1]:.0f} images", flush=True)
            dist.all_reduce(total)
            if rank == 0:
                guesses = model.module(held_out.to(device)).argmax(dim=1).cpu()
                accuracy = (guesses == answers).float().mean().item()
                run.log({"epoch": epoch, "loss": (total[0] / total[1]).item(), "accuracy": accuracy})
                raylaunch.report(step=epoch, total=args.epochs)
                state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
                torch.save(state, latest.with_suffix(".part"))
                latest.with_suffix(".part").replace(latest)
    if rank == 0:
        torch.save(model.module.state_dict(), job.output_dir / "model.pt")
        print(f"saved {job.output_dir / 'model.pt'}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
