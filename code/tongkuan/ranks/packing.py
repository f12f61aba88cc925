"""A value in two parts, for its way to other ranks: a pickle without tensors, and the tensors, which go one by one."""

import io
import pickle

import torch

Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]


def layout(tensor: torch.Tensor) -> Layout:
    """Shape, strides and type of a dense copy. Fused optimisers take for granted that moments lie as weights do."""
    return tensor.shape, torch.empty_like(tensor, device="meta").stride(), tensor.dtype


def empty(shape: torch.Size, strides: tuple[int, ...], kind: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of a layout, to be filled."""
    return torch.empty_strided(shape, strides, dtype=kind, device=device)


class Packer(pickle.Pickler):
    """A value as bytes in which each tensor is only its layout, and these tensors in their order."""

    def __init__(self, value: object) -> None:
        self.tensors: list[torch.Tensor] = []
        file = io.BytesIO()
        super().__init__(file)
        self.dump(value)
        self.data = file.getvalue()

    def persistent_id(self, value: object) -> Layout | None:
        """Of a tensor."""
        if not isinstance(value, torch.Tensor):
            return None
        self.tensors.append(value)
        return layout(value)


class Unpacker(pickle.Unpickler):
    """The value of a Packer's bytes, its tensors empty and in the same order."""

    def __init__(self, data: bytes, device: torch.device) -> None:
        super().__init__(io.BytesIO(data))
        self.device, self.tensors = device, list[torch.Tensor]()

    def persistent_load(self, said: Layout) -> torch.Tensor:
        """A tensor to be filled."""
        self.tensors.append(empty(*said, self.device))
        return self.tensors[-1]
