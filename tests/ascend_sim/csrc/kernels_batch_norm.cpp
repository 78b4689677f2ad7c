// The operators of SyncBatchNorm, which have no CPU kernels: those of torch's module (mean and 1/std are exchanged) and
// those of torch_npu's (sum and sum of squares are).
#include "kernels.h"

namespace sim {

using at::Tensor;
using Optional = std::optional<Tensor>;

namespace {

Tensor in_float(const Tensor& x) { return x.to(at::kFloat); }

std::vector<int64_t> all_but_channels(const Tensor& x) {
  std::vector<int64_t> dims;
  for (int64_t i = 0; i < x.dim(); i++)
    if (i != 1) dims.push_back(i);
  return dims;
}

Tensor per_channel(const Tensor& values, const Tensor& x) {  // broadcast against x
  std::vector<int64_t> shape(x.dim(), 1);
  shape[1] = values.numel();
  return in_float(values).view(shape);
}

void blend(const Optional& running, const Tensor& value, double momentum) {
  if (!running || !running->defined()) return;
  Tensor target = *running;
  target.mul_(1 - momentum).add_(value.to(target.scalar_type()), momentum);
}

std::tuple<Tensor, Tensor> sums(const Tensor& x, double) {
  Tensor value = in_float(x);
  auto dims = all_but_channels(x);
  return {value.sum(dims), (value * value).sum(dims)};
}

std::tuple<Tensor, Tensor> gather_sums(const Tensor& x, const Tensor& sum, const Tensor& squares,
                                       const Optional& running_mean, const Optional& running_var, double momentum,
                                       double eps, const Tensor& counts) {
  Tensor n = counts.sum(), mean = sum.sum(0) / n, var = squares.sum(0) / n - mean * mean;
  blend(running_mean, mean, momentum);
  blend(running_var, var * n / (n - 1), momentum);
  return {mean, (var + eps).rsqrt()};
}

std::tuple<Tensor, Tensor> stats(const Tensor& x, double eps) {
  Tensor value = in_float(x);
  auto dims = all_but_channels(x);
  return {value.mean(dims), (value.var(dims, false) + eps).rsqrt()};
}

std::tuple<Tensor, Tensor> gather_stats(const Tensor& x, const Tensor& means, const Tensor& invstds,
                                        const Optional& running_mean, const Optional& running_var, double momentum,
                                        double eps, const Tensor& counts) {
  Tensor weight = in_float(counts).view({-1, 1}), n = weight.sum(), mean = (means * weight).sum(0) / n;
  Tensor var = ((invstds.pow(-2) - eps + (means - mean).pow(2)) * weight).sum(0) / n;
  blend(running_mean, mean, momentum);
  blend(running_var, var * n / (n - 1), momentum);
  return {mean, (var + eps).rsqrt()};
}

Tensor normalize(const Tensor& x, const Optional& weight, const Optional& bias, const Tensor& mean,
                 const Tensor& invstd, double) {
  Tensor y = (in_float(x) - per_channel(mean, x)) * per_channel(invstd, x);
  if (weight && weight->defined()) y = y * per_channel(*weight, x);
  if (bias && bias->defined()) y = y + per_channel(*bias, x);
  return y.to(x.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_sums(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                                         const Tensor& invstd, const Optional& weight, bool, bool,
                                                         bool) {
  auto dims = all_but_channels(x);
  Tensor g = in_float(grad), sum = g.sum(dims), sum_x = (g * (in_float(x) - per_channel(mean, x))).sum(dims);
  auto dtype = weight && weight->defined() ? weight->scalar_type() : at::kFloat;
  return {sum, sum_x, (sum_x * invstd).to(dtype), sum.clone().to(dtype)};
}

Tensor backward(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& invstd, const Optional& weight,
                const Tensor& sum, const Tensor& sum_x, const Tensor& counts) {
  Tensor n = in_float(counts.sum()), scale = per_channel(invstd, x);
  Tensor centred = in_float(x) - per_channel(mean, x);
  Tensor g = (in_float(grad) - per_channel(sum / n, x) - centred * scale * scale * per_channel(sum_x / n, x)) * scale;
  if (weight && weight->defined()) g = g * per_channel(*weight, x);
  return g.to(x.scalar_type());
}

}  // namespace

void register_batch_norm(torch::Library& device, torch::Library& npu) {
  device.impl("batch_norm_stats", stats);
  device.impl("batch_norm_gather_stats_with_counts", gather_stats);
  device.impl("batch_norm_elemt", normalize);
  device.impl("batch_norm_backward_reduce", backward_sums);
  device.impl("batch_norm_backward_elemt", backward);
  npu.impl("batch_norm_reduce", sums);
  npu.impl("batch_norm_gather_stats_update", gather_sums);
}

}  // namespace sim
