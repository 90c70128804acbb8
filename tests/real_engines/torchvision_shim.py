"""Let torchvision be imported beside a torch for which its compiled operators cannot load.

Importing torchvision attaches Python code to the operators `nms` and `qnms`, which its compiled part would have declared. Here they are
declared without code, just before that import; nobody calls them while a language model is served. `install_vllm.py` copies this file
into the site-packages of vLLM's environment, where it is needed, and a `.pth` file calls `install`.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

OPERATORS = ("nms", "qnms")
SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class DeclaresOperators(MetaPathFinder):
    """Finds nothing itself: it only notices that torchvision is about to be looked for. Declarations live as long as `library` does."""

    library: Any = None
    has_noticed = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision" and not self.has_noticed:
            self.has_noticed = True  # first, should the import of torch look for torchvision too
            from torch.library import Library  # here, since a .pth file runs at every start of this Python

            self.library = Library("torchvision", "DEF")
            for operator in OPERATORS:
                self.library.define(operator + SIGNATURE)
        return None


def install() -> None:
    """Safe to call twice: a `.pth` file is run twice where `lib64` is a link to `lib`."""
    if not any(isinstance(finder, DeclaresOperators) for finder in sys.meta_path):
        sys.meta_path.insert(0, DeclaresOperators())
