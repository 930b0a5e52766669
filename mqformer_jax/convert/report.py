"""The report of a conversion, which lists every tensor by name."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Report:
    """The names of all tensors, grouped by the result of their conversion.

    loaded: copied unchanged. reshaped: transposed, split, packed or stacked. missing: our parameters that no tensor
    filled. unused: the checkpoint's tensors that no rule read. mismatched: shapes that do not fit, or copies of one
    tensor that differ. ignored: the checkpoint's tensors without a counterpart in our model, with the reason.
    """

    loaded: list[str] = dataclasses.field(default_factory=list)
    reshaped: list[str] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)
    unused: list[str] = dataclasses.field(default_factory=list)
    mismatched: list[str] = dataclasses.field(default_factory=list)
    ignored: list[str] = dataclasses.field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every parameter is filled, every tensor is used or ignored, and nothing is mismatched."""
        return not (self.missing or self.unused or self.mismatched)

    def table(self, longest: int = 0) -> str:
        """Return a text with the number and the names of the tensors in each group.

        longest: the largest number of names to list for each of "loaded", "reshaped" and "ignored"; 0 lists all.
        """
        blocks = []
        for field in dataclasses.fields(self):
            names = getattr(self, field.name)
            shown = names[:longest] if longest and field.name in ("loaded", "reshaped", "ignored") else names
            rest = [f"  ... and {len(names) - len(shown)} more"] if len(shown) < len(names) else []
            blocks.append("\n".join([f"{field.name}: {len(names)}", *(f"  {name}" for name in shown), *rest]))
        return "\n".join(blocks)
