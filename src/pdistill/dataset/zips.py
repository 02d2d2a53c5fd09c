"""Members of a zip in memory, within limits: a few bytes can stand for more than any memory holds.

Nothing is extracted to a disk, so that no name in a zip leads anywhere.
"""

import zipfile

import numpy as np

MOST_BYTES = 256 * 1024**2  # of an encoded picture
MOST_ARRAY = 4 * 1024**3  # bytes of an array of pixels; a batch of Downsampled ImageNet has 1.6 GB
MOST_RATIO, FREE = 100, 1024**2  # bytes from each compressed one, of members larger than FREE; of pictures' arrays 1.1
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # the others unpack a block at a time, of whatever size


def unpacked(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """A member's content. Raises ValueError where it is packed otherwise than zips are, or larger than pictures are."""
    _check(member, MOST_BYTES)
    return archive.read(member)


def array_in(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """The array of that name in an npz file. Raises KeyError where there is none, ValueError for what no array is.

    An array of objects, which would be pickled, is one of these, and so is one that claims more than it holds.
    """
    member = archive.getinfo(f"{name}.npy")
    _check(member, MOST_ARRAY)
    if member.file_size > FREE and member.file_size > MOST_RATIO * member.compress_size:
        raise ValueError(f"{name} becomes {member.file_size} bytes out of {member.compress_size}")
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{name} is of version {version} of npy")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_columns, dtype = read(stream)
        size = dtype.itemsize
        for side in shape:
            size *= side
        if dtype.hasobject or any(side < 0 for side in shape) or size != member.file_size - stream.tell():
            raise ValueError(f"{name} holds {dtype} {shape} in {member.file_size} bytes")
        content = stream.read(size)
    return np.frombuffer(content, dtype).reshape(shape, order="F" if by_columns else "C")


def _check(member: zipfile.ZipInfo, most: int) -> None:
    if member.compress_type not in METHODS:
        raise ValueError("it is packed otherwise than by deflate")
    if member.file_size > most:
        raise ValueError(f"it becomes {member.file_size:,} bytes, more than {most:,}")


def opened(file: str) -> zipfile.ZipFile:
    """The zip. Raises ValueError where it is none, whatever zipfile makes of it, and OSError."""
    try:
        return zipfile.ZipFile(file)
    except OSError:
        raise
    except Exception as error:  # struct's, of numbers that are too large, and others
        raise ValueError(f"{type(error).__name__}: {error}") from error
