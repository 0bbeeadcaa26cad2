"""Where a one-dimensional convolution reads: kernel size, stride, padding, dilation, groups.

Dimension key: T input frames, T_out output frames.
"""

from dataclasses import dataclass

Padding = int | str | tuple[int, int]

# of a front end's first layer on CUDA, whose matrix unit takes windows of so many samples
MAX_WINDOW = 16


@dataclass(frozen=True)
class Geometry:
    """Output frame t reads input frames ``t * stride + tap * dilation - left``, tap < kernel_size.

    Args:
        kernel_size: number of taps.
        stride: input frames between two output frames.
        left: frames of zeros before the first input frame.
        right: frames of zeros after the last input frame.
        dilation: input frames between two taps.
        groups: groups of channels that do not see each other.
    """

    kernel_size: int
    stride: int = 1
    left: int = 0
    right: int = 0
    dilation: int = 1
    groups: int = 1

    @property
    def span(self) -> int:
        """Input frames from the first tap to the last, both included."""
        return self.dilation * (self.kernel_size - 1) + 1

    def frames_out(self, T: int) -> int:
        """T_out of an input of T frames."""
        return (T + self.left + self.right - self.span) // self.stride + 1


def resolve_padding(
    padding: Padding, kernel_size: int, stride: int, dilation: int
) -> tuple[int, int]:
    """Zeros before and after the input, for every way of saying it.

    Raises:
        ValueError: for another word than ``"same"``, ``"same"`` with a stride, or negative numbers.
    """
    if isinstance(padding, str):
        if padding != "same":
            raise ValueError(
                f"padding must be an int, a (left, right) pair or 'same', got {padding!r}"
            )
        if stride != 1:
            raise ValueError(f"padding='same' needs stride 1, got stride {stride}")
        total = dilation * (kernel_size - 1)
        return total // 2, total - total // 2
    pair = (padding, padding) if isinstance(padding, int) else tuple(padding)
    if len(pair) != 2 or not all(isinstance(p, int) and p >= 0 for p in pair):
        raise ValueError(
            f"padding must be an int >= 0, a (left, right) pair of them or 'same', got {padding!r}"
        )
    return pair
