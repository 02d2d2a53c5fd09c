"""Reads an lmdb database for another process, which asks on stdin: lmdb trusts its files, and a damaged one ends it.

A program of its own, so that it starts at once: `python lmdb_reader.py <folder>`. A request is its length and a letter,
then what it is about; an answer is "+" or "-" (an error, in words), its length, and its bytes.

    i        {"entries": ..., "transactions": ...}
    k        the keys, each as an answer of its own, and an empty one
    g<key>   the value
"""

import json
import os
import struct
import sys

MOST_BYTES = 256 * 1024**2  # of a value
LEAST_ENTRY = 16  # bytes of the file that a key and its value take


def main(folder: str) -> None:
    """Answers until stdin ends."""
    import lmdb

    requests, answers = sys.stdin.buffer, sys.stdout.buffer

    def answer(kind: bytes, content: bytes) -> None:
        answers.write(kind + struct.pack("<Q", len(content)) + content)

    try:
        size = os.path.getsize(os.path.join(folder, "data.mdb"))
        database = lmdb.open(folder, readonly=True, lock=False, readahead=False, meminit=False)
        info, stat = database.info(), database.stat()
        if (info["last_pgno"] + 1) * stat["psize"] > size or stat["entries"] * LEAST_ENTRY > size:
            raise ValueError(f"data.mdb is cut off, or claims {stat['entries']} entries in {size} bytes")
    except Exception as error:
        answer(b"-", f"{type(error).__name__}: {error}".encode())
        answers.flush()
        return
    while len(head := requests.read(8)) == 8:
        request = requests.read(struct.unpack("<Q", head)[0])
        try:
            with database.begin() as transaction:
                if request == b"i":
                    told = {"entries": stat["entries"], "transactions": info["last_txnid"]}
                    answer(b"+", json.dumps(told).encode())
                elif request == b"k":
                    for number, key in enumerate(transaction.cursor().iternext(keys=True, values=False)):
                        if number >= stat["entries"]:
                            raise ValueError(f"there are more keys than {stat['entries']}")
                        answer(b"+", key)
                    answer(b"+", b"")
                else:
                    value = transaction.get(request[1:])
                    if value is None or len(value) > MOST_BYTES:
                        raise ValueError("there is no value" if value is None else f"{len(value)} bytes are too many")
                    answer(b"+", value)
        except Exception as error:
            answer(b"-", f"{type(error).__name__}: {error}".encode())
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
