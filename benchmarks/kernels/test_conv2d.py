"""The convolution of ResNet-50's stem: forward and wgrad, as an image needs no gradient. Eager is it alone."""

from __future__ import annotations

import pytest

from fastres import cases
from fastres.measure import eager, kernels
from fastres.measure.shapes import STEM

CASE = "7x7 stride 2"


@pytest.mark.core("cuda", "cpu")
def test_conv2d(batch, dtype, device, measure):
    options = cases.conv2d.OPTIONS[CASE]

    def run(k, t):
        k.conv2d(t["x"], t["weight"], **options)
        k.conv2d_wgrad(t["x"], t["dy"], (7, 7), **options)

    def forward(t):
        return eager.conv(t["x"], t["weight"], 2, 3)

    def wgrad(t):
        return eager.conv_backward(t["dy"], t["x"], t["weight"], 2, 3, dgrad=False)

    def stock(t):
        forward(t)
        wgrad(t)

    measure(
        kernels.experiments(
            cases.BY_NAME[f"conv2d, {CASE}"],
            dtype,
            device,
            {"n": batch} | STEM,
            run=run,
            stock=stock,
            eager={"conv2d": forward, "conv2d_wgrad": wgrad},
        )
    )
