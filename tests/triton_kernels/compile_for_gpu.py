"""Compiles Triton kernels for a GPU that need not be there; prints one line for each.

Run as a program, with TRITON_INTERPRET unset: the interpreter replaces the compiler when a kernel
is decorated. Arguments: the files to compile the ``*_kernel`` functions of.
"""

import importlib.util
import itertools
import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HOPPER = GPUTarget("cuda", 90, 32)
# Element types of the tensors that may differ from call to call: (maps, masks), and the tables'.
MAPS = (("fp32", "fp32"), ("fp64", "fp64"), ("bf16", "fp32"), ("fp16", "fp32"))
TABLES = ("fp32", "fp64")
POINTERS = {
    "features": "maps", "masked": "maps", "grad_masked": "maps", "grad_features": "maps",
    "mask": "masks", "grad_mask": "masks",
    "logits": "table", "correspondence": "table", "probabilities": "table",
    "seed": "i64", "label": "i64", "labels": "i64",
    "activations": "maps", "grad": "maps", "grad_counts": "masks",
    "least": "masks", "most": "masks", "low": "masks", "width": "masks",
    "finite": "i32", "scale": "fp64", "column": "i64", "shift": "i64", "first_cell": "i64",
    "counts": "i64", "sums": "i64",
    "values": "fp64", "column_labels": "i32", "grouped": "i32", "starts": "i32", "singles": "i32",
    "place": "i32", "previous": "i32", "following": "i32",
    "maps": "maps", "offsets": "masks", "peak": "i64", "assigned": "i64",
    "columns": "masks", "row_sums": "masks", "gains": "masks", "marginals": "masks",
    "information": "masks", "relative": "masks", "grad_maps": "masks",
    "mean": "masks", "groups": "i64", "order": "i64", "begins": "i64", "positive": "i1",
    "norms": "masks", "group_sums": "masks", "moments": "masks", "own": "masks", "total": "masks",
    "weights": "masks",
    "psi": "i64", "class_sums": "i64", "base_sum": "i64", "joint_sum": "i64",
}  # fmt: skip
# Compile-time constants, each with the values that make another kernel of it.
SIZES = {
    "CHANNELS": (32,), "POSITIONS": (64,), "CLASS_BLOCK": (1024,),
    "ROWS": (16,), "FILTERS": (32,), "SLOTS": (0, 4096),
    "BLOCK": (256,),
    "FIND_PEAK": (True, False), "FIND_NORMS": (True, False), "COUNTED": (True, False),
    "SAMPLES": (64,), "TEMPLATES": (64,), "DEPTH": (16,),
    "GRAD_TEMPLATES": (16,), "GRAD_POSITIONS": (256,),
}  # fmt: skip
# Launched with more warps than four.
WARPS = dict.fromkeys(("columns_kernel", "rows_kernel", "information_kernel", "gradient_kernel"), 8)
# Launched without fused multiply-adds: they would round otherwise than the reference.
UNFUSED = {
    "pseudo_label_kernel",
    "samples_kernel",
    "few_others_kernel",
    "mask_kernel",
    "peaks_kernel",
}


def sources(kernel):
    """The kernel with every set of argument types that the launchers can pass.

    Sizes and strides are 32 or 64 bits wide; those that equal 1 arrive as constants.
    """
    names = kernel.arg_names
    kinds = {POINTERS.get(name) for name in names}
    maps = MAPS if kinds & {"maps", "masks"} else MAPS[:1]
    tables = TABLES if "table" in kinds else TABLES[:1]
    variants = [(*types, "i32") for types in itertools.product(maps, tables)]
    variants += [(maps[0], tables[0], "i64"), (maps[0], tables[0], "constexpr")]
    sizes = {name: SIZES[name] for name in names if name in SIZES}
    cases = itertools.product(variants, itertools.product(*sizes.values()))
    yielded = []
    for ((map_type, mask_type), table, size), values in cases:
        types = {"maps": map_type, "masks": mask_type, "table": table}
        signature, constants = {}, dict(zip(sizes, values, strict=True))
        for name in names:
            if name in POINTERS:
                signature[name] = "*" + types.get(POINTERS[name], POINTERS[name])
            elif kernel.params[names.index(name)].do_not_specialize:
                signature[name] = "i64" if size == "i64" else "i32"
            elif kernel.params[names.index(name)].annotation_type:
                signature[name] = kernel.params[names.index(name)].annotation_type
            else:
                signature[name] = "constexpr" if name in constants else size
            if signature[name] == "constexpr":
                constants.setdefault(name, 1)
        if (signature, constants) in yielded:
            continue
        yielded.append((signature, constants))
        yield ASTSource(fn=kernel, signature=signature, constexprs=constants)


def main(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    for name, kernel in vars(module).items():
        if not name.endswith("_kernel") or not isinstance(kernel, triton.JITFunction):
            continue
        for source in sources(kernel):
            options = {"enable_fp_fusion": name not in UNFUSED, "num_warps": WARPS.get(name, 4)}
            compiled = triton.compile(source, target=HOPPER, options=options)
            fused = compiled.asm["ptx"].count("fma.")
            size = f"{len(compiled.asm['cubin'])} bytes"
            print(path.stem, name, *source.signature.values(), size, fused)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        main(Path(argument))
