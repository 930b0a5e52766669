"""The report of a conversion, with the names of all tensors."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Report:
    """The names of all tensors, grouped by the result of their conversion.

    loaded: tensors that were copied unchanged. reshaped: tensors that were transposed, split, packed or stacked.
    missing: parameters of the model that the checkpoint did not fill completely. unused: tensors that no conversion
    rule read. mismatched: tensors whose shape does not fit, or that should equal another tensor but differ.
    ignored: tensors that are known to have no counterpart in the model, with the reason.
    """

    loaded: list[str] = dataclasses.field(default_factory=list)
    reshaped: list[str] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)
    unused: list[str] = dataclasses.field(default_factory=list)
    mismatched: list[str] = dataclasses.field(default_factory=list)
    ignored: list[str] = dataclasses.field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Return whether every parameter is filled, every tensor is used or ignored, and nothing is mismatched."""
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
