"""A chain of blocks under one function: what its operators are told, what they leave alone, what it saves."""

import copy
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastres import functional, plan
from fastres.memory import saved_bytes

STAGES = ("stage-bottleneck", "stage-basic", "stage-mixed")


def tensors(value):
    return [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]


class Record(TorchDispatchMode):
    """Names and arguments of the fastres operators that run; `around(operator, args, run)` may run them itself."""

    def __init__(self, around=lambda operator, args, run: run()):
        super().__init__()
        self.calls, self.around = [], around

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "fastres":
            return func(*args, **(kwargs or {}))
        names = [argument.name for argument in func._schema.arguments]
        self.calls.append((func._opname, dict(zip(names, args, strict=True))))
        return self.around(func, args, lambda: func(*args))


@pytest.mark.parametrize("unit_name", [*STAGES, *(f"{name}, stored" for name in STAGES)], indirect=True)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("dtype", "autocast"), [("float64", False), ("float32", False), ("float32", True)])
def test_a_stage_equals_its_blocks_one_by_one(unit_name, make_unit, train, dtype, autocast):
    """Bit for bit: the same products of the same numbers."""
    results = []
    for method in ("fused", "one_by_one"):
        unit, x = make_unit(unit_name, dtype=getattr(torch, dtype), size=(3, 9, 7))
        unit.train(train)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = getattr(unit, method)(x.requires_grad_())
        g = torch.sin(torch.arange(out.numel())).view_as(out).to(out.dtype)
        results.append((out, *torch.autograd.grad(out, [x, *unit.parameters()], g), *unit.state_dict().values()))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_who_masks_the_gradient_between_two_blocks(make_unit):
    """The block behind if its shortcut is the identity; the first block masks nothing: its input may be anything."""
    unit, x = make_unit("stage-mixed")
    with Record() as record:
        unit.fused(x.requires_grad_()).sum().backward()
    backward = [args for name, args in record.calls if name.endswith("_bwd")][::-1]
    assert [args["identity"] for args in backward] == [True, False, False, False, True]
    assert [args["mask_input"] for args in backward] == [False, False, False, False, True]
    assert [args["out"] is None for args in backward] == [False, False, False, True, False]
    unit, x = make_unit("stage-bottleneck")
    with Record() as record:
        unit.fused(x.requires_grad_()).sum().backward()
    backward = [args for name, args in record.calls if name.endswith("_bwd")][::-1]
    assert [args["mask_input"] for args in backward] == [False, True, True]
    assert [args["out"] is None for args in backward] == [True, True, False]


FORMS = {
    "folded": {},
    "stored": {"gram_folding": False},
    "projection stored, one pass": {"fold_projection": False, "one_pass": True},
    "projection folded, two kernels": {"fold_projection": True, "one_pass": False},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STAGES)
def test_an_operator_leaves_its_inputs_alone_and_returns_none_of_them(name, dtype, form, make_unit):
    """By the reference (float64) and by the library, which adds in place."""

    def watched(operator, args, run):
        arguments = zip(operator._schema.arguments, args, strict=True)
        given = [t for a, value in arguments if not (a.alias_info and a.alias_info.is_write) for t in tensors(value)]
        before = [t.clone() for t in given]
        results = run()
        assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True)), operator
        storages = {t.untyped_storage().data_ptr() for t in tensors(args)}
        assert not storages & {t.untyped_storage().data_ptr() for t in tensors(results)}, operator
        return results

    unit, x = make_unit(name, dtype=dtype)
    with plan.wrapping(lambda k: plan.in_form(k, **FORMS[form])), Record(watched) as record:
        unit.fused(x.requires_grad_()).sum().backward()
    assert len(record.calls) == 2 * len(unit.blocks)


