"""Orthogonal matrices by which K and V are rotated before quantization, per layer and KV head."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from .layer_input import Array

# Largest element of |R R^T - I| that still counts as orthogonal: bf16 matrices pass.
TOLERANCE = 2e-2


class Rotation:
    """Matrices R: what is stored of a row x is the quantized x R; queries and outputs are rotated to match.

    keys, values: per layer (h, d, d), orthogonal; kept as float32. They are a model's constants, like its weights: no
    part of any cache's bytes.
    """

    def __init__(self, keys: Sequence[Array], values: Sequence[Array]) -> None:
        self.keys, self.values = self._checked("keys", keys), self._checked("values", values)
        if [part.shape for part in self.keys] != [part.shape for part in self.values]:
            raise ValueError("rotation: values: expected as many matrices of the same sizes as keys, got others")

    @staticmethod
    def _checked(name: str, layers: Sequence[Array]) -> tuple[Array, ...]:
        if not len(layers):
            raise ValueError(f"rotation: {name}: expected matrices (h, d, d) for every layer, got none")
        made = []
        for index, given in enumerate(layers):
            matrices = np.ascontiguousarray(given, np.float32)
            if matrices.ndim != 3 or matrices.shape[1] != matrices.shape[2] or 0 in matrices.shape:
                raise ValueError(
                    f"rotation: {name}: expected matrices (h, d, d) for layer {index}, got shape {matrices.shape}"
                )
            # Not "> tolerance": NaN is refused too.
            away = np.abs(matrices @ matrices.transpose(0, 2, 1) - np.eye(matrices.shape[1], dtype=np.float32)).max()
            if not away <= TOLERANCE:
                raise ValueError(
                    f"rotation: {name}: expected orthogonal matrices, got R R^T up to {away:.3g} from the identity in "
                    f"layer {index}"
                )
            matrices.setflags(write=False)
            made.append(matrices)
        return tuple(made)

    @classmethod
    def random(cls, layers: int, heads: int, head_dim: int, seed: int = 0) -> Rotation:
        """Uniformly random rotations, another one for every layer and head."""
        rng = np.random.default_rng(seed)

        def draw() -> list[Array]:
            return [np.linalg.qr(rng.standard_normal((heads, head_dim, head_dim)))[0] for _ in range(layers)]

        return cls(draw(), draw())

    @classmethod
    def calibrated(cls, query_moment: Sequence[Array], value_moment: Sequence[Array]) -> Rotation:
        """The eigenvectors of second moments (per layer (h, d, d), d a power of two), times Hadamard's matrix.

        Keys: of the queries that read them; values: of their own (``kvcomp capture`` writes both). What the
        eigenvectors concentrate on few channels, Hadamard's matrix spreads evenly. Source: the OSCAR project's README.
        """
        return cls([_spread(moment) for moment in query_moment], [_spread(moment) for moment in value_moment])

    def fits(self, layers: int, heads: int, head_dim: int) -> bool:
        return len(self.keys) == layers and all(part.shape == (heads, head_dim, head_dim) for part in self.keys)

    @property
    def digest(self) -> str:
        """SHA-256 of all matrices."""
        found = hashlib.sha256()
        for part in (*self.keys, *self.values):
            found.update(part.tobytes())
        return found.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rotation) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        heads, d, _ = self.keys[0].shape
        return f"Rotation({len(self.keys)} layers, {heads} heads, {d} channels, sha256 {self.digest[:16]})"


def _spread(moment: Array) -> Array:
    matrix = np.asarray(moment, np.float64)
    d = matrix.shape[-1]
    if matrix.ndim != 3 or matrix.shape[1] != d or d & (d - 1):
        raise ValueError(
            f"rotation: moment: expected (h, d, d) for every layer, d a power of two, got shape {matrix.shape}"
        )
    if not np.isfinite(matrix).all():
        raise ValueError("rotation: moment: expected finite numbers, got NaN or Inf")
    hadamard = np.ones((1, 1))
    while len(hadamard) < d:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    return np.asarray(np.linalg.eigh((matrix + matrix.transpose(0, 2, 1)) / 2)[1] @ (hadamard / np.sqrt(d)))
