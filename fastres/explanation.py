"""What is fused in a model, and what is not and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from . import backends, plan
from .conversion import NOTHING_KNOWN, Unit, find_units
from .nn.fused import FusedModule, FusedUnit
from .nn.sequential import triples
from .nn.stage import FusedStage
from .text import aligned

STATUSES = ("fused", "partly", "by blocks", "stock")


class Row(NamedTuple):
    """One unit of a model: a block, stem or stage, or an nn.Sequential with conv, batch norm and ReLU in a row.

    path: in the model, "" for the model itself. unit: the function of `fastres.functional` that it is. status: one of
    `STATUSES`: "fused"; "partly", where the shortcut of a block, some blocks of a stage or some conv + BN + ReLU of
    several run as modules beside the fused rest; "by blocks", where a stage has fused ones but no chain; "stock", where
    the children run one by one. input: shape of its input, where `explain` was given one. backend: what was asked for,
    and the kernel namespaces that serve it for the dtype and device that was planned for; empty for a stage, whose
    blocks say it. form: of a fused block, what is Gram-folded and what is stored, and why; of a stage, its chains; of
    an nn.Sequential, how many conv + BN + ReLU are fused. reason: why not fused, or not wholly.
    """

    path: str
    unit: str
    status: str
    input: tuple[int, ...] | None
    backend: str
    form: str
    reason: str


class Explanation:
    """`rows`, and `notes` on the model as a whole. Prints as a table."""

    def __init__(self, rows: Sequence[Row], notes: Sequence[str]):
        self.rows = list(rows)
        self.notes = list(notes)

    def __str__(self) -> str:
        table = [
            (
                row.path or "(model)",
                row.unit,
                row.status,
                "x".join(map(str, row.input or ())),
                row.backend,
                row.form,
                row.reason,
            )
            for row in self.rows
        ]
        lines = []
        if table:
            table.insert(0, ("path", "unit", "status", "input", "backend", "form", "reason"))
            columns = [column for column in zip(*table, strict=True) if any(column[1:])]
            lines = [*aligned(list(zip(*columns, strict=True))), ""]
        return "\n".join(lines + self.notes)

    __repr__ = __str__


def explain(
    model: nn.Module,
    input_shape: Sequence[int] | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Explanation:
    """Say of each block, stem and stage of a model whether it runs fused, by which backend and in which form, or why
    not.

    This is what the modules are now: conditions of a single call (a tracer, an empty batch, a torch.func transform) are
    looked at when that call is made. A model that was not converted yet is shown as it is.

    Args:
        model: any module, converted or not.
        input_shape: of one input tensor, `(N, C, H, W)`; adds the shape of each unit's input. The model then runs
            once on the meta device: nothing is computed and its state does not change. Raises ValueError when it does
            not take such an input.
        dtype: of the activations, where that is not the parameters': under autocast.
        device: where to plan for, by default where the parameters are; "meta" stands for a GPU.
    """
    units = find_units(model)
    shapes = {} if input_shape is None else _input_shapes(model, units, input_shape)
    device = None if device is None else torch.device(device)
    rows = [_row(unit, shapes.get(unit.path), dtype, device) for unit in units]
    return Explanation(rows, _notes(model, units, rows))


def _row(unit: Unit, shape: tuple[int, ...] | None, dtype: torch.dtype | None, device: torch.device | None) -> Row:
    module, reason = unit.module, unit.reason
    if reason is not None:
        return Row(unit.path, unit.name, "stock", shape, "", "", reason)
    if unit.name == "stage":
        return _stage_row(unit, shape)
    if not isinstance(module, FusedModule):
        return Row(unit.path, unit.name, "stock", shape, "", "", "not converted: call fastres.convert(model)")
    separate = module.separate_reason()
    what = "" if unit.name == "conv_bn_relu" else "the shortcut runs as its own module: "
    backend, form, failure = _plan(module, dtype, device)
    reason = "; ".join(filter(None, (failure, separate and what + separate)))
    return Row(unit.path, unit.name, "fused" if separate is None else "partly", shape, backend, form, reason)


def _stage_row(unit: Unit, shape: tuple[int, ...] | None) -> Row:
    stage = unit.module
    chains, form = [], ""
    by_blocks = any(isinstance(child, FusedUnit) and child.fused_reason() is None for child in stage)
    if not isinstance(stage, FusedModule):
        reason = "not converted: call fastres.convert(model)"
        if by_blocks:
            reason = "nn.Sequential runs its blocks one by one: fastres.convert(model, granularity='auto') chains them"
    elif "forward" in stage.__dict__:
        reason, by_blocks = "its forward was replaced on the instance", False
    else:
        chains = [str(len(run)) for run in stage.runs() if len(run) > 1]
        if chains:
            form = f"{' and '.join(chains)} blocks in {'one chain' if len(chains) == 1 else 'chains'}"
        reason = _alone(stage)
    status = ("partly" if reason else "fused") if chains else "by blocks" if by_blocks else "stock"
    return Row(unit.path, unit.name, status, shape, "", form, reason)


def _alone(stage: FusedStage) -> str:
    """Which blocks of a stage run by themselves, and why."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in stage.alone_reasons().items():
        by_reason.setdefault(reason, []).append(name)
    if [len(names) for names in by_reason.values()] == [len(stage)]:
        return f"its blocks run one by one: {next(iter(by_reason))}"
    return "; ".join(
        f"{', '.join(names)} {'runs by itself' if len(names) == 1 else 'run by themselves'}: {reason}"
        for reason, names in by_reason.items()
    )


