"""What was skipped of the data, why, and whether it exceeds a budget."""

from collections import Counter
from dataclasses import dataclass, field

NAMES_KEPT = 20  # of bad records
ENOUGH_BAD = 20  # records: from then on their share is judged before the end
MAX_SHOWN = 500  # characters of an error's place and detail: names in hostile shards may be endless


class BadRecord(ValueError):
    """A record that cannot be used; `reason` is a short stable name to count by.

    `plain` is the error in a program without the option that `detail` advises; what it then says is `otherwise`.
    """

    def __init__(self, reason: str, where: str, detail: str = "", otherwise: str | None = None):
        self.reason, self.where = reason, where
        self.plain = self._message(detail if otherwise is None else otherwise)
        super().__init__(self._message(detail))

    def _message(self, detail: str) -> str:
        shown = f" ({detail[:MAX_SHOWN]})" if detail else ""
        return printable(f"{self.where[:MAX_SHOWN]}: {self.reason}{shown}")


@dataclass
class BadRecords:
    """Counts what was skipped by reason, keeps the first names, and stops past a share of all data.

    A file in which nothing can be read is a failed file: it counts as no record and has a budget of its own.
    """

    max_fraction: float  # of all records seen, and of all bytes of files, in [0, 1]
    seen: int = 0
    reasons: Counter = field(default_factory=Counter)
    names: list[str] = field(default_factory=list)
    max_failed_files: int = 0
    failed: list[str] = field(default_factory=list)  # files, each with what it is
    files: list[tuple[int, float]] = field(default_factory=list)  # (bytes, share lost) of each that was read
    noted: Counter = field(default_factory=Counter)  # findings that cost no record, by kind
    examples: dict[str, str] = field(default_factory=dict)  # of each kind noted
    options: bool = True  # whether the program has options of these names, and those that choose keys

    def add(self, error: BadRecord) -> None:
        self.reasons[error.reason] += 1
        if len(self.names) < NAMES_KEPT:
            self.names.append(str(error) if self.options else error.plain)

    def note(self, what: str, where: str) -> None:
        """Count a finding that costs no record."""
        self.noted[what] += 1
        self.examples.setdefault(what, printable(where[:MAX_SHOWN])[:MAX_SHOWN])

    def update(self, other: "BadRecords") -> None:
        """Add what another has counted."""
        self.seen += other.seen
        self.reasons.update(other.reasons)
        self.names += other.names[: NAMES_KEPT - len(self.names)]
        self.failed += other.failed
        self.files += other.files
        self.noted.update(other.noted)
        self.examples = {**other.examples, **self.examples}

    def check(self, final: bool = False) -> None:
        """Raise ValueError when more than `max_fraction` of the records seen were bad, once there are ENOUGH_BAD.

        When `final`: however few, lost bytes included, or when more than `max_failed_files` files failed.
        """
        if final and len(self.failed) > self.max_failed_files:
            most = f", more than max_failed_files={self.max_failed_files}" if self.options else ", expected all"
            raise ValueError(
                f"nothing could be read from {len(self.failed)} of {len(self.failed) + len(self.files)} input files"
                f"{most}: {'; '.join(self.failed[:NAMES_KEPT])}. Restore them"
                + (", leave them out of the inputs, or allow more" if self.options else ", or move them elsewhere")
            )
        bad, lost = self.reasons.total(), self.lost_share() if final else 0.0
        share = lost + (1 - lost) * bad / max(self.seen, 1)
        cut = sum(lost == 1 for _, lost in self.files)
        if bad and (final or bad >= ENOUGH_BAD) and share > self.max_fraction:
            raise ValueError(
                f"{bad} of {self.seen} records are bad"
                + (f"; with the bytes lost {100 * share:.3g} % of the data" if lost else "")
                + (f", in which {cut} files that end too early count as lost whole" if lost and cut else "")
                + (f", more than max_bad_fraction={self.max_fraction}" if self.options else ", expected none")
                + f": {self.summary()}"
                + (f". First: {'; '.join(self.names[:3])}" if self.names else "")
                + ("" if self.options else ". Restore or remove them")
            )

    def lost_share(self) -> float:
        """Return the share of all files' bytes that was lost.

        How much of a cut file is missing is unknown: all of it counts as lost, and as no shorter than the mean.
        """
        if not self.files:
            return 0.0
        mean = sum(size for size, _ in self.files) / len(self.files)
        weights = [max(size, mean) if lost == 1 else size for size, lost in self.files]
        return sum(w * lost for w, (_, lost) in zip(weights, self.files, strict=True)) / sum(weights)

    def summary(self) -> str:
        counts = [f"{reason}: {count}" for reason, count in sorted(self.reasons.items())]
        return ", ".join([*counts, *([f"failed files: {len(self.failed)}"] if self.failed else [])]) or "none"

    def remarks(self) -> list[str]:
        """Return a line for each failed file and each kind of finding that cost no record."""
        examples = {what: f", such as {where}" for what, where in self.examples.items()}
        failed = [f"failed file {name}" for name in self.failed[:NAMES_KEPT]]
        return failed + [f"{what}: {count}{examples.get(what, '')}" for what, count in sorted(self.noted.items())]


def printable(text: str) -> str:
    """Escape what could move a terminal's cursor or begin a new line in a log."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
