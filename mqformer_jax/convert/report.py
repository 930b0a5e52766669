"""What became of every tensor of a conversion, by name."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Report:
    """loaded: taken as they are; reshaped: transposed, split, packed or stacked. missing: leaves of ours that nothing
    filled.
    unused: tensors of theirs that nothing read. mismatched: shapes that do not fit, or aliases that are not equal.
    ignored: tensors known to have no counterpart, with the reason.
    """

    loaded: list[str] = dataclasses.field(default_factory=list)
    reshaped: list[str] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)
    unused: list[str] = dataclasses.field(default_factory=list)
    mismatched: list[str] = dataclasses.field(default_factory=list)
    ignored: list[str] = dataclasses.field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Every leaf of ours was filled, every tensor of theirs read or known."""
        return not (self.missing or self.unused or self.mismatched)

    def table(self, longest: int = 0) -> str:
        """A block a kind: its count and its names; of what went well at most `longest` (0: all)."""
        blocks = []
        for field in dataclasses.fields(self):
            names = getattr(self, field.name)
            shown = names[:longest] if longest and field.name in ("loaded", "reshaped", "ignored") else names
            rest = [f"  ... and {len(names) - len(shown)} more"] if len(shown) < len(names) else []
            blocks.append("\n".join([f"{field.name}: {len(names)}", *(f"  {name}" for name in shown), *rest]))
        return "\n".join(blocks)
