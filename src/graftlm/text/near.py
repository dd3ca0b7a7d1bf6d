"""Near duplicates among more dialogues than memory holds.

Near means a Jaccard similarity of five-character shingles at or above a threshold; MinHash finds the candidates, the
shingles themselves decide, so that nothing is dropped on an estimate. Owns that search. Does not know why a dialogue
is there: one that is near to an earlier one which is kept, or to a held-out one, gets its fate.

Three passes, each over files: signatures of all dialogues; those that share a band of theirs, found by sorting; then,
in order, each dialogue against the ones before it that it shares a band with. Those that share one band lie in memory
together, and are compared each with each: where all rows have one long frame, both grow with their number.

Shapes: N dialogues of a chunk, B bands, P permutations, K candidates.

Source: Broder, "On the resemblance and containment of documents", 1997; Leskovec, Rajaraman, Ullman, "Mining of Massive
Datasets", 3.4; `rensa` for MinHash.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from graftlm.run import ProgressShown
from graftlm.text.piles import Piles, piles_for, same_as_before
from graftlm.text.shelf import CHUNK, STILL_THERE, Fate, Shelf

NUM_PERMUTATIONS = 128
SHINGLE_CHARS = 5
MISSED_SHARE = 0.002
"""How many of the pairs just at the threshold the bands may fail to find."""

MAX_CLOSE_LOOKS = 10
"""Texts that share a long frame are all candidates of each other: only the most alike are looked at closely."""

# The estimate's standard deviation is at most sqrt(0.25 / 128) = 0.044: below three of them, no need to look closer.
_ESTIMATE_SLACK = 0.13
# Odd, with bits all over: 2^64 over the golden ratio. Source: Knuth, "The Art of Computer Programming", vol. 3, 6.4.
_MIXER = np.uint64(0x9E3779B97F4A7C15)

_BAND = np.dtype([("hash", np.uint64), ("place", np.int64)])
_MEETING = np.dtype([("place", np.int64), ("start", np.int64), ("number", np.int64)])


def drop_near_duplicates(shelf: Shelf, threshold: float) -> None:
    """Drop what is to be learned and is near to a held-out dialogue, or to an earlier one that is kept."""
    rows = rows_per_band(threshold)
    num_bands = NUM_PERMUTATIONS // rows
    signatures = _Signatures(shelf.folder / "signatures", rows * num_bands)
    bands = Piles(shelf.folder / "bands", _BAND, piles_for(shelf.count(*STILL_THERE) * num_bands * _BAND.itemsize))
    _sign(shelf, signatures, bands, rows)
    meetings = _Meetings(shelf.folder, len(shelf), bands.count)
    meetings.find(bands)
    for place, others in meetings.by_place(shelf.fates):
        near = _nearest(shelf, signatures, place, others, threshold)
        if near is not None:
            shelf.fates[place] = Fate.LEAK if shelf.fates[near] == Fate.HELD_OUT else Fate.NEAR


class _Signatures:
    """MinHash signatures (P,) uint32 by place, on disk."""

    def __init__(self, path: Path, num_permutations: int) -> None:
        self._path, self.num_permutations = path, num_permutations

    def write(self, begin: int, digests_NP: np.ndarray) -> None:
        """Signatures of the dialogues from `begin` on."""
        with self._path.open("r+b" if self._path.exists() else "wb") as stream:
            stream.seek(4 * begin * self.num_permutations)
            stream.write(digests_NP.tobytes())

    def read(self) -> np.ndarray:
        """All of them (N, P), mapped."""
        return np.memmap(self._path, np.uint32, "r").reshape(-1, self.num_permutations)


def _sign(shelf: Shelf, signatures: _Signatures, bands: Piles, rows: int) -> None:
    """Every dialogue's signature, and a record of each of its bands."""
    from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]  # compiled, no stubs

    num_left = shelf.count(*STILL_THERE)
    digests_NP = np.zeros((CHUNK, signatures.num_permutations), np.uint32)
    places: list[int] = []

    def write() -> None:
        begin = places[0] // CHUNK * CHUNK
        signatures.write(begin, digests_NP)
        at_N = np.array(places)
        hashes_NB = band_hashes(digests_NP[at_N - begin], rows)
        records = np.empty(hashes_NB.size, _BAND)
        records["hash"] = hashes_NB.ravel()
        records["place"] = np.repeat(at_N, hashes_NB.shape[1])
        high = (records["hash"] >> np.uint64(32)).astype(np.int64)
        bands.add(high * bands.count >> 32, records)
        places.clear()

    with ProgressShown("near duplicates: signatures", num_left) as shown:
        for number, (place, conversation) in enumerate(shelf.read(*STILL_THERE), start=1):
            if places and place // CHUNK != places[0] // CHUNK:
                write()
            minhash = RMinHash(num_perm=signatures.num_permutations, seed=0)
            minhash.update(shingles(conversation.text))
            digests_NP[place % CHUNK] = minhash.digest()
            places.append(place)
            shown.reach(number)
        if places:
            write()


