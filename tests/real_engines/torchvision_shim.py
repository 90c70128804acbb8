"""Make torchvision importable with a torch for which its compiled operators cannot load.

Importing torchvision attaches Python code to the operators `nms` and `qnms`, which its compiled
part would have declared. This shim declares them without code, just before that import; serving a
language model never calls them. If needed, `install_vllm.py` copies this file into the
site-packages of vLLM's environment, where a `.pth` file calls `install`.
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
    """Import hook that finds nothing, but notices the import of torchvision and declares its
    operators.

    The declarations live as long as `library`.
    """

    library: Any = None
    has_noticed = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision" and not self.has_noticed:
            self.has_noticed = True  # before the import of torch, which may look for torchvision, too
            from torch.library import Library  # not at the top: a .pth file runs at every start of Python

            self.library = Library("torchvision", "DEF")
            for operator in OPERATORS:
                self.library.define(operator + SIGNATURE)
        return None


def install() -> None:
    """Install the import hook once.

    It may be called twice, because a `.pth` file runs twice if `lib64` is a link to `lib`.
    """
    if not any(isinstance(finder, DeclaresOperators) for finder in sys.meta_path):
        sys.meta_path.insert(0, DeclaresOperators())
