"""Operators: schema, shape function, autograd.Function and argument checks, one file a family."""

from picnn_fast.ops import histogram, masking, mutual_information, registry

registry.load_extension()
registry.register_triton_for_cuda()

__all__ = ["histogram", "masking", "mutual_information", "registry"]
