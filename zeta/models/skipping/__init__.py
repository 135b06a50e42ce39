"""Stochastic depth that leaves images out of a branch: which ones, and the tokens of the others.

Imports `zeta.models.attention`, `zeta.models.dropout` and the ground of `zeta`.

A draw belongs to an image (`zeta.models.dropout`), so the host can know all draws of a forward pass
before it begins. A branch is then run on the tokens of the images that keep it. Their number is
rounded up to a multiple of 1/16 of all tokens, so that few shapes occur; the places left over hold
tokens of other images, whose result is set to zero. Where that leaves out no more than 1/16 of the
tokens, and where the host does not know the draws, a branch is run on all.
"""

from zeta.models.skipping.plan import Branch, plan_skips
from zeta.models.skipping.tokens import SHARES

__all__ = ["SHARES", "Branch", "plan_skips"]
