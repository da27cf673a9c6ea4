"""The rotation and its gradient in blocks of rows, for CPUs: angles, cosines and sines never exist whole.

A pair (even, odd) is the complex number even + i odd, and turning it is one product with cos + i sin. The buffers of a
block are written again and again, so that they stay in the cache and the system hands out no new memory.
"""

import torch
from torch import Tensor

from diffusers_wadi.lorad.kernels.precision import angle_dtype, work_dtype

__all__ = ["gradients_by_blocks", "turn_by_blocks"]

# A block has about this many angles for every thread (16 bytes of buffers each), and enough rows for a good product
# A @ B. Measured on the layers of SD 1.5 at rank 256: 2^14 to 2^18 angles differ by a tenth.
_ANGLES = 1 << 17
_MIN_ROWS = 128


def turn_by_blocks(
    rows: Tensor, A: Tensor, B: Tensor, turned: Tensor, wide: bool = False, inverse: bool = False
) -> None:
    """Write `rows` (out, n), turned by `A @ B`, into the first 2 * pairs columns of `turned` (out, n).

    Args:
        A: (out, r). B: (r, pairs), 2 * pairs <= n.
        wide: sines and cosines in float64. inverse: by the opposite angles. Defaults False.
    """
    if rows.numel() == 0 or B.shape[1] == 0:
        return
    angles = _Angles(rows, -A if inverse else A, B, wide)
    phase = angles.complex_buffer()
    source = _Pairs(rows, angles)
    target = _Pairs(turned, angles, source.buffer)
    for i in range(len(angles.A)):
        cos, sin = angles.of(i)
        turn = torch.complex(cos, sin, out=phase[: len(cos)])
        torch.mul(source.read(i), turn, out=target.room(i))
        target.write(i)


def gradients_by_blocks(
    rows: Tensor, d_rotated: Tensor, A: Tensor, B: Tensor, needs_A: bool = True, needs_B: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of A and B from that of the turned weight, with no matrix of the weight's size but the two given.

    Args:
        rows, d_rotated: (out, n). A: (out, r). B: (r, pairs), 2 * pairs <= n.
    """
    d_A, d_B = (torch.zeros_like(t, dtype=angle_dtype(A, B)) for t in (A, B))
    if rows.numel() and B.shape[1]:
        _add_gradients(rows, d_rotated, _Angles(rows, A, B), d_A if needs_A else None, d_B if needs_B else None)
    return d_A.to(A.dtype) if needs_A else None, d_B.to(B.dtype) if needs_B else None


def _add_gradients(rows: Tensor, d_rotated: Tensor, angles: "_Angles", d_A: Tensor | None, d_B: Tensor | None) -> None:
    product = angles.complex_buffer()
    source, gradient = _Pairs(rows, angles), _Pairs(d_rotated, angles)
    for i, A in enumerate(angles.A):
        cos, sin = angles.of(i)
        # d_theta = Im(conj(w z) g) = cos Im(conj(w) g) - sin Re(conj(w) g)
        part = torch.conj_physical(source.read(i), out=product[: len(cos)])
        torch.mul(part, gradient.read(i), out=part)
        torch.mul(part.imag, cos, out=cos)
        d_theta = torch.addcmul(cos, part.real, sin, value=-1, out=cos).to(A.dtype)
        if d_A is not None:
            torch.mm(d_theta, angles.B.T, out=d_A[i * angles.rows : i * angles.rows + len(A)])
        if d_B is not None:
            d_B.addmm_(A.T, d_theta)


class _Angles:
    """The angles of one block after the other, as cosines and sines in buffers that the next block overwrites."""

    def __init__(self, rows: Tensor, A: Tensor, B: Tensor, wide: bool = False) -> None:
        dtype = angle_dtype(A, B)
        self.work = torch.float64 if wide else work_dtype(rows.dtype, dtype)
        self.pairs, self.rows = B.shape[1], _rows_of_block(B.shape[1], len(rows))
        self.A, self.B = A.to(dtype).split(self.rows), B.to(dtype)
        self._theta = B.new_empty(self.rows, self.pairs, dtype=dtype)
        self._cos = B.new_empty(self.rows, self.pairs, dtype=self.work)
        self._sin = self._theta if self.work == dtype else torch.empty_like(self._cos)

    def of(self, block: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines (rows of the block, pairs)."""
        A, cos, sin = self.A[block], self._cos, self._sin
        if len(A) < self.rows:
            cos, sin = cos[: len(A)], sin[: len(A)]
        theta = torch.mm(A, self.B, out=self._theta[: len(A)])
        theta = sin.copy_(theta) if theta.dtype != self.work else theta
        torch.cos(theta, out=cos)
        return cos, torch.sin(theta, out=sin)

    def complex_buffer(self) -> Tensor:
        """For a block, (rows, pairs)."""
        return self.B.new_empty(self.rows, self.pairs, dtype=self.work.to_complex())


class _Pairs:
    """A matrix as complex numbers (out, pairs), block by block: where they lie, or through a buffer."""

    def __init__(self, matrix: Tensor, angles: _Angles, buffer: Tensor | None = None) -> None:
        matrix = matrix[:, : 2 * angles.pairs]
        even = matrix.stride(0) % 2 == 0 and matrix.storage_offset() % 2 == 0
        self.buffer: Tensor | None = None
        if matrix.dtype == angles.work and matrix.stride(1) == 1 and even:
            self._blocks = torch.view_as_complex(matrix.unflatten(1, (-1, 2))).split(angles.rows)
        else:
            self._blocks = matrix.split(angles.rows)
            self.buffer = angles.complex_buffer() if buffer is None else buffer

    def read(self, block: int) -> Tensor:
        """The numbers of this block."""
        room = self.room(block)
        if self.buffer is not None:
            torch.view_as_real(room).flatten(1).copy_(self._blocks[block])
        return room

    def room(self, block: int) -> Tensor:
        """Where to put the numbers of this block, before `write`."""
        return self._blocks[block] if self.buffer is None else self.buffer[: len(self._blocks[block])]

    def write(self, block: int) -> None:
        """Bring what was put into the room to its place, rounded to the dtype of the matrix."""
        if self.buffer is not None:
            self._blocks[block].copy_(torch.view_as_real(self.room(block)).flatten(1))


def _rows_of_block(pairs: int, count: int) -> int:
    if count * pairs <= _ANGLES // 4:
        return count
    wanted = max(_MIN_ROWS, _ANGLES * torch.get_num_threads() // pairs)
    return min(wanted, (count + 1) // 2)  # so that the buffers stay small beside a small weight too
