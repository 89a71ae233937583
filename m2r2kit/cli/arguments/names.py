"""The names that a user may give, known without importing what bears them; tests hold the two together."""

from ...common import ROOT
from ...experts import registry

MODEL = ROOT / "data" / "pocket-dense"
MOE = ROOT / "data" / "pocket-moe"
PEERS = ("draft-model", "eagle", "medusa", "kangaroo", "deed")  # those that are trained
METHODS = ("plain", "mlx_lm", "early-exit", "m2r2", "m2r2-tree", "prompt-lookup", "lookahead", *PEERS)
EXIT_KINDS = ("m2r2", "lens", "bare", "mixture-of-depths", "shallow")  # trained for exits
EXIT_METHODS = (
    *("m2r2", "m2r2-blind", "m2r2-confidence", "m2r2-random", "m2r2-oracle", "m2r2-static"),
    *("m2r2-equal", "m2r2-equal-confidence", "lens-arla", "static", "calm"),
    *("saturation", "skipdecode", "layerskip", "m2r2-linear", "m2r2-copy", "m2r2-p", "calm-linear"),
    *("calm-copy", "mixture-of-depths", "shallow"),
)
POLICIES, PREDICTORS = tuple(registry.POLICIES), tuple(registry.PREDICTORS)
TRAINED = registry.TRAINED  # predictors of experts
FORMS = ("block", "attention", "adapter")
