"""List one specialization of each Triton kernel for each way in which it is launched at full size, with its bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from distlora_kernels import (
    dora_triton,
    elementwise_triton,
    fused_triton,
    nf4_triton,
    paged_attention_triton,
    skinny_triton,
)
from distlora_kernels.buffers import KernelTile, tile_of
from distlora_kernels.formats import FORMATS, dequantize_triton
from distlora_kernels.formats.base import Format
from distlora_kernels.formats.gguf import Gguf
from distlora_kernels.fused_triton import TileConfig
from distlora_kernels.reference import BLOCK, BLOCKS_PER_GROUP

ALL_ARCHS = (80, 89, 90, 100)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One specialization of a kernel and its bounds. That none spills and shared memory fits always holds."""

    name: str
    kernel: Any
    """The @triton.jit function."""
    signature: Mapping[str, str]
    """Type by argument: `*bf16:16` for a pointer or number divisible by 16, `i32:1` for the number 1."""
    constants: Mapping[str, Any]
    """Values of the tl.constexpr arguments, and arguments that are None."""
    num_warps: int = 4
    num_stages: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further launch options."""
    archs: tuple[int, ...] = ALL_ARCHS
    elements: int = 0
    """Weights or outputs per program (in a kernel with a loop, per iteration), for instructions per element."""
    most_instructions: float | None = None
    """SASS instructions of a thread per element on sm_90, each counted once."""
    least_programs: int = 0
    """Programs that fit a multiprocessor at once."""
    loads_128: bool = False
    stores_128: bool = False
    """Some global loads (stores) move 16 bytes per thread, or use TMA."""
    matrix: bool = False
    """A matrix instruction is used; in a case for sm_90 alone that of warpgroups (HGMMA)."""


TYPES = {"codes_ptr": "*u8:16", "scales_ptr": "*u8:16", "group_scale_ptr": "*fp32", "offset_ptr": "*fp32"}
TYPES |= {"map_ptr": "*fp32:16", "levels_ptr": "*fp32:16", "partial_ptr": "*fp32:16", "absmax_ptr": "*fp32:16"}
TYPES |= {"inverse_ptr": "*fp32:16", "losses_ptr": "*fp32:16", "labels_ptr": "*i64:16", "ends_ptr": "*i32:16"}
TYPES |= {"last_expert": "i32", "first_rank": "i32", "eps": "fp32", "scale": "fp32"}
"""Types of arguments that are no pointer to the case's dtype and no number divisible by 16."""
NOT_NESTED = {"group_scale_ptr": None, "offset_ptr": None, "map_ptr": None}
EXACT = {"enable_fp_fusion": False}


def case(
    name: str, kernel: Any, constants: Mapping[str, Any], types: Mapping[str, str | None] | None = None,
    *, dtype: str = "bf16", **rest: Any,
) -> Case:  # fmt: skip
    """Return a case; `types` overrides the types of arguments, with None for an absent one."""
    chosen = TYPES | dict(types or {})
    names = [each for each in kernel.arg_names if each not in constants]
    typed = {each: chosen.get(each, f"*{dtype}:16" if each.endswith("_ptr") else "i32:16") for each in names}
    signature = {each: type for each, type in typed.items() if type is not None}
    absent = {each: None for each, type in typed.items() if type is None}
    return Case(name=name, kernel=kernel, signature=signature, constants={**constants, **absent}, **rest)


def nf4() -> list[Case]:
    """Return the cases of nf4_triton.py."""

    def dequantize(name: str, dtype: str = "bf16", *, row_blocks: int = 0, **types: str | None) -> Case:
        """With `row_blocks` rows have a gap of 64 columns with b: two branches of as many outputs."""
        absent = {} if row_blocks else {"gap": None, "b_ptr": None}
        return case(
            f"nf4 dequantize {name}", nf4_triton.dequantize_kernel,
            {"ROW_BLOCKS": row_blocks or 1, "BLOCKS": nf4_triton.DEQUANTIZE_BLOCKS},
            {"ends_ptr": None} | absent | types, dtype=dtype, options=EXACT,
            elements=nf4_triton.DEQUANTIZE_BLOCKS * BLOCK * (2 if row_blocks else 1), most_instructions=8,
            loads_128=True, stores_128=True,
        )  # fmt: skip

    blocks, groups = nf4_triton.QUANTIZE_BLOCKS, nf4_triton.QUANTIZE_GROUPS
    return [
        *(dequantize(dtype, dtype) for dtype in ("bf16", "fp16", "fp32")),
        dequantize("plain bf16", **NOT_NESTED, scales_ptr="*fp32:16"),
        dequantize("bf16, chosen experts", ends_ptr="*i32:16"),
        dequantize("bf16 beside b, I=4096", row_blocks=64),
        dequantize("bf16 beside b, I=14336", row_blocks=224),
        *(
            case(
                f"nf4 quantize {dtype}", nf4_triton.quantize_kernel, {"BLOCKS": blocks}, dtype=dtype, options=EXACT,
                elements=blocks * BLOCK, loads_128=True, stores_128=True,
            )
            for dtype in ("fp32", "bf16", "fp16")
        ),
        case(
            "nf4 second level", nf4_triton.quantize_absmax_kernel, {"GROUPS": groups},
            dtype="fp32", options=EXACT, elements=groups * BLOCKS_PER_GROUP,
        ),
    ]  # fmt: skip


