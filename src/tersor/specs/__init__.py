"""What the user asks for: frozen, comparable, JSON round trip, no tensors.

A spec is a request (`Prune`, `Quantize`, `Factorize`, `Share`, `Squeeze`, `Finetune`, `Recipe`,
`Budget`); a `Plan` is the answer of a method: one decision per layer, which can be printed, saved and
applied again to a fresh instance.
"""

from tersor.specs.budget import Budget
from tersor.specs.factorize import Factorize
from tersor.specs.finetune import Finetune
from tersor.specs.plan import LayerPlan, Plan, Recipe
from tersor.specs.prune import Prune
from tersor.specs.quantize import GRANULARITIES, WEIGHT_CODES, Quantize
from tersor.specs.share import Share
from tersor.specs.spec import KINDS, Spec, from_dict
from tersor.specs.squeeze import Squeeze

__all__ = [
    "GRANULARITIES",
    "KINDS",
    "WEIGHT_CODES",
    "Budget",
    "Factorize",
    "Finetune",
    "LayerPlan",
    "Plan",
    "Prune",
    "Quantize",
    "Recipe",
    "Share",
    "Spec",
    "Squeeze",
    "from_dict",
]
