"""What runs on the device, installed as `fastres.kernels`.

Every namespace here is a module of functions ("launchers") with one set of names and signatures:

- `reference`: each kernel in plain PyTorch; the definition of what it computes, for any floating dtype on any device;
- `library`: the same contracts through PyTorch's own operators (cuDNN, oneDNN, BLAS);
- `triton`: the same contracts as Triton kernels;
- `projection`: the C++/CUDA extension for the strided 1x1 projection shortcut.

`fastres.plan` chooses, kernel by kernel, which namespace runs. Conventions that hold everywhere:

- Activations are dense `[N, H, W, C]` tensors (channels_last memory seen as NHWC). M = N*H*W counts rows (pixels).
- 1x1 weights are `[K, C]`, other conv weights `[K, C/groups, R, S]`, in the dtype of the activations.
- "acc", the accumulation dtype, is float64 for float64 activations and float32 for all others. Statistics, per-channel
  vectors, Gram matrices and weight gradients are in acc.
- `bn`, `[4, C]` in acc, holds one batch norm's vectors: rows mean, rstd, scale, shift, where rstd = rsqrt(var + eps),
  scale = gamma*rstd and shift = beta - mean*scale, so that BN(y) = scale*y + shift.
- `grad`, `[4, C]` in acc, holds its backward vectors: rows dgamma, dbeta, b, c, where the gradient of the input is
  dy = scale*(g + b*y + c). With constant statistics (eval mode, frozen BN) b = c = 0.
- The mask of a ReLU with output (or input) z is `~(z <= 0)`, as in PyTorch: NaN passes.

docs/arithmetic.md derives the formulas.
"""
