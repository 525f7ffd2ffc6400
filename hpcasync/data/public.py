"""The data sets that have a name: what ships inside the package and what is public elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from hpcasync.errors import unknown

EMBEDDED = {"digits": Path(__file__).parent / "embedded" / "digits.h5"}


@dataclass(frozen=True)
class Public:
    """A public data set.

    Attributes:
        name: the name users write.
        folder: the raw folder's usual name.
        kind: the reader (see `hpcasync.data.formats`).
        url: the official folder of the files.
        files: file names and their hashes: SHA-256, or another algorithm as ``"md5:..."``.
        source: where it comes from, kept in the imported file.
    """

    name: str
    folder: str
    kind: str
    url: str
    files: dict[str, str] = field(default_factory=dict)
    source: str = ""


PUBLIC = {
    "mnist": Public(
        "mnist",
        "mnist",
        "idx",
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        {
            "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        },
        "MNIST, LeCun, Cortes & Burges 1998, http://yann.lecun.com/exdb/mnist/",
    ),
    "fashion-mnist": Public(
        "fashion-mnist",
        "fashion_mnist",
        "idx",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        {
            "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        },
        "Fashion-MNIST, Xiao, Rasul & Vollgraf 2017, https://github.com/zalandoresearch/fashion-mnist, MIT",
    ),
    "cifar-10": Public(
        "cifar-10",
        "cifar-10-batches-py",
        "cifar",
        "https://www.cs.toronto.edu/~kriz/",
        {"cifar-10-python.tar.gz": "md5:c58f30108f718f92721af3b95e74349a"},
        "CIFAR-10, Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html",
    ),
    "cifar-100": Public(
        "cifar-100",
        "cifar-100-python",
        "cifar",
        "https://www.cs.toronto.edu/~kriz/",
        {"cifar-100-python.tar.gz": "md5:eb9058c3a382ffc7106e4002c42a8d85"},
        "CIFAR-100, Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html",
    ),
}


def known() -> tuple[str, ...]:
    """The names that ``--data`` knows."""
    return (*EMBEDDED, *PUBLIC)


def canonical(name: str) -> str | None:
    """The known name that ``name`` stands for (``Fashion_MNIST``, ``cifar10``), or None."""
    squeezed = {n.replace("-", ""): n for n in known()}
    return squeezed.get(name.lower().replace("_", "").replace("-", ""))


def public(name: str) -> Public:
    """The public data set ``name``.

    Raises:
        UsageError: no such name.
    """
    found = canonical(name)
    if found not in PUBLIC:
        raise unknown("public data set", name, PUBLIC)
    return PUBLIC[found]
