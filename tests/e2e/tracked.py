"""What trackers have written, read back."""

import struct
from pathlib import Path


def scalars(folder: Path) -> dict[str, list[float]]:
    """Of all TensorBoard event files below."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, list[float]] = {}
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend(event.value for event in events.Scalars(tag))
    return found


BLOCK, HEADER = 32_768, struct.Struct("<IHB")  # of LevelDB's log format: checksum, length, kind of fragment
LAST = {1, 4}  # kinds: whole, first, middle, last


def wandb_records(folder: Path) -> list:
    """Every record of the one offline run below: config, history, artifacts and all."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    content, place, payload, records = file.read_bytes(), 7, b"", []
    while place + HEADER.size <= len(content):
        left = BLOCK - place % BLOCK
        if left < HEADER.size:
            place += left
            continue
        _, length, kind = HEADER.unpack_from(content, place)
        payload += content[place + HEADER.size : place + HEADER.size + length]
        place += HEADER.size + length
        if kind in LAST:
            records.append(Record.FromString(payload))
            payload = b""
    return records
