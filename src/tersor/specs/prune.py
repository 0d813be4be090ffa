"""Which parts of a network go."""

from __future__ import annotations

import dataclasses as dc
import math

from tersor.errors import SpecError
from tersor.specs.spec import Spec, one_of, require

MASKED = ("unstructured", "n_m", "stripe")  # zeros in a weight of its old shape
REMOVED = ("channel", "filter", "neuron", "block")  # parts that physically go
STRUCTURES = (*MASKED, *REMOVED)
SCOPES = ("layer", "global", "auto")
SCHEDULES = ("one_shot", "iterative", "gradual")


@dc.dataclass(frozen=True)
class Prune(Spec, kind="prune"):
    """Remove a share `sparsity` (0 to 1, exclusive of 1) of what has the lowest saliency.

    structure    what goes as one piece. Zeros in a weight that keeps its shape: unstructured (single
                 weights), n_m (`pattern`), stripe (one position of one filter, Meng 2020). Physically
                 removed: channel (filters, neurons and all that is coupled to them), filter (channels
                 of convolutions only), neuron (of linear layers only), block (residual branches).
    scope        "layer" removes that share of every layer, "global" ranks all layers together, "auto"
                 chooses the share of each layer from its measured sensitivity; for structures that
                 are removed, with sparsity 0 and macs 0, the total too.
    distance     above 0, for scope "auto": the most that the network's outputs may move away from the
                 original's (KL divergence in nats, the mean over unlabelled inputs); the total sparsity
                 is the largest found within it, in place of `sparsity`.
    macs         above 0, for structures that are removed: the share of the multiplications that may
                 stay, in place of `sparsity`.
    pattern      of n_m: "N:M" keeps N of every M weights along the inputs.
    floor        least density of a layer; `multiple_of`: kept channels are rounded up to multiples.
    schedule     one_shot; iterative: equal shares of what is left in `rounds` steps; gradual: cubic in
                 `rounds` steps (Zhu and Gupta 2017). Between steps the network recovers.
    reconstruct  weights that stay are fitted to the layer's former outputs by least squares on
                 unlabelled inputs.
    exclude      layers left alone: exact names, or `re:PATTERN` (a full match).
    """

    sparsity: float = 0.5
    criterion: str = "l1"
    structure: str = "unstructured"
    scope: str = "layer"
    distance: float = 0.0
    macs: float = 0.0
    pattern: str = "2:4"
    floor: float = 0.01
    multiple_of: int = 1
    schedule: str = "one_shot"
    rounds: int = 1
    reconstruct: bool = False
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, words in (("floor", "the least density of a layer"), ("macs", "a share")):
            value = getattr(self, name)
            require(0 <= value <= 1, f"prune.{name} is {words}, 0 to 1, got {value!r}")
        require(
            0 <= self.sparsity < 1,
            f"prune.sparsity is the share removed: at least 0 and below 1, got {self.sparsity!r}",
        )
        require(
            math.isfinite(self.distance) and self.distance >= 0,
            f"prune.distance must be finite and 0 (none) or more, got {self.distance!r}",
        )
        one_of("prune.structure", self.structure, STRUCTURES)
        one_of("prune.scope", self.scope, SCOPES)
        one_of("prune.schedule", self.schedule, SCHEDULES)
        for name in ("multiple_of", "rounds"):
            value = getattr(self, name)
            require(value >= 1, f"prune.{name} must be at least 1, got {value}")
        require(
            isinstance(self.reconstruct, bool),
            f"prune.reconstruct must be true or false, got {self.reconstruct!r}",
        )
        _ = self.kept_of
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        require(
            self.distance == 0 or self.scope == "auto",
            f"prune.distance is for scope auto, got {self.distance} with scope {self.scope}",
        )
        removed = self.structure in REMOVED
        require(
            removed or (self.macs == 0 and self.multiple_of == 1),
            "prune.macs and prune.multiple_of are for structures that are removed "
            f"({', '.join(REMOVED)}); {self.structure} leaves zeros in weights of their old shape",
        )
        require(
            self.structure != "n_m" or self.scope == "layer",
            f"prune.structure n_m keeps the same share everywhere: scope {self.scope} has no meaning",
        )
        require(
            self.schedule != "one_shot" or self.rounds == 1,
            f"prune.rounds is for schedule iterative or gradual, got {self.rounds} with one_shot",
        )

    @property
    def kept_of(self) -> tuple[int, int]:
        """(N, M) of `pattern`. Raises SpecError where it is not N:M with 0 < N < M."""
        kept, _, of = self.pattern.partition(":")
        if not (kept.isdecimal() and of.isdecimal() and 0 < int(kept) < int(of)):
            raise SpecError(f'prune.pattern must be "N:M" with 0 < N < M, got {self.pattern!r}')
        return int(kept), int(of)
