"""The section of a report on tasks that were trained on the run's encoder (`launch.py transfer`)."""

from __future__ import annotations

from ssl_jax.experiment.transfer import WORDS, Row, summary
from ssl_jax.report.sections import section, text

NOTE = (
    "Each row is one task with the same head and budget on all starts: mean, half width of the 95 % t-interval over seeds, every seed. "
    "The runs, their commands and protocols are in the folder transfer/."
)


def transfers(rows: list[Row]) -> str:
    """A row for each task, a column for each start; nothing without rows."""
    if not rows:
        return ""
    starts = [start for start in WORDS if any(row.start == start for row in rows)]
    body = []
    for task, metric in dict.fromkeys((row.task, row.metric) for row in rows):
        values = [[row.value for row in rows if (row.task, row.metric, row.start) == (task, metric, start)] for start in starts]
        cells = "".join(f'<td class="value">{text(summary(numbers))}</td>' for numbers in values)
        body.append(f'<tr><td>{text(task)}<div class="note">{text(metric)}</div></td>{cells}</tr>')
    heads = "".join(f'<th class="value">{text(WORDS[start])}</th>' for start in starts)
    table = f"<table><thead><tr><th></th>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return section("Transfers", f'<div class="card"><div class="scroll">{table}</div><p class="note">{text(NOTE)}</p></div>')
