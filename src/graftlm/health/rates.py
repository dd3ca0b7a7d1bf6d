"""What rollbacks leave of a stage's learning rates: how they are cut, written down, read again and told.

Owns the rule whose rate a rollback cuts: a role to blame (adapter, body, old_rows, new_rows) that learns faster than
the stage, by a rate of its own in the recipe's `groups`, is cut alone; else all are cut alike. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

# Measured (docs/log.md, "How deep a cut"): a rate below the ruinous one by a tenth learns nearly as well as its best.
RATE_CUT = 0.1
NAMES = {
    "adapter": "the adapter", "body": "the transformer body", "old_rows": "the old rows", "new_rows": "the new rows",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RateCuts:
    """Shares of the recipe's rates: `of_all` of every role's, and of those in `of_roles` that share besides."""

    of_all: float = 1.0
    of_roles: Mapping[str, float] = field(default_factory=dict)

    def of(self, role: str) -> float:
        """What is left of a role's rate."""
        return self.of_all * self.of_roles.get(role, 1.0)

    def cut(self, culprits: Iterable[str], peak_lr: float, own: Mapping[str, float | None]) -> RateCuts:
        """One cut more, by the rule above; `own` are peak rates of roles that have their own."""
        hot = [role for role in culprits if (own.get(role) or 0.0) * self.of_roles.get(role, 1.0) > peak_lr]
        if not hot:
            return RateCuts(self.of_all * RATE_CUT, self.of_roles)
        lower = {role: self.of_roles.get(role, 1.0) * RATE_CUT for role in hot}
        return RateCuts(self.of_all, {**self.of_roles, **lower})

    def roles_cut_since(self, before: RateCuts) -> list[str]:
        """Whose rates are lower than in `before`; ["all"] where every one is."""
        if self.of_all != before.of_all:
            return ["all"]
        return [role for role in self.of_roles if self.of(role) != before.of(role)]

    def told(self) -> str:
        """A clause: which rates are what from a rollback on."""
        roles = ", ".join(f"{name} to {share}" for name, share in self._shares().items())
        if self.of_all == 1.0 and roles:
            return f"from there on the recipe's learning rate is cut for {roles}, and stays for the others"
        also = f", cut for {roles}" if roles else ""
        return f"the learning rate is {self.of_all:.3g} of the recipe's from there on{also}"

    def left(self) -> str:
        """The same as a thing one can come through with."""
        roles = ", ".join(f"{name} at {share} of theirs" for name, share in self._shares().items())
        every = "the recipe's rates" if self.of_all == 1.0 else f"{self.of_all:.3g} of the recipe's rates"
        return f"{every}, {roles}" if roles else every

    def short(self) -> str:
        """The same for a table."""
        roles = [f"{name} {share}" for name, share in self._shares().items()]
        return ", ".join([f"{self.of_all:.3g}"] * (self.of_all != 1.0 or not roles) + roles)

    def _shares(self) -> dict[str, str]:
        return {NAMES.get(role, role): f"{self.of(role):.3g}" for role in self.of_roles}

    def state(self) -> dict[str, Any]:
        """As a checkpoint and an intervention's line hold it."""
        return {"rate_factor": self.of_all, "rate_factors": dict(self.of_roles)}


def hottest_first(roles: Iterable[str], own: Mapping[str, float | None]) -> list[str]:
    """Roles with those that have the highest rates of their own in front; else in their order."""
    return sorted(roles, key=lambda role: -(own.get(role) or 0.0))


def rate_cuts_of(line: Mapping[str, Any]) -> RateCuts:
    """What `state` wrote; earlier versions knew no roles."""
    return RateCuts(float(line.get("rate_factor", 1.0)), dict(line.get("rate_factors") or {}))
