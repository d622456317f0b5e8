"""What an audit has found, and how it looks: one row for each code, the worst first."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from lora_inject.audit.codes import CODES, SEVERITIES, Code, Severity
from lora_inject.core.path_groups import grouped
from lora_inject.errors import LoRAInjectError
from lora_inject.printing import REFUSED, STILL, Section, Shown, Tables, plural

_NAMED = 4  # rows of a code in a table
_STYLES: dict[Severity, str] = {"error": REFUSED, "warning": "", "note": STILL}


class Finding(NamedTuple):
    """One thing that was found.

    Example:
        >>> Finding("thawed", "head.weight").meaning
        'It trains, which inject had frozen: no file of an adapter holds it.'

    Attributes:
        code: what it is; the page ``audit_codes`` of the guide lists all.
        path: of the module or parameter.
        detail: what was measured, or "".
    """

    code: str
    path: str
    detail: str = ""

    @property
    def of(self) -> Code:
        """The code with its meaning."""
        return CODES[self.code]

    @property
    def severity(self) -> Severity:
        """How bad it is: "error", "warning" or "note"."""
        return self.of.severity

    @property
    def meaning(self) -> str:
        """What it means."""
        return self.of.meaning

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return self.of.remedy


@dataclass(frozen=True, repr=False)
class Audit(Shown):
    """What was found in a model; ``print`` shows it as a table, or in one line where it is clean.

    Attributes:
        model: the model's class name.
        layers: how many adapted layers there are.
        seen: what was looked at, in words.
        findings: what was found, the worst first.
    """

    model: str
    layers: int
    seen: str
    findings: tuple[Finding, ...]

    @property
    def clean(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    @property
    def codes(self) -> tuple[str, ...]:
        """The codes that were found, each once, the worst first."""
        return tuple(dict.fromkeys(found.code for found in self.findings))

    @property
    def failed(self) -> bool:
        """Whether there is more than notes."""
        return any(found.severity != "note" for found in self.findings)

    @property
    def line(self) -> str:
        """All of it in one line, for logs."""
        counts = {s: sum(f.severity == s for f in self.findings) for s in SEVERITIES}
        told = ", ".join(plural(n, severity) for severity, n in counts.items() if n)
        own = plural(self.layers, "adapted layer")
        return f"Audit of {self.model} ({own}), {self.seen}: {told or 'nothing found'}."

    def require_sound(self) -> None:
        """Raise where there is more than notes.

        Raises:
            LoRAInjectError: there is; the message is the table.
        """
        if self.failed:
            worst = self.findings[0]
            raise LoRAInjectError(f"{self}\n", path=worst.path, remedy=worst.remedy)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        rows = [{**found._asdict(), **found.of._asdict()} for found in self.findings]
        return {"model": self.model, "layers": self.layers, "seen": self.seen, "findings": rows}

    def _tables(self) -> Tables:
        rows, styles, notes = [], list[str](), list[str]()
        for code in self.codes:
            own = [found for found in self.findings if found.code == code]
            places = grouped(own, lambda found: found.path, lambda found: found.detail)
            shown = [(path, group[0].detail) for path, group in places[:_NAMED]]
            if places[_NAMED:]:
                shown.append((f"and {sum(len(group) for _, group in places[_NAMED:]):,} more", ""))
            rows += [(own[0].severity, code, path, detail) for path, detail in shown]
            styles += [_STYLES[own[0].severity]] * len(shown)
            notes.append(f"{code}: {own[0].meaning} {own[0].remedy}")
        columns = ("", "found", "~where", "measured") if rows else ()
        return Tables([Section(self.line, columns, rows, notes, styles)])


def in_order(found: Iterable[Finding]) -> tuple[Finding, ...]:
    """The findings without repetitions, the worst first, codes together."""
    codes = [*CODES]
    unique = dict.fromkeys(found)
    order = {f: (SEVERITIES.index(f.of.severity), codes.index(f.code)) for f in unique}
    return tuple(sorted(unique, key=order.__getitem__))
