"""Load a model that train.py has saved and measure it on the digits that training has not seen.

``python evaluate.py FOLDER``, where FOLDER holds model.npz and model.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def predict(arrays: dict[str, NDArray[np.float64]], images: NDArray[np.float64]) -> NDArray[np.intp]:
    """Run the network on images, shape (n, 64), and return the likeliest digit of each, shape (n,)."""
    last = len(arrays) // 2 - 1
    signal = images
    for layer in range(last + 1):
        signal = signal @ arrays[f"weights_{layer}"] + arrays[f"bias_{layer}"]
        if layer < last:
            signal = np.maximum(signal, 0)
    likeliest: NDArray[np.intp] = signal.argmax(axis=1)
    return likeliest


def main() -> None:
    """Print the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder

    facts = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    with np.load(folder / "model.npz", allow_pickle=False) as saved:
        arrays = dict(saved)
    images, digits = load_digits(return_X_y=True)
    _, images, _, digits = train_test_split(
        images / facts["pixel_max"], digits, test_size=facts["held_out"], random_state=facts["seed"], stratify=digits
    )
    accuracy = float(np.mean(predict(arrays, images) == digits))
    print(f"accuracy on held-out digits: {accuracy:.2f}")


if __name__ == "__main__":
    main()