def _plan(module: FusedUnit, dtype: torch.dtype | None, device: torch.device | None) -> tuple[str, str, str | None]:
    """The requested backend with the namespaces that serve it, the form, and why a call would raise."""
    name = plan.requested(module.backend)
    weight = next(module.parameters(), None)
    if weight is None or (device is None and weight.device.type not in ("cpu", "cuda")):
        return name, "", None
    dtype, device = dtype or weight.dtype, device or weight.device
    try:
        chosen = set(plan.origins(dtype, device, name).values())
        form = module.form(dtype, device)
    except RuntimeError as error:
        return name, "", str(error)
    return f"{name}: {', '.join(namespace for namespace in backends.NAMESPACES if namespace in chosen)}", form, None


def _notes(model: nn.Module, units: list[Unit], rows: list[Row]) -> list[str]:
    if not rows:
        return [f"{type(model).__name__} has nothing to fuse: {NOTHING_KNOWN}."]
    stages = [row for row in rows if row.unit == "stage"]
    with_layers = [row for row in rows if row.unit != "stage"]
    notes = [f"{len(with_layers)} units: {_counts(with_layers)}."]
    if stages:
        notes[0] += f" {len(stages)} stage{'s' * (len(stages) > 1)}: {_counts(stages)}."
    inside = {id(child) for unit in units if unit.name != "stage" for child in _covered(unit)}
    outside = [module for module in model.modules() if id(module) not in inside]
    convs = sum(isinstance(module, nn.Conv2d) for module in outside)
    norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in outside)
    if convs or norms:
        notes.append(f"Outside these units, run as they are: convolutions: {convs}, batch norms: {norms}.")
    if any("DTensor" in row.reason for row in rows):
        notes.append(
            "Under fully_shard a parameter is DTensor between the steps and plain within them, where its block runs "
            "fused: explain a model before sharding it."
        )
    parameters = (weight for unit in units for weight in unit.module.parameters())
    weights = (weight for weight in parameters if not nn.parameter.is_lazy(weight) and weight.dim() == 4)
    if not all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights):
        notes.append(
            "Fused units compute in channels_last and return it: an NCHW input is converted once, at the first. "
            "The model's weights are NCHW: model.to(memory_format=torch.channels_last) makes them fit."
        )
    return notes


def _counts(rows: list[Row]) -> str:
    counts = ((status, sum(row.status == status for row in rows)) for status in STATUSES)
    return ", ".join(f"{count} {status}" for status, count in counts if count)


def _covered(unit: Unit) -> list[nn.Module]:
    """The modules that a row speaks of: all inside a block, the first four layers of a ResNet, each conv + BN + ReLU of
    an nn.Sequential.
    """
    if unit.name == "stem":
        return [unit.module.get_submodule(name) for name in ("conv1", "bn1")]
    if unit.name == "conv_bn_relu" and isinstance(unit.module, nn.Sequential):
        return [unit.module.get_submodule(name) for names in triples(unit.module) for name in names]
    return list(unit.module.modules())


def _input_shapes(model: nn.Module, units: list[Unit], input_shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}

    def recorder(path: str):
        def record(module, args):
            if args and isinstance(args[0], torch.Tensor):
                shapes[path] = tuple(args[0].shape)

        return record

    tensors = (*model.named_parameters(), *model.named_buffers())
    state = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
    dtype = next((t.dtype for t in state.values() if t.is_floating_point()), None)
    handles = [unit.module.register_forward_pre_hook(recorder(unit.path)) for unit in units]
    try:
        with torch.no_grad():
            torch.func.functional_call(model, state, (torch.empty(*input_shape, dtype=dtype, device="meta"),))
    except (RuntimeError, ValueError, TypeError) as error:
        shape = tuple(input_shape)
        raise ValueError(f"explain: the model does not take an input of input_shape={shape}: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    return shapes
