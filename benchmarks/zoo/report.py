"""The table of all networks as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def _of(rows: Sequence[Row], family: str, mode: str) -> Row | None:
    return next((row for row in reversed(rows) if row["family"] == family and row["mode"] == mode), None)


def _line(row: Row) -> str:
    error = str(row.get("error", "")).strip().splitlines()
    if error:
        return f"{row.get('stage', 'begin')}: {error[0][:160].replace('|', '/')}"
    left = row.get("left") or []
    if (row.get("share") or 0) >= 0.9 or not left:
        return ""
    return "; ".join(f"{kind} {share} %" for kind, _, share, _ in left[:3])


def _whole(row: Row) -> str:
    value = row.get("whole_db")
    if value is None:
        return ""
    if value == float("inf"):
        return "equal"
    draws = row.get("draws") or []
    return f"{value:.0f} dB" + (f" (itself: {min(draws):.0f})" if draws else "")


def table(rows: Sequence[Row], families: Sequence[str], modes: Sequence[str], peers: Sequence[str]) -> str:
    """Return one row per family, preceded by a summary of how many succeeded.

    Args:
        rows: The rows of the file; for the same family and mode the last is used.
        families: Families in order.
        modes: Modes in order of preference; the first with a row is used.
        peers: Other tools, with a column each.
    """
    found = {f: next((r for m in modes if (r := _of(rows, f, m))), None) for f in families}
    done = [row for row in found.values() if row and row.get("stage") == "done"]
    most = [row for row in done if (row.get("share") or 0) >= 0.9]
    took = Counter(row["took"] for row in done)
    late = [row for row in found.values() if row and "error" in row and row.get("steps")]
    lines = [
        f"{len(done)} of {len(families)} families end in an int8 network that was verified, saved and loaded "
        f"({', '.join(f'{mode} {count}' for mode, count in took.most_common())}); {len(most)} of them have at least "
        f"90 % of their multiply-accumulates in int8. After the first step {len(late)} failed. "
        f"{sum(row is None for row in found.values())} were not run.",
        "",
        *(
            f"- {peer}: {sum(r.get('stage') == 'done' for r in of_peer)} of {len(of_peer)}"
            for peer in peers
            if (of_peer := [r for f in families if (r := _of(rows, f, peer))])
        ),
        "",
        "| family | network | M parameters | input | mode | MACs in int8 | whole network | prepare, s | convert, s "
        + "".join(f"| {peer} " for peer in peers)
        + "| what fails, or what stays float |",
        "|---" * (10 + len(peers)) + "|",
    ]
    for family, row in found.items():
        theirs = [_of(rows, family, peer) for peer in peers]
        marks = "".join(f"| {'' if r is None else 'yes' if r.get('stage') == 'done' else 'no'} " for r in theirs)
        if row is None:
            lines.append(f"| {family} | | | | | | | | {marks}| not run |")
            continue
        done_ = row.get("stage") == "done"
        share = row.get("share")
        size = "x".join(map(str, row.get("input", [])[1:]))
        lines.append(
            f"| {family} | {row['network']} | {row['parameters'] / 1e6:.2f} | {size} "
            f"| {row.get('took', '') if done_ else 'fails'} | {'' if share is None else f'{100 * share:.1f} %'} "
            f"| {_whole(row)} | {row.get('prepare_s', '')} | {row.get('convert_s', '')} {marks}| {_line(row)} |"
        )
    return "\n".join(lines)