def band_hashes(digests_NP: np.ndarray, rows: int) -> np.ndarray:
    """A number (N, B) uint64 for every band of `rows` places of a signature, which other bands hardly ever share."""
    bands_NBR = digests_NP.reshape(len(digests_NP), -1, rows).astype(np.uint64)
    hashes_NB = np.repeat(np.arange(bands_NBR.shape[1], dtype=np.uint64)[None], len(bands_NBR), axis=0)
    for row in range(rows):
        hashes_NB = (hashes_NB ^ bands_NBR[..., row]) * _MIXER
        hashes_NB ^= hashes_NB >> np.uint64(29)
    return hashes_NB * _MIXER


class _Meetings:
    """Which dialogues share a band: for each, stretches of a file that hold the earlier ones."""

    def __init__(self, folder: Path, num_places: int, num_piles: int) -> None:
        self._members = folder / "members"
        self._num_places = num_places
        self._meetings = Piles(folder / "meetings", _MEETING, num_piles)

    def find(self, bands: Piles) -> None:
        """Sort every pile of bands; what stands alone in its band meets no one."""
        written = 0
        with self._members.open("wb") as stream:
            for records in bands:
                records = records[np.argsort(records["hash"], kind="stable")]  # by place within a hash
                same_N = same_as_before(records["hash"])
                is_met_N = same_N | np.append(same_N[1:], False)
                members, same_N = records["place"][is_met_N], same_N[is_met_N]
                stream.write(members.tobytes())
                at_N = np.arange(len(members))
                first_N = np.maximum.accumulate(np.where(same_N, 0, at_N))
                meetings = np.empty(int(same_N.sum()), _MEETING)
                meetings["place"] = members[same_N]
                meetings["start"] = written + first_N[same_N]
                meetings["number"] = (at_N - first_N)[same_N]
                self._meetings.add(meetings["place"] * self._meetings.count // max(self._num_places, 1), meetings)
                written += len(members)

    def by_place(self, fates: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Every dialogue to be learned, in order, with the earlier ones that are still there, in order too (K,).

        `fates` may change between one and the next.
        """
        with ProgressShown("near duplicates: candidates", self._num_places) as shown:
            for meetings in self._meetings:
                meetings = meetings[np.argsort(meetings["place"], kind="stable")]
                members = np.memmap(self._members, np.int64, "r")  # anew for every pile: what was touched is let go
                firsts = np.flatnonzero(~same_as_before(meetings["place"])).tolist()
                for first, end in zip(firsts, [*firsts[1:], len(meetings)], strict=True):
                    place = int(meetings["place"][first])
                    if fates[place] != Fate.LEARN:
                        continue
                    stretches = zip(
                        meetings["start"][first:end].tolist(), meetings["number"][first:end].tolist(), strict=True
                    )
                    others_K = np.unique(np.concatenate([members[start : start + num] for start, num in stretches]))
                    others_K = others_K[np.isin(fates[others_K], STILL_THERE)]
                    if len(others_K):
                        yield place, others_K
                    shown.reach(place)


def _nearest(shelf: Shelf, signatures: _Signatures, place: int, others_K: np.ndarray, threshold: float) -> int | None:
    """Of `others_K` the one most alike by estimate that `place` is near to; None where there is none."""
    digests_NP = signatures.read()
    estimates_K = (digests_NP[others_K] == digests_NP[place]).mean(1)
    order_K = np.argsort(-estimates_K, kind="stable")[:MAX_CLOSE_LOOKS]
    closest = others_K[order_K[estimates_K[order_K] >= threshold - _ESTIMATE_SLACK]].tolist()
    own = set(shingles(shelf.at(place).text)) if closest else set()
    for other in closest:
        theirs = set(shingles(shelf.at(other).text))
        if len(own & theirs) >= threshold * len(own | theirs):
            return other
    return None


def rows_per_band(threshold: float) -> int:
    """The longest band that finds all but MISSED_SHARE of the pairs at `threshold`: 1 - (1 - s^rows)^bands."""
    for rows in range(NUM_PERMUTATIONS // 4, 1, -1):
        if (1 - threshold**rows) ** (NUM_PERMUTATIONS // rows) <= MISSED_SHARE:
            return rows
    return 1


def shingles(text: str) -> list[str]:
    """Every five characters in a row; a shorter text is one shingle."""
    return [text[i : i + SHINGLE_CHARS] for i in range(max(1, len(text) - SHINGLE_CHARS + 1))]
