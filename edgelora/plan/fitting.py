"""How a plan gives way to a device that is short of memory: which decision, and in what order.

The base's own codes are kept as long as the weights fit; then blocks grow; last of all, the
embedding gets 4 bits.
"""

from dataclasses import dataclass, field, replace

from edgelora.config import ModelConfig
from edgelora.device import DeviceProfile, max_context
from edgelora.errors import EdgeLoraError
from edgelora.layout import targets
from edgelora.plan.decisions import OUTER, Plan, is_carried
from edgelora.plan.inventory import Inventory
from edgelora.plan.memory import OVERHEAD_BYTES, kv_bytes_per_position, plan_sizes
from edgelora.plan.options import BLOCK_SIZES, ExportOptions

USEFUL_CONTEXT = 2048  # a device gets larger blocks before it gets less than this
CONTEXT_STEP = 256  # positions


@dataclass(frozen=True)
class Fitted:
    """A plan that fits, and why its decisions are not the default ones: decision → why."""

    plan: Plan
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Fitting:
    """One model on one device."""

    config: ModelConfig
    options: ExportOptions
    base: Inventory
    profile: DeviceProfile

    def room(self, plan: Plan) -> int:
        """Positions of kv_cache that fit beside weights and adapters."""
        held = plan_sizes(self.config, plan, self.base).held
        position = kv_bytes_per_position(self.config, plan)
        return max_context(self.profile, held, position, OVERHEAD_BYTES)

    @property
    def needed(self) -> int:
        """Positions without which the model is refused."""
        limit = min(CONTEXT_STEP, self.config.max_position_embeddings)
        return self.options.context_length or limit

    def fit(self, draft: Plan) -> Fitted:
        """Raises EdgeLoraError when nothing helps."""
        keeps_codes = any(
            is_carried(draft, self.base, target)
            for target in targets(self.config)
            if target not in OUTER
        )
        best = Fitted(draft)
        if draft.format == "int4":
            if keeps_codes and self.room(draft) >= self.needed:
                return best
            best = self._with_blocks(draft, drop_codes=keeps_codes)
            if keeps_codes and self.room(best.plan) <= self.room(draft):
                best = Fitted(draft)  # rounding anew would free nothing
        if self.room(best.plan) < self.needed and self._may_shrink_embedding(draft):
            best = self._with_small_embedding(best)
        if self.room(best.plan) < self.needed:
            raise self._refusal(best.plan)
        return best

    def _with_blocks(self, draft: Plan, *, drop_codes: bool) -> Fitted:
        """The smallest blocks that leave room for a useful context, or the largest."""
        default = min(USEFUL_CONTEXT, self.config.max_position_embeddings)
        useful = self.options.context_length or default
        plan = replace(draft, carry="none") if drop_codes else draft
        notes = {"carry": f"{self.profile.id} has no room for them"} if drop_codes else {}
        if self.options.block_size is not None:
            return Fitted(plan, notes)
        for size in BLOCK_SIZES:
            plan = replace(plan, block_size=size)
            if self.room(plan) >= useful:
                why = f"the smallest that leaves {useful} positions on {self.profile.id}"
                return Fitted(plan, notes | {"block_size": why})
        why = f"{self.profile.id} is short of memory: the largest blocks"
        return Fitted(plan, notes | {"block_size": why})

    def _may_shrink_embedding(self, draft: Plan) -> bool:
        asked = self.options.embedding_format or self.options.head_format
        return draft.embedding_format == "int8" and asked is None and draft.flavor == "edgelora"

    def _with_small_embedding(self, fitted: Fitted) -> Fitted:
        carry = "none" if fitted.plan.carry_embedding == "none" else "same"
        plan = replace(
            fitted.plan, embedding_format="int4", head_format="int4", carry_embedding=carry
        )
        why = f"{self.profile.id} has no room for 8 bits"
        if plan.quality == "fast":
            why += (
                "; plainly rounded int4 raises the mean KL from 0.29 to 0.38 on SmolLM2 "
                "(tests/benchmarks/results/quality.csv)"
            )
        dropped = f"{self.profile.id} has no room for more than 4 bits"
        return Fitted(plan, fitted.notes | {"embedding_format": why, "carry_embedding": dropped})

    def _refusal(self, plan: Plan) -> EdgeLoraError:
        held = plan_sizes(self.config, plan, self.base).held
        return EdgeLoraError(
            f"device {self.profile.id}: room for {self.room(plan)} positions beside the weights "
            f"({held / 1e6:.0f} MB): choose a smaller base or context"
        )
