import gc
import weakref

import pytest
import torch
from torch import nn

from fastres.memory import saved_bytes

X = torch.randn(8, 4, 5, 7)


def test_a_conv_keeps_its_input_and_not_its_parameters():
    assert saved_bytes(nn.Conv2d(4, 6, 3), X) == X.nbytes


def test_a_function_leaves_out_the_parameters_that_it_saves():
    conv, linear = nn.Conv2d(4, 6, 3), nn.Linear(7, 3)  # the linear layer saves a transposed view of its weight
    assert saved_bytes(lambda x: conv(x), X) == X.nbytes
    x = X.clone().requires_grad_()
    assert saved_bytes(lambda x: linear(x), x) == X.nbytes


def test_a_tensor_that_is_no_parameter_counts():
    weight = torch.randn(6, 4, 3, 3, requires_grad=True)
    assert saved_bytes(lambda x: nn.functional.conv2d(x, weight), X) == X.nbytes + weight.nbytes


def test_batch_norm_keeps_two_vectors_beside_its_input():
    assert saved_bytes(nn.BatchNorm2d(4), X) == X.nbytes + 2 * 4 * 4


def test_two_views_of_one_storage_count_once():
    x = X.clone().requires_grad_()
    assert saved_bytes(lambda x: (x[:4] * x[4:]).sum(), x) == x.nbytes


def test_a_view_counts_the_storage_that_it_keeps_alive():
    x = X.clone().requires_grad_()
    assert saved_bytes(lambda x: x[:1].square(), x) == x.nbytes


def test_a_graph_that_died_during_the_forward_pass_counts_nothing():
    x = X.clone().requires_grad_()

    def with_detour(x):
        (x * 2).exp()
        return x.exp()

    assert saved_bytes(with_detour, x) == saved_bytes(torch.exp, x) == x.nbytes


def test_nothing_is_saved_where_no_gradient_flows():
    assert saved_bytes(torch.exp, X) == 0


def test_it_measures_under_no_grad_too():
    with torch.no_grad():
        assert saved_bytes(nn.Conv2d(4, 6, 3), X) == X.nbytes


def test_a_result_that_two_operators_save_counts_once():
    block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    assert saved_bytes(block, X) == 2 * X.nbytes


@pytest.mark.parametrize("fn", [torch.exp, nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())])
def test_nothing_stays_alive_after_the_measurement(fn):
    results = []

    def observed(x):
        result = fn(x)
        results.append(weakref.ref(result))
        return result

    saved_bytes(observed, X.clone().requires_grad_())
    gc.collect()
    assert results[0]() is None


def test_excluded_tensors_are_left_out():
    norm = nn.BatchNorm2d(4)
    assert saved_bytes(lambda x: norm(x), X, exclude=norm.buffers()) == saved_bytes(norm, X)
    assert saved_bytes(norm, X, exclude=[X]) == saved_bytes(norm, X) - X.nbytes
