"""Independent computations that EdgeLoRA's results are held against: transformers, PEFT, and
weights read back from a bundle.
"""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import bitsandbytes
import bitsandbytes.functional
import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PreTrainedModel

from activation_groups import can_group, tops
from int8_attention import blocks_of, codes_and_scales, codes_of, int8_kv_cache

PANEL_ROWS = 16
LAYER_PARTS = {"qkv_": 9, "o_": 16, "gate_up_": 23, "down_": 30}  # where their inputs begin
Look = Literal["values", "bytes", "levels"]
# codebook → what integer kernels make of the value 1 (ARCHITECTURE.md): as bytes, or with AVX2 as
# levels of seven bits, of which this one means 0
ONES: dict[str, dict[Look, float]] = {
    "nf4": {"bytes": 124.125, "levels": 250},
    "fp4": {"bytes": 120, "levels": 240},
}
ZEROS: dict[str, dict[Look, float]] = {  # … and of 0
    "nf4": {"bytes": 5 / 32, "levels": 63.75},
    "fp4": {"bytes": 0, "levels": 64},
}


def codebook(kind: str, look: Look) -> NDArray[np.float32]:
    """bitsandbytes' sixteen values, or what the integer kernels have in their place."""
    values = bitsandbytes.functional.get_4bit_type(kind, device="cpu").numpy()
    if look == "values":
        return values
    one, zero = np.float32(ONES[kind][look]), np.float32(ZEROS[kind][look])
    if look == "bytes":
        return (np.round(values * one) - zero) / one
    return (4 * (np.round(values * one / 4 + zero) - zero)).astype(np.float32) / one


def float_model(folder: Path) -> PreTrainedModel:
    """The checkpoint in float32.

    Transformers 4 reads `rope_theta` only, so a newer spelling is translated first.
    """
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters", None)
    overrides = {} if rope is None else {"rope_theta": rope["rope_theta"]}
    model = AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, attn_implementation="eager", **overrides
    )
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            use_dequantized(module, torch.float32)
    return model.eval()


def use_dequantized(module: bitsandbytes.nn.Linear4bit, dtype: torch.dtype) -> None:
    """Computes in float32 with bitsandbytes' weights in `dtype`; its own way depends on the CPU."""
    state: Any = copy.copy(module.weight.quant_state)
    state.dtype = dtype
    values = dequantize_4bit(module.weight.data, state)
    assert values.dtype == dtype
    linear: Any = torch.nn.functional.linear
    module.forward = partial(linear, weight=values.float(), bias=module.bias)


