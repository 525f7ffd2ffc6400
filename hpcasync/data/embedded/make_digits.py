"""Make ``digits.h5`` from scikit-learn's copy of the UCI optical digits.

Run ``python -m hpcasync.data.embedded.make_digits``; the result is the same to the byte.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from hpcasync.data.formats.split import stratified
from hpcasync.data.layout import Arrays
from hpcasync.data.write import write_dataset

SOURCE = (
    "Optical Recognition of Handwritten Digits (test part), E. Alpaydin and C. Kaynak 1998, UCI Machine "
    "Learning Repository, https://doi.org/10.24432/C50P49, CC BY 4.0; by way of scikit-learn's load_digits; "
    "80/20 split stratified by class, seed 0"
)


def make(out: Path) -> Path:
    """Write the 1797 images, 8 x 8 with values 0 to 16, as a data set file."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = images.reshape(-1, 1, 8, 8).astype(np.uint8)
    y = labels.astype(np.int64)
    train, test = stratified("digits", y, 0.2, seed=0)
    arrays = Arrays(
        x[train], y[train], x[test], y[test], name="digits", classes=10, scale=1 / 16, source=SOURCE
    )
    return write_dataset(out, arrays, overwrite=True)


if __name__ == "__main__":
    print(make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("digits.h5")))
