"""What a bag may ask of its reader: files in its folder, plain metadata and tables, memory in proportion to its size.

rosbags decompresses whatever it is given to whatever size that has. Here every announced size is held against the
compressed one, and the announced size is the most that decompression may give.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

from rosbags.rosbag2 import Reader, storage_mcap

from sparserefine_ros.untrusted import beside, load_yaml, parse_yaml

MAX_EXPANSION = 100
"""Compressed data may grow by this factor; camera images grow by less than 10, pictures of one colour by hundreds."""
ALWAYS_ALLOWED = 2**28
"""Bytes to which any chunk, message or file may grow whatever its size: 256 MiB."""
MAX_MESSAGE = 2**30
"""Bytes of the largest message: 1 GiB, twice a frame of 67 megapixels in rgba16."""
_PLAIN = ("CREATE TABLE", "CREATE INDEX", "CREATE UNIQUE INDEX")

zstd = storage_mcap.zstd


def check_files(path: Path) -> None:
    """Raises ValueError or OSError where the bag at ``path`` names files elsewhere, or holds more than data."""
    if path.is_dir():
        files, tables, packed = _listed_files(path)
    else:
        files, tables, packed = [path], path.suffix == ".db3", False
    if not all(file.is_file() for file in files):
        raise ValueError("it is no file")
    if packed:
        _check_expanded_files(files)
    elif tables:
        for file in files:
            check_tables(file)


def _listed_files(path: Path) -> tuple[list[Path], bool, bool]:
    """What ``metadata.yaml`` says of a folder: its files, whether they are SQLite's, whether each is compressed."""
    metadata = load_yaml(path / "metadata.yaml")["rosbag2_bagfile_information"]
    for topic in metadata["topics_with_message_count"]:
        qos = topic["topic_metadata"].get("offered_qos_profiles")
        if isinstance(qos, str):  # YAML within YAML, as before kilted
            parse_yaml(qos)
    # Old bags put their folder's name before the file's; a reader takes the last part, and so do we.
    names = [PurePath(str(name)).name for name in metadata["relative_file_paths"]]
    if odd := [name for name in names if set(name) & set("?#%")]:
        raise ValueError(f"file name {odd[0]!r:.80} would be read as a URI; rename the file")
    files = [beside(path / "metadata.yaml", name) for name in names]
    packed = str(metadata.get("compression_mode", "")).lower() == "file"
    return files, metadata["storage_identifier"] == "sqlite3", packed


def check_tables(file: Path) -> None:
    """ValueError where a SQLite file holds views, triggers, virtual tables or computed columns: its queries could run
    for ever, which those of plain tables cannot. Likewise where its reader would open another file, or miss messages.
    """
    if set(str(file)) & set("?#%"):
        raise ValueError(f"path {str(file)!r:.200} would be read as a URI, for its ?, # or %; rename the folder")
    log = file.with_name(f"{file.name}-wal")
    if log.is_file() and log.stat().st_size:
        raise ValueError(
            f"{log.name} holds messages that {file.name} does not have yet: the recording goes on, or was cut short; "
            f"fold them in with `sqlite3 {file.name} 'PRAGMA wal_checkpoint(TRUNCATE)'`"
        )
    try:
        with contextlib.closing(sqlite3.connect(f"file:{file.resolve().as_uri()[7:]}?immutable=1", uri=True)) as db:
            rows = db.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    except sqlite3.Error as error:
        raise ValueError(f"{file.name}: {error}") from error
    for name, sql in rows:
        words = str(sql).upper().replace("(", " ").split()
        if not " ".join(words).startswith(_PLAIN) or "AS" in words:
            raise ValueError(f"{file.name}: {name!r:.40} is no plain table; a bag has plain tables alone")


def open_reader(path: Path) -> Any:
    """An open reader of rosbags', in which nothing expands without bound; ValueError, or anything rosbags raises."""
    check_files(path)
    storage_mcap.DECOMPRESSORS["zstd"] = expand_zstd
    storage_mcap.DECOMPRESSORS["lz4"] = _expand_lz4
    reader = Reader(path)
    reader.open()
    try:
        for connection in reader.connections:
            for qos in connection.ext.offered_qos_profiles:
                if not isinstance(qos.depth, int):  # of an mcap's own YAML: compared below, aliases and all
                    raise ValueError(f"topic {connection.topic!r:.80} has a QoS depth that is no number")
        for storage in getattr(reader.storage, "storages", [reader.storage]):
            _check_chunks(getattr(storage, "chunks", ()))
    except BaseException:
        reader.close()
        raise
    return reader


def messages(reader: Any, connections: Sequence[Any]) -> Iterator[tuple[int, bytes]]:
    """(time in ns, CDR bytes) of the messages of ``connections``."""
    storage = reader.storage
    each = storage.metadata.compression_mode == "message"
    if each:  # rosbags' own decompression of single messages has no bound, so it is left out
        storage.metadata = storage.metadata._replace(compression_mode=None)
    try:
        for _, time_ns, data in reader.messages(connections):
            yield time_ns, expand_zstd(data, MAX_MESSAGE) if each else bytes(data)
    finally:
        if each and reader.is_open:
            storage.metadata = storage.metadata._replace(compression_mode="message")


def expand_zstd(data: bytes, size: int) -> bytes:
    """``data`` decompressed; ValueError where that is more than ``size`` or out of proportion."""
    limit = min(size, _allowed(len(data)))
    expanded = bytearray()
    while data:  # frames may follow each other
        decoder = zstd.ZstdDecompressor()
        expanded += decoder.decompress(data, limit - len(expanded) + 1)
        if len(expanded) > limit:
            raise ValueError(f"{len(data)} bytes of zstd expand to more than {limit}")
        if not decoder.eof:
            raise ValueError(f"{len(data)} bytes of zstd end too early")
        data = decoder.unused_data
    return bytes(expanded)


_lz4 = storage_mcap.lz4_decompress


def _expand_lz4(data: bytes, size: int) -> bytes:
    if size > _allowed(len(data)):
        raise ValueError(f"{len(data)} bytes of lz4 expand to {size}")
    return bytes(_lz4(data))  # lz4 cannot grow by more than 255


def _allowed(size: int) -> int:
    return max(ALWAYS_ALLOWED, MAX_EXPANSION * size)


def _check_chunks(chunks: Any) -> None:
    """Chunks that overlap in time are held together, all of them where someone wants it so."""
    if len({chunk.chunk_start_offset for chunk in chunks}) < len(chunks):
        raise ValueError("one chunk is listed more than once")
    expanded, stored = (sum(getattr(c, f"{kind}_size") for c in chunks) for kind in ("uncompressed", "compressed"))
    if expanded > _allowed(stored):
        raise ValueError(f"chunks of {stored} bytes expand to {expanded}")


def _check_expanded_files(files: list[Path]) -> None:
    """rosbags expands compressed files into the temporary folder, which must hold them."""
    free = shutil.disk_usage(tempfile.gettempdir()).free // 2
    limit = min(free, _allowed(sum(file.stat().st_size for file in files)))
    size = 0
    for file in files:
        with zstd.open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                size += len(block)
                if size > limit:
                    raise ValueError(f"{file.name} expands to more than {limit} bytes; decompress the bag first")