def dequantize_4bit(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """bitsandbytes' values, as one row: version 0.50.2 is wrong on CPUs with AVX-512 where rows are
    no whole blocks.
    """
    flat = copy.copy(state)
    flat.shape = torch.Size([1, state.shape.numel()])
    values: torch.Tensor = bitsandbytes.functional.dequantize_4bit(packed, flat)
    return values.reshape(state.shape)


def logits(model: torch.nn.Module, token_ids: list[int]) -> NDArray[np.float32]:
    """float32 [tokens, vocab_size]."""
    with torch.no_grad():
        out = model(torch.tensor([token_ids])).logits[0]
    values: NDArray[np.float32] = out.float().numpy()
    return values


def greedy(model: torch.nn.Module, token_ids: list[int], count: int) -> list[int]:
    """The `count` most probable next tokens, one after another, whatever they are."""
    with torch.no_grad():
        out = model(torch.tensor([token_ids]), use_cache=True)
        ids: list[int] = []
        for _ in range(count):
            ids.append(int(out.logits[0, -1].argmax()))
            out = model(
                torch.tensor([ids[-1:]]), past_key_values=out.past_key_values, use_cache=True
            )
    return ids


def assert_close(ours: NDArray[np.float32], theirs: NDArray[np.float32], share: float) -> None:
    """Every logit within `share` of the largest magnitude."""
    assert ours.shape == theirs.shape
    worst = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    assert worst <= share, (
        f"largest difference {worst:.2e} of the largest logit, {share:.0e} allowed"
    )


def mean_kl(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """Mean over rows of KL(theirs ‖ ours), nats."""
    p, q = (torch.log_softmax(torch.tensor(x, dtype=torch.float64), -1) for x in (theirs, ours))
    return float((p.exp() * (p - q)).sum(-1).mean())


@contextmanager
def int8_activations(model: torch.nn.Module) -> Iterator[None]:
    """Rounds the input of every base linear and of every lora_a to int8 in blocks of 32, that of
    every lora_b whole, the factors of adapters, and what attention multiplies, as the runtime's
    arithmetic does.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    hooks = [
        module.register_forward_pre_hook(_rounding(model, name)) for name, module in linears.items()
    ]
    factors = [module for name, module in linears.items() if "lora_" in name]
    before = [module.weight.data for module in factors]
    for name, module in linears.items():
        if "lora_" in name:
            module.weight.data = round_factor(module.weight.data, in_blocks="lora_A" in name)
    try:
        with int8_kv_cache(model):
            yield
    finally:
        for module, weight in zip(factors, before, strict=True):
            module.weight.data = weight
        for hook in hooks:
            hook.remove()


def _rounding(model: torch.nn.Module, name: str) -> Callable[..., Any]:
    """Of lm_head's own factors as of every lora_a."""
    if "lora_B" in name:
        return round_t
    path, _, factor = name.partition(".lora_A")
    path = path.removesuffix(".base_layer")
    target: Any = model.get_submodule(path)
    kind = getattr(target, "base_layer", target).stored_as
    head = can_group() and not factor and path.split(".")[-1] == "lm_head"
    return partial(round_twice if head else round_x, kind)


def round_twice(kind: str, _: torch.nn.Module, x: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """And what is missed once more."""
    first = round_blocks(x[0], kind)
    return (first + round_blocks(x[0] - first, kind),)


def round_x(kind: str, _: torch.nn.Module, x: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (round_blocks(x[0], kind),)


def round_blocks(x: torch.Tensor, kind: str) -> torch.Tensor:
    """x → scale·round(x / scale) in blocks of 32, as a linear of the format reads it."""
    blocks = blocks_of(x)
    scales = torch.from_numpy(tops(blocks.abs().amax(-1).numpy(), kind))[..., None] / 127
    return (codes_of(blocks, scales) * scales).flatten(-2)[..., : x.shape[-1]]


def round_t(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """With one scale for all ranks. The identity stays, by which DoRA asks for lora_b · lora_a."""
    if inputs[0].dim() == 2:
        return inputs
    codes, scales = codes_and_scales(inputs[0])
    return (codes * scales,)


def round_factor(factor: torch.Tensor, *, in_blocks: bool) -> torch.Tensor:
    """In int8: a scale of 11 bits for each row of lora_b, for each block of 32 of lora_a's rows."""
    values = blocks_of(factor) if in_blocks else factor
    mantissas, exponents = torch.frexp(values.abs().amax(-1, keepdim=True) / 127)
    scales = torch.ldexp(torch.round(mantissas * 2048) / 2048, exponents)
    codes = codes_of(values, scales).clamp(-127, 127)
    return (codes * scales).reshape(len(factor), -1)[:, : factor.shape[1]]


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


class BundleWeights:
    """The weights of a bundle as its file formats say (ARCHITECTURE.md), read without EdgeLoRA's
    code.
    """

    def __init__(self, bundle: Path, look: Look = "values") -> None:
        """look: what stands for values of nf4 and fp4; the int8 kernels have bytes or levels."""
        self.look = look
        self.graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
        self.data = (bundle / "model.onnx.data").read_bytes()
        self.tensors = {tensor.name: tensor for tensor in self.graph.initializer}

    def array(self, name: str) -> NDArray[np.generic]:
        tensor = self.tensors[name]
        where = {entry.key: entry.value for entry in tensor.external_data}
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        count = int(np.prod(tensor.dims))
        return np.frombuffer(self.data, dtype, count, int(where["offset"])).reshape(tensor.dims)

    def matrices(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """(module path, float32 [out_features, in_features]) of every linear and the embedding."""
        for node in self.graph.node:
            if node.op_type == "Embedding":
                yield node.name, self._dequantized(_attributes(node), [*node.input[1:], *[""] * 5])
        for attributes, inputs in self._linears():
            yield from self._slices(attributes, inputs)

    def formats(self) -> Iterator[tuple[str, str]]:
        """(module path, format) of every linear."""
        for attributes, _ in self._linears():
            for target in attributes["targets"].decode().split(","):
                yield target, attributes["format"].decode()

    def _linears(self) -> Iterator[tuple[dict[str, Any], list[str]]]:
        """Attributes and weight inputs of every packed linear."""
        for node in self.graph.node:
            attributes, inputs = _attributes(node), [*node.input, *[""] * 40]
            if node.op_type == "Linear":
                yield attributes, inputs[2:8]
            elif node.op_type == "Layer":
                for prefix, first in LAYER_PARTS.items():
                    part = {
                        name.removeprefix(prefix): value
                        for name, value in attributes.items()
                        if name.startswith(prefix)
                    }
                    yield part, inputs[first : first + 6]

    def _slices(
        self, attributes: dict[str, Any], inputs: list[str]
    ) -> Iterator[tuple[str, NDArray[np.float32]]]:
        weights, row = self._dequantized(attributes, inputs), 0
        targets = attributes["targets"].decode().split(",")
        for target, rows in zip(targets, attributes["slices"], strict=True):
            yield target, weights[row : row + rows]
            row += rows

    def vectors(self) -> Iterator[tuple[str, NDArray[np.generic]]]:
        """Norm weights by checkpoint name."""
        for name in self.tensors:
            if name.endswith("norm.weight"):
                yield name, self.array(name)

    def _dequantized(self, attributes: dict[str, object], inputs: list[str]) -> NDArray[np.float32]:
        rows, width = int(attributes["out_features"]), int(attributes["in_features"])  # type: ignore[call-overload]
        kind, block = attributes["format"].decode(), int(attributes["block_size"])  # type: ignore
        codes = self.array(inputs[0])
        if kind == "float":
            return codes.transpose(0, 2, 1).reshape(-1, width)[:rows].astype(np.float32)
        values = self._codes(codes, kind)[:rows, :width]
        name, _, rounding = kind.partition("_")
        if name in ONES:
            factors = codebook(name, self.look)[values.astype(np.intp)]
            products = factors * self._absmax(factors.shape, attributes["slices"], inputs, name)
            dtype = getattr(torch, rounding or "float32")
            return np.asarray(torch.tensor(products).to(dtype).float().numpy())
        scales = self._rows(inputs[1])[:rows]
        wide = np.repeat(scales, block, axis=1)[:, :width]
        if kind == "int8":
            return wide * values
        if not inputs[2]:
            return wide * (values - 8)
        extra = self.array(inputs[2])
        if extra.dtype != np.uint8:
            return wide * values + np.repeat(self._rows(inputs[2])[:rows], block, 1)[:, :width]
        points = np.concatenate([extra & 15, extra >> 4], axis=2).astype(np.float32)
        points = points.transpose(0, 2, 1).reshape(-1, points.shape[1])[:rows]
        return wide * (values - np.repeat(points, block, 1)[:, :width])

    def _absmax(
        self, shape: tuple[int, ...], slices: list[int], inputs: list[str], kind: str
    ) -> NDArray[np.float32]:
        """Of each weight: bitsandbytes' arithmetic in float32, blocks of 64 of each slice."""
        parts, start = [], 0
        for i, rows in enumerate(slices):
            size = rows * shape[1]
            blocks = -(-size // 64)
            stop = start + blocks
            if inputs[2]:
                nested, codes, offsets, table = (self.array(name) for name in inputs[1:5])
                groups = np.repeat(nested, 256)[start:stop]
                scale = (table[codes[start:stop]] * groups + offsets[i]).astype(np.float32)
            else:
                scale = self.array(inputs[1])[start:stop]
            wide = np.repeat(self._kept(scale, kind), 64)[:size]
            parts.append(wide.reshape(rows, shape[1]))
            start += -(-blocks // 256) * 256
        return np.concatenate(parts)

    def _kept(self, absmax: NDArray[np.float32], kind: str) -> NDArray[np.float32]:
        """absmax; for the int8 kernels in the 11 bits that they keep of its quotient by what stands
        for the value 1.
        """
        if self.look == "values":
            return absmax
        one = np.float32(ONES[kind][self.look])
        mantissa, exponent = np.frexp(absmax / one)
        return np.ldexp(np.rint(mantissa * 2048) / 2048, exponent).astype(np.float32) * one

    def _rows(self, name: str) -> NDArray[np.float32]:
        """[P, blocks, 16] → float32 [16·P, blocks]."""
        panels = self.array(name).astype(np.float32)
        return panels.transpose(0, 2, 1).reshape(-1, panels.shape[1])

    def _codes(self, codes: NDArray[np.generic], kind: str) -> NDArray[np.float32]:
        """[P, quads, 64] → float32 [16·P, Kp]."""
        panels = codes.shape[0]
        if kind == "int8":
            quads = codes.reshape(panels, -1, 1, PANEL_ROWS, 4)
        else:
            low = codes.reshape(panels, -1, 1, PANEL_ROWS, 4)
            quads = np.concatenate([low & 15, low >> 4], axis=2)
        ordered = quads.transpose(0, 3, 1, 2, 4)  # panel, row, quad, half, element
        return ordered.reshape(panels * PANEL_ROWS, -1).astype(np.float32)


def bundle_model(bundle: Path, like: PreTrainedModel, look: Look = "values") -> PreTrainedModel:
    """A float model with the bundle's own (dequantized) weights; `like` gives the architecture."""
    weights = BundleWeights(bundle, look)
    config = type(like.config).from_dict(like.config.to_dict() | {"tie_word_embeddings": False})
    model = type(like)(config)
    state = model.state_dict() | like.state_dict()
    state |= {f"{name}.weight": torch.tensor(values) for name, values in weights.matrices()}
    state |= {name: torch.tensor(values) for name, values in weights.vectors()}
    model.load_state_dict(state)
    for name, kind in weights.formats():
        module: Any = model.get_submodule(name)
        module.stored_as = kind
    return model.to(torch.float32).eval()