MOST = {"mxfp4": 8, "nvfp4": 12, "int4_g32": 8, "int4_g128_zeros": 8, "fp8_block": 11, "int8": 6}
MOST |= {"q4_0": 12, "q4_1": 10, "q5_0": 15, "q5_1": 14, "q8_0": 7}
MOST |= {"q2_K": 11, "q3_K": 20, "q4_K": 11, "q5_K": 15, "q6_K": 21}
"""Most instructions per weight on sm_90 by format; which experts have rows takes one more."""


def format_case(format: Format, *, experts: bool = False) -> Case:
    """Return the case of a format's dequantization to bf16."""
    kernel, constants = dequantize_triton.kernel_of(format)
    gguf = isinstance(format, Gguf)
    dtypes = {"uint8": "u8", "bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    types: dict[str, str | None] = {"columns": "i32:16" if format.tile else None, "third_ptr": None}
    types |= {} if experts else {"ends_ptr": None}
    names = ("blocks_ptr",) if gguf else ("codes_ptr", "scales_ptr", "third_ptr")
    types |= {name: f"*{dtypes[part.dtype]}:16" for name, part in zip(names, format.parts, strict=False)}
    return case(
        f"{format.name} dequantize{', chosen experts' * experts}", kernel, constants, types, options=EXACT,
        elements=dequantize_triton.WEIGHTS, most_instructions=MOST[format.name] + experts,
        loads_128=not gguf or format.nbytes % 16 == 0, stores_128=True,
    )  # fmt: skip


def formats() -> list[Case]:
    """Return the cases of formats/dequantize_triton.py."""
    experts = [format_case(FORMATS[name], experts=True) for name in ("mxfp4", "fp8_block", "q4_K")]
    return [format_case(FORMATS[name]) for name in MOST] + experts


def dora() -> list[Case]:
    """Return the cases of dora_triton.py."""
    columns, blocks = dora_triton.GRADIENT_COLUMNS, dora_triton.ABSMAX_BLOCKS
    absmax = {"options": EXACT, "elements": blocks, "stores_128": True, "dtype": "fp32"}
    absmax_kernel, constants = dora_triton.scaled_absmax_kernel, {"BLOCKS": blocks}
    stripe = {"STRIPE": dora_triton.STRIPE_ROWS, "ROWS": dora_triton.GRADIENT_ROWS, "COLUMNS": columns}
    return [
        case("dora absmax nf4", absmax_kernel, constants, **absmax),
        case("dora absmax plain", absmax_kernel, constants, {**NOT_NESTED, "scales_ptr": "*fp32:16"}, **absmax),
        *(
            case(
                f"dora norms R={rank}", dora_triton.norms_kernel,
                {"ROWS": dora_triton.NORM_ROWS, "RANK": dora_triton.rank_tile(rank)},
                {"rank": "i32"} if rank % 16 else {}, dtype="fp32", loads_128=not rank % 16,
            )
            for rank in (8, 16, 64)
        ),
        case(
            "dora magnitude stripes", dora_triton.stripe_kernel, stripe, elements=stripe["ROWS"] * columns,
            loads_128=True, least_programs=8,
        ),
        case("dora magnitude", dora_triton.gradient_kernel, {"COLUMNS": columns}, {"stripes": "i32"}, dtype="fp32"),
    ]  # fmt: skip


def elementwise() -> list[Case]:
    """Return the cases of elementwise_triton.py."""
    kernels = elementwise_triton

    def one(name: str, kernel: Any, dtype: str, programs: int, constants: Mapping[str, Any], **rest: Any) -> Case:
        warps = constants.get("num_warps", kernels.NUM_WARPS)
        constants = {name: value for name, value in constants.items() if name != "num_warps"}
        rest |= {"least_programs": programs, "loads_128": True, "stores_128": True}
        return case(f"{name} {dtype}", kernel, constants, dtype=dtype, num_warps=warps, **rest)

    cases = []
    sizes = [(columns, "bf16", False) for columns in (128, 2880, 8192, 16384, 20480)]
    for columns, dtype, plus_one in (*sizes, (4096, "bf16", True), (4096, "fp32", False)):
        tile = kernels.norm_tile(columns) | {"PLUS_ONE": plus_one}
        name, warps = f"N={columns}{' plus one' * plus_one}", int(tile["num_warps"])
        cases.append(one(f"norm forward {name}", kernels.norm_forward_kernel, dtype, 32 // warps, tile))
        cases.append(one(f"norm backward {name}", kernels.norm_backward_kernel, dtype, 16 // warps, tile))
    for name, dtype in (("swiglu", "bf16"), ("geglu", "bf16"), ("swiglu", "fp32")):
        constants = {"GELU": name == "geglu", "COLUMNS": kernels.GATE_COLUMNS}
        cases.append(one(f"{name} forward", kernels.gate_forward_kernel, dtype, 12, constants))
        cases.append(one(f"{name} backward", kernels.gate_backward_kernel, dtype, 12, constants))
    for turned, heads, dtype, back in (
        *((128, 32, "bf16", False), (128, 32, "bf16", True), (96, 24, "bf16", False), (128, 32, "fp32", False)),
    ):
        constants = kernels.rotary_tile(turned, heads) | {"BACK": back}
        cases.append(
            one(f"rotary R={turned}{' backward' * back}", kernels.rotate_kernel, dtype, 8, constants, options=EXACT)
        )
    tile = kernels.loss_tile(kernels.LOSS_COLUMNS)
    return [*cases, one("cross-entropy", kernels.cross_entropy_kernel, "bf16", 2, tile)]


def fused() -> list[Case]:
    """Return the cases of fused_triton.py: every configuration in bf16, r = 16, with sizes that 128 divides."""
    numbers: dict[str, str | None] = dict.fromkeys(("M", "num_row_tiles", "tiles_per_part"), "i32")
    plain = {"scales_ptr": None, "offset_ptr": None, "map_ptr": None, "R": "i32"}
    plain |= dict.fromkeys(("xa_ptr", "dxa_ptr", "a_ptr", "b_ptr"))
    extra: dict[str, str | None] = dict.fromkeys(("addend_ptr", "bias_ptr"), "*bf16:16")
    linear, dx = fused_triton.linear_kernel, fused_triton.dx_kernel

    def one(name: str, kernel: Any, config: TileConfig, archs: tuple[int, ...], types: dict[str, str | None]) -> Case:
        constants: dict[str, Any] = {"ROWS": config.rows, "WIDTH": config.width, "DEPTH": config.depth, "WHOLE": True}
        constants["RANKS"] = fused_triton.ranks_at_a_time(16)
        if kernel is linear:
            nested = "scales_ptr" not in types
            k_width = fused_triton.k_width(divmod(archs[0], 10), nested)
            constants |= {"K_WIDTH": k_width, "WARPS": config.warps}
        return case(
            name, kernel, constants, {**dict.fromkeys(extra), "scale_ptr": "*fp32:16", **numbers, **types},
            num_warps=config.warps, num_stages=config.stages, options=EXACT, archs=archs,
            elements=config.width * config.depth, matrix=True, loads_128=True, stores_128=True,
        )  # fmt: skip

    cases = []
    for label, kernel, table, archs in (
        ("linear", linear, fused_triton.LINEAR_HOPPER, (90,)),
        ("linear, not sm_90", linear, fused_triton.LINEAR, (80, 89, 100)),
        ("dx", dx, fused_triton.DX_HOPPER, (90,)),
        ("dx, not sm_90", dx, fused_triton.DX, (80, 89, 100)),
    ):
        result = "y_ptr" if kernel is linear else "dx_ptr"
        for m, config in table.items():
            # Few rows are few programs, so the sum is split into fp32 parts.
            types: dict[str, str | None] = {result: "*fp32:16"} if m <= 64 else {}
            cases.append(one(f"fused {label} M={m}", kernel, config, archs, types))
        if kernel is linear:  # The case with the most registers.
            cases.append(one(f"{cases[-1].name}, addend and bias", kernel, config, archs, {**types, **extra}))
        m, config = min(table.items())
        cases.append(one(f"fused {label} M={m} plain absmax", kernel, config, archs, dict(plain)))
    add = {"OUTPUTS": fused_triton.REDUCED}
    parts = {"parts_ptr": "*fp32:16", "num_parts": "i32"}
    kernel = fused_triton.add_parts_kernel
    return [*cases, case("fused, sum of parts", kernel, add, parts, loads_128=True, stores_128=True)]


def skinny() -> list[Case]:
    """Return the cases of skinny_triton.py, at M = I = O = 8192 for one adapter."""
    down, up, dy, grad = (getattr(skinny_triton, f"{name}_kernel") for name in ("down", "up", "dy", "grad"))
    pointers = ("x", "a", "b", "xa", "dy", "dxa", "out")
    base: dict[str, str | None] = dict.fromkeys(("first_token", "key0", "key1", "threshold", "step"), "i32")
    base |= {"db": "*fp32:16", "db_parts": "*fp32:16", "counters": "*i32:16", "num_adapters": "i32"}
    base |= dict.fromkeys(("batch_rows", "spans", "dropped_rows", "streams", "steps", "scales", "bias"))
    base |= dict.fromkeys(("y", "products", "copy", "stride_copy", "beside", "parts"))

    def one(name: str, kernel: Any, tile: KernelTile, dtype: str = "bf16", group: int = 8, **types: str | None) -> Case:
        sizes = {"BM": tile.rows, "BN": tile.columns, "BK": tile.columns, "BR": tile.ranks}
        constants = {**sizes, "PIECES": 1, "SPAN_ALIGNMENT": 16, "GROUP": 1 if "batch_rows" in types else group}
        if kernel is dy and "batch_rows" not in types:
            types["num_adapters"] = "i32:1"
        elif kernel is not dy and "parts" not in types:
            types["counters"] = None
        return case(
            f"skinny {name}", kernel, {each: constants[each] for each in kernel.arg_names if each in constants},
            {**dict.fromkeys(pointers, f"*{dtype}:16"), **base, **types}, num_warps=tile.num_warps,
            num_stages=tile.num_stages, loads_128=True, stores_128=kernel is up,
        )  # fmt: skip

    def tile(op: str, rank: int = 16, *, dropped: bool = False, wide: bool = False, copies: bool = False) -> KernelTile:
        return tile_of(op, rank, 8192, 4 if wide else 2, dropped, copies=copies)

    dropout = {"dropped_rows": "*i64"}
    split = {"parts": "*fp32:16"}
    choice = {"batch_rows": "*i64", "spans": "*i32:16"}
    scales = {"scales": "*fp32"}
    own = {**choice, **dropout, "streams": "*i64:16", "steps": "*i64"}
    with_y = {"y": "*bf16:16", "products": "*fp32:16"}
    of_8 = dict.fromkeys(("num_ranks", "stride_b", "stride_xa", "stride_dxa", "stride_out"), "i32")
    copy = {"copy": "*bf16:16", "stride_copy": "i32:16"}
    cases = []
    for name, op, kernel, own_types in (
        ("down", "down", down, {"stride_ai": "i32:1"}),
        ("up a.T", "up", up, {"stride_bo": "i32:1"}),
        ("grad", "grad", grad, {"stride_oi": "i32:1", "out": "*fp32:16", **split}),
    ):
        plain = name if op == "up" else f"{name} R=16"
        cases += [
            one(plain, kernel, tile(op), **own_types),
            one(f"{name} dropout", kernel, tile(op, dropped=True), **own_types, **dropout),
            one(f"{name} choice own dropout", kernel, tile(op, dropped=True), **own_types, **own),
        ]
        if op != "up":
            cases += [
                one(f"{name} R=48", kernel, tile(op, 48), **own_types),
                one(f"{name} choice", kernel, tile(op), **own_types, **choice),
                one(f"{name} fp32", kernel, tile(op, wide=True), "fp32", **own_types),
            ]
    wide = {**copy, "beside": "*bf16:16"}
    for rank in (16, 32, 48):
        for name, more in ((f"down R={rank} copy", wide), (f"down R={rank} copy split", wide | split)):
            cases.append(one(name, down, tile("down", rank, copies=True), stride_ai="i32:1", **more))
    # A gate has one output, and Triton makes a constant of an integer that is 1.
    for name, kernel, more in (("dy", dy, {}), ("grad", grad, {"stride_oi": "i32:1", "out": "*fp32:16"})):
        of_1 = one(f"{name} O=1", kernel, tile(name), num_columns="i32:1", **split, **more)
        cases.append(replace(of_1, loads_128=False))
    few = tile_of("down", 16, 16, 2)
    for rank, types in ((16, {}), (32, {}), (8, of_8)):
        cases.append(one(f"dy R={rank}", dy, tile("dy", rank), **split, **types))
        cases.append(one(f"dy R={rank} copy", dy, tile("dy", rank), **split, **types, **copy))
    for name, more in (("dy M=2048", {}), ("dy M=2048 copy", copy)):
        cases.append(one(name, dy, tile("dy"), group=1, **split, **more))
    return [
        *cases,
        one("down M=16", down, few, stride_ai="i32:1", **split),
        *(one(f"down split R={rank}", down, tile("down", rank), stride_ai="i32:1", **split) for rank in (16, 48)),
        *(one(f"up R={rank}", up, tile("up", rank), stride_br="i32:1") for rank in (16, 48)),
        one("up a.T R=32", up, tile("up", 32), stride_bo="i32:1"),
        one("up bias choice", up, tile("up"), stride_br="i32:1", bias="*bf16:16", **choice),
        one("up fp32", up, tile("up", wide=True), "fp32", stride_br="i32:1"),
        one("dy R=16 with y", dy, tile("dy"), **split, **with_y),
        one("dy R=8 with y", dy, tile("dy", 8), **split, **of_8, **with_y),
        one("dy R=8 choice", dy, tile("dy", 8), **split, **of_8, **choice, **scales),
        one("dy choice", dy, tile("dy"), **split, **choice, **scales),
        one("dy fp32", dy, tile("dy", wide=True), "fp32"),
        one("dxa R=48", down, tile("down", 48), stride_ar="i32:1"),
        one("db R=48", grad, tile("grad", 48), out="*fp32:16", stride_or="i32:1", **split),
        one("grad R=8", grad, tile("grad", 8), stride_oi="i32:1", out="*fp32:16", **split, **of_8),
        one("grad R=32", grad, tile("grad", 32), stride_oi="i32:1", out="*fp32:16", **split),
        one("grad whole", grad, tile("grad"), stride_oi="i32:1", out="*fp32:16"),
    ]


def paged_attention() -> list[Case]:
    """Return the cases of paged_attention_triton.py, with eight query heads per key head."""

    def attend(name: str, dtype: str = "bf16", *, size: int = 128, split: bool = False, window: bool = False) -> Case:
        tokens = paged_attention_triton.KEYS[4 if dtype == "fp32" else 2]
        absent = {} if split else {"parts_ptr": None, "sums_ptr": None}
        numbers = {"table_columns": "i32", "split_tokens": "i32", "window": "i32" if window else None}
        pointers = {"tables_ptr": "*i64:16", "lengths_ptr": "*i64:16", "parts_ptr": "*fp32:16", "sums_ptr": "*fp32:16"}
        return case(
            f"paged attention {name}", paged_attention_triton.attend_kernel,
            {"GROUP": 8, "HEADS": 16, "KEYS": tokens, "SIZE": size, "BLOCK": 16}, pointers | numbers | absent,
            dtype=dtype, num_warps=paged_attention_triton.NUM_WARPS, num_stages=paged_attention_triton.NUM_STAGES,
            elements=tokens * size, loads_128=True, matrix=dtype != "fp32",
        )  # fmt: skip

    return [
        attend("bf16"),
        attend("bf16, split", split=True),
        attend("bf16, split, window, E=64", size=64, split=True, window=True),
        attend("bf16, E=256", size=256),
        attend("fp16", "fp16"),
        attend("fp32, split", "fp32", split=True),
        case(
            "paged attention join", paged_attention_triton.join_kernel, {"SPLITS": 32, "SIZE": 128},
            {"parts_ptr": "*fp32:16", "sums_ptr": "*fp32:16", "splits": "i32"},
            num_warps=paged_attention_triton.NUM_WARPS, loads_128=True,
        ),
    ]  # fmt: skip


def all_cases() -> list[Case]:
    """Return the cases of all kernels, by module."""
    return [*dora(), *elementwise(), *formats(), *fused(), *nf4(), *paged_attention(), *skinny()]
