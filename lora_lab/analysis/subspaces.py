"""The directions of several ΔW compared with each other, two by two."""

from collections.abc import Mapping
from itertools import combinations

from torch import Tensor

from lora_lab.analysis.directions import grassmann_distance, similarity
from lora_lab.report.subspace_pairs import SubspacePair

Spans = Mapping[tuple[str, str], Tensor]
"""(site, side) → orthonormal directions, one a column: (features, directions) in float64."""


def compare_spans(spans: Mapping[str, Spans]) -> list[SubspacePair]:
    """φ and Grassmann's distance of each two updates, at each site and side that both have.

    `spans` has the directions of each update under its name. A side that has other features in the
    other update, or no direction in one of them, is left out.
    """
    pairs = []
    for one, other in combinations(spans, 2):
        for site, side in (key for key in spans[one] if key in spans[other]):
            U, V = spans[one][site, side], spans[other][site, side]
            k = min(U.shape[1], V.shape[1])
            if len(U) == len(V) and k:
                distance = grassmann_distance(U[:, :k], V[:, :k])
                phi = similarity(U, V).numpy()
                pairs.append(SubspacePair(one, other, site, side, phi, distance, len(U)))
    return pairs