@pytest.mark.parametrize("frozen", [1, 2, 3])
@pytest.mark.parametrize("name", ["stage-bottleneck", "stage-basic"])
def test_frozen_blocks_in_front_run_no_backward_and_save_nothing(name, frozen, make_unit):
    unit, x = make_unit(name)
    for block in unit.blocks[:frozen]:
        block.requires_grad_(False)
    twin = copy.deepcopy(unit)
    saved = [saved_bytes(method, x, exclude=unit.buffers()) for method in (unit.fused, twin.one_by_one)]
    assert saved[0] == saved[1]
    with Record() as record:
        out = unit.fused(x)
        assert out.requires_grad == (frozen < 3)
        if frozen < 3:
            out.square().sum().backward()
    backward = [args for name, args in record.calls if name.endswith("_bwd")]
    assert len(backward) == 3 - frozen
    if backward:
        assert backward[-1]["needs"][0] is False
        twin.one_by_one(x).square().sum().backward()
        for ours, theirs in zip(unit.parameters(), twin.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None)
            assert ours.grad is None or torch.allclose(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("unit_name", [*STAGES, *(f"{name}, stored" for name in STAGES)], indirect=True)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_stage_saves_no_more_than_its_blocks(unit_name, autocast, make_unit):
    unit, x = make_unit(unit_name, dtype=torch.float32)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        stage, blocks = (saved_bytes(method, x, exclude=unit.buffers()) for method in (unit.fused, unit.one_by_one))
    assert 0 < stage <= blocks


def test_without_gradients_nothing_outlives_its_block(make_unit):
    """A chain would hold what each block makes until the last has run."""
    unit, x = make_unit("stage-bottleneck")
    made, alive = [], []

    def watched(operator, args, run):
        alive.append([t() is not None for t in made])
        results = run()
        made.append(weakref.ref(results[1]))  # the first conv's raw output
        return results

    with torch.no_grad(), Record(watched):
        unit.fused(x)
    assert alive == [[], [False], [False, False]]


def test_weights_are_cast_once(make_unit):
    unit, x = make_unit("stage-bottleneck", dtype=torch.float32)
    casts = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and any(args[0] is conv.weight for conv in unit.convs):
                casts.append(args[0])
            return func(*args, **(kwargs or {}))

    with Casts(), torch.autocast("cpu", torch.bfloat16):
        unit.fused(x).float().sum().backward()
    assert len(casts) == len(unit.convs) == len({id(weight) for weight in casts})


def test_each_block_may_have_constant_or_batch_statistics(make_unit, run_both):
    unit, x = make_unit("stage-bottleneck")
    unit.blocks[1].eval()
    with Record() as record:
        unit.fused(x)
    assert [name for name, _ in record.calls] == ["bottleneck_train", "bottleneck_const", "bottleneck_train"]
    (_, stock, _), (_, ours, _) = run_both(unit, x)
    for name, expected in stock.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-9, atol=1e-11)


def test_the_same_block_twice(make_unit):
    unit, x = make_unit("stage-basic")
    unit.blocks[2] = unit.blocks[1]
    twin = copy.deepcopy(unit)
    for module, method in ((unit, "fused"), (twin, "stock")):
        getattr(module, method)(x).square().sum().backward()
    for ours, stock in zip(unit.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, stock.grad, rtol=1e-10, atol=1e-12)
    for ours, stock in zip(unit.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-10, atol=1e-12)


def test_errors_name_the_block(make_unit):
    unit, x = make_unit("stage-bottleneck")
    params = [block.params() for block in unit.blocks]
    with pytest.raises(ValueError, match="stage: blocks is empty"):
        functional.stage(x, [])
    with pytest.raises(ValueError, match=r"stage, block 0 \(bottleneck\): x must have 6 channels .*, has 7"):
        functional.stage(torch.cat([x, x[:, :1]], 1), params)
    with pytest.raises(ValueError, match=r"stage, block 1 \(bottleneck\): x must have 6 channels .*, has 16"):
        functional.stage(x, [params[0], params[0]])
    with pytest.raises(ValueError, match=r"stage, block 1 \(bottleneck\): an identity shortcut needs"):
        functional.stage(x, [params[0], params[1]._replace(stride=2)])
    with pytest.raises(TypeError, match=r"block 2 \(bottleneck\): x is torch.float64 but the weights are"):
        functional.stage(x, [*params[:2], unit.blocks[2].float().params()])
    with pytest.raises(ValueError, match="backend='cudnn' is not known"):
        functional.stage(x, params[:2], backend="cudnn")
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        functional.stage(x[:1, :, :2, :2], params[:2])
