"""Pre-flight of embedding and head: rows too large or too small, one that stands out, new ones that would not learn.

Owns those rules. Thresholds as in `preflight.py`.
"""

from __future__ import annotations

import math

from graftlm.health.finding import Finding
from graftlm.health.look import Look

ROW_RATIO = 16.0  # rms of new rows against old ones; mean rows, the smallest sensible start, lie at 1/9
ROW_OUTLIER = 64.0  # rms of one row against the median row; the largest in trained bases is 3 times that
# Mean square of the embedding's median row. Below that share of RMSNorm's eps the first layer sees hardly anything; a
# trained base lies at 50 times eps.
SHARE_OF_EPS = 0.01
LARGEST_RMS = 1e3
UNTRAINED_SHARE = 0.9  # of ln V: the first loss of new pieces whose rows nobody trained yet


def rows_findings(look: Look) -> list[Finding]:
    """The findings on rows; one that stands out is told where no whole group of rows does."""
    return [*_embedding(look), *(_row_sizes(look) or _outliers(look)), *_fixed(look)]


def _embedding(look: Look) -> list[Finding]:
    largest = look.largest_rows.get("embedding")
    rms = look.row_rms["embedding"][0] if "embedding" in look.row_rms else largest.typical_rms if largest else 0.0
    is_tiny = rms * rms < SHARE_OF_EPS * look.norm_eps
    if look.bad_weight or not (is_tiny or rms > LARGEST_RMS):  # an rms may be inf where weights are not
        return []
    kind = "tiny" if is_tiny else "huge"
    why = (
        f"RMSNorm adds {look.norm_eps:g} to their mean square, which drowns it"
        if is_tiny
        else "squares of such numbers leave the range of fp32 sooner or later"
    )
    return [
        Finding(f"{kind}-embedding", "warning", "embedding", None,
                f"The embedding's old rows have rms {rms:.2g} (the median row): {why}.",
                "Take another copy of the base.")
    ]  # fmt: skip


def _row_sizes(look: Look) -> list[Finding]:
    findings = []
    for matrix, (old, new) in look.row_rms.items():
        if not old or not math.isfinite(old + new) or old / ROW_RATIO <= new <= old * ROW_RATIO:
            continue
        kind, less = ("tiny", "small") if new < old else ("huge", "large")
        findings.append(
            Finding(f"{kind}-new-rows", "warning", f"new rows of the {matrix}", None,
                    f"New rows of the {matrix} have rms {new:.2g}, old ones {old:.2g}: so {less} a row distorts the "
                    "gradients behind it.",
                    f"Set grow.{matrix} to subpiece-mean or subpiece-mean-norm.")
        )  # fmt: skip
    return findings


def _outliers(look: Look) -> list[Finding]:
    """A single row far larger than the others: of a base it is damage, of a new piece a start gone wrong."""
    findings = []
    for matrix, row in look.largest_rows.items():
        if not row.typical_rms or not math.isfinite(row.rms) or row.rms <= ROW_OUTLIER * row.typical_rms:
            continue
        named = f"Row {row.row_id} of the {matrix} ({row.text!r})" if row.text else f"Row {row.row_id} of the {matrix}"
        told = (
            f"{named}, of {'a new' if row.is_new else 'an old'} piece, has rms {row.rms:.2g}, the median row "
            f"{row.typical_rms:.2g}: wherever that piece stands it drowns what else is there."
        )
        cure = (
            f"Set grow.{matrix} to subpiece-mean or subpiece-mean-norm."
            if row.is_new
            else "Take another copy of the base: no training makes one row so large."
        )
        cause = "huge-new-rows" if row.is_new else "outlier-row"
        findings.append(Finding(cause, "warning", f"row {row.row_id} of the {matrix}", None, told, cure))
    return findings


def _fixed(look: Look) -> list[Finding]:
    loss = look.first_loss.get("new")
    if not look.are_new_rows_fixed or loss is None or loss < UNTRAINED_SHARE * look.uniform_loss:
        return []
    return [
        Finding("new-rows-fixed", "warning", "trains.rows", None,
                f"trains.rows is none: rows of new pieces stay as they are, and it does not know them yet (first "
                f"loss on new pieces {loss:.2f} nats, knowing nothing {look.uniform_loss:.2f}).",
                "Set trains.rows to new or all, or put a stage before it that trains them (new-rows, full).")
    ]  # fmt: skip
