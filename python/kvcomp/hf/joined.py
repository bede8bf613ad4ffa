"""Linear layers that read the same rows (queries, keys and values; gate and up), as one product in compiled decode
steps: few rows times a small matrix do not fill a GPU.

The weights are put into one tensor, of which the layers' own parameters become parts, so that nothing is held twice;
``Joined.undo`` gives every layer memory of its own again. Inside of ``with joined.active()`` the first of the layers
that is called computes the product for all, and the others take theirs from it; other rows than the first one's are a
product of their own."""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..siblings import SETS


class _Part(torch.nn.Linear):
    """One of several layers, while they are active."""

    _kvc_weight: torch.Tensor  # of all layers
    _kvc_bias: torch.Tensor | None
    _kvc_rows: tuple[int, int]  # of these: its own
    _kvc_held: list[torch.Tensor]  # what the first one was called with, and the product
    _kvc_last: bool

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        held = self._kvc_held
        if not held or held[0] is not input:
            held[:] = [input, torch.nn.functional.linear(input, self._kvc_weight, self._kvc_bias)]
        begin, end = self._kvc_rows
        out = held[1][..., begin:end]
        if self._kvc_last:
            held.clear()
        return out


class _Set:
    """Layers that are joined."""

    def __init__(self, layers: list[torch.nn.Linear]) -> None:
        self.layers = layers
        self.weight = _one(layers, "weight")
        self.bias = None if layers[0].bias is None else _one(layers, "bias")
        self.held: list[torch.Tensor] = []

    def parts(self) -> Iterator[tuple[torch.nn.Linear, dict[str, Any]]]:
        end = 0
        for layer in self.layers:
            begin, end = end, end + layer.out_features
            yield layer, {
                "_kvc_weight": self.weight, "_kvc_bias": self.bias, "_kvc_rows": (begin, end), "_kvc_held": self.held,
                "_kvc_last": layer is self.layers[-1],
            }  # fmt: skip

    def undo(self) -> None:
        for layer in self.layers:
            for name, whole in (("weight", self.weight), ("bias", self.bias)):
                parameter = getattr(layer, name)
                # What has been replaced or moved since is somebody else's.
                if whole is not None and _storage(parameter) == _storage(whole):
                    with contextlib.suppress(torch.OutOfMemoryError):  # as good where it is
                        parameter.data = parameter.data.clone()


class Joined:
    """The sets of layers below ``modules`` that can be joined, joined."""

    def __init__(self, modules: Iterable[torch.nn.Module]) -> None:
        every = list(modules)
        uses = Counter(id(parameter) for module in every for parameter in module.parameters(recurse=False))
        self._sets: list[_Set] = []
        try:
            for module in every:
                for names in SETS:
                    layers: list[Any] = [getattr(module, name, None) for name in names]
                    if _fit(layers, uses):
                        self._sets.append(_Set(layers))
        except BaseException:
            self.undo()
            raise

    def __len__(self) -> int:
        return len(self._sets)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        try:
            for each in self._sets:
                for layer, settings in each.parts():
                    vars(layer).update(settings)
                    layer.__class__ = _Part
            yield
        finally:
            for each in self._sets:
                each.held.clear()
                for layer, settings in each.parts():
                    layer.__class__ = torch.nn.Linear
                    for name in settings:
                        vars(layer).pop(name, None)

    def undo(self) -> None:
        """Every layer holds its own weights, as before."""
        for each in self._sets:
            each.undo()
        self._sets = []


def _one(layers: list[torch.nn.Linear], name: str) -> torch.Tensor:
    """The parameters of this name in one tensor, of which they become parts."""
    parameters = [getattr(layer, name) for layer in layers]
    whole = torch.cat([parameter.detach() for parameter in parameters])
    end = 0
    for parameter in parameters:
        begin, end = end, end + len(parameter)
        parameter.data = whole[begin:end]
    return whole


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _fit(layers: list[Any], uses: Counter[int]) -> bool:
    """Plain layers of one kind, whose parameters nobody else holds."""
    if any(type(layer) is not torch.nn.Linear for layer in layers):
        return False
    kinds = set()
    for layer in layers:
        parameters = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
        for parameter in parameters:
            alone = parameter.untyped_storage().nbytes() == parameter.nbytes and parameter.is_contiguous()
            if type(parameter) is not torch.nn.Parameter or not alone or uses[id(parameter)] != 1:
                return False
        kinds.add((layer.in_features, layer.bias is None, layer.weight.dtype, layer.weight.device))
    return len(kinds) == 1
