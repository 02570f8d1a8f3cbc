"""Whole conversations into rows: best fit decreasing.

The longest first, each into the row it leaves the least room in. Where two have the same length, `seed` decides which
comes first, so that rows are not all of one kind. Nothing is cut.
"""

from __future__ import annotations

import bisect

import numpy as np


def pack(lengths: np.ndarray, capacity: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Items of `lengths` tokens, each at most `capacity`, into rows of `capacity` tokens.

    Returns (items, starts), int64: row r holds the items `items[starts[r]:starts[r + 1]]`. Deterministic.
    """
    assert len(lengths) == 0 or 0 < lengths.min() <= lengths.max() <= capacity, (lengths, capacity)
    shuffled = np.random.Philox(key=[seed, 0]).random_raw(len(lengths)) if len(lengths) else []
    rows: list[list[int]] = []
    rows_with_room: dict[int, list[int]] = {}  # tokens left -> rows
    rooms: list[int] = []  # its keys, sorted
    for item in np.lexsort((shuffled, -lengths)).tolist():
        length = int(lengths[item])
        i = bisect.bisect_left(rooms, length)
        if i == len(rooms):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room = rooms[i]
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                del rooms[i], rows_with_room[room]
        rows[row].append(item)
        if room > length:
            if room - length not in rows_with_room:
                rows_with_room[room - length] = []
                bisect.insort(rooms, room - length)
            rows_with_room[room - length].append(row)
    starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    items = np.array([item for row in rows for item in row], dtype=np.int64)
    return items, starts
