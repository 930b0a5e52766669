"""The report of a conversion, which lists every tensor by name."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Report:
    """Names of tensors by the result of the conversion.

    loaded: copied unchanged. reshaped: transposed, split, packed or stacked. missing: our parameters that no tensor
    filled. unused: their tensors that nothing read. mismatched: shapes that do not fit, or aliases that differ.
    ignored: tensors without a counterpart, with the reason.
    """

    loaded: list[str] = dataclasses.field(default_factory=list)
    reshaped: list[str] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)
    unused: list[str] = dataclasses.field(default_factory=list)
    mismatched: list[str] = dataclasses.field(default_factory=list)
    ignored: list[str] = dataclasses.field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every parameter of ours is filled and every tensor of theirs is used or ignored."""
        return not (self.missing or self.unused or self.mismatched)

    def table(self, longest: int = 0) -> str:
        """Return the count and the names of each kind. longest: most names per kind without problems (0: all)."""
        blocks = []
        for field in dataclasses.fields(self):
            names = getattr(self, field.name)
            shown = names[:longest] if longest and field.name in ("loaded", "reshaped", "ignored") else names
            rest = [f"  ... and {len(names) - len(shown)} more"] if len(shown) < len(names) else []
            blocks.append("\n".join([f"{field.name}: {len(names)}", *(f"  {name}" for name in shown), *rest]))
        return "\n".join(blocks)
