// The product of a layer, of tensors of torch: its forward and backward, on the grid of the device as well.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/div.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>

#include <array>
#include <optional>
#include <vector>

#include "training.h"

namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

float* floats(const Tensor& tensor) {
  TORCH_CHECK(tensor.data_ptr() != nullptr, "A tensor of a quantized layer has no memory. Is it a sharded parameter?");
  return static_cast<float*>(tensor.data_ptr());
}

// What is done with input and weight: a matrix product, or a convolution with its settings one after another.
struct Product {
  bool linear;
  std::vector<int64_t> stride, padding, dilation, output_padding;
  bool transposed = false;
  int64_t groups = 1;

  explicit Product(at::IntArrayRef settings) : linear(settings.empty()) {
    if (linear) return;
    const size_t dims = (settings.size() - 2) / 4;
    std::vector<int64_t>* parts[] = {&stride, &padding, &dilation, &output_padding};
    for (size_t i = 0; i < 4; ++i) *parts[i] = settings.slice(i * dims, dims).vec();
    transposed = settings[settings.size() - 2];
    groups = settings[settings.size() - 1];
  }

  Tensor forward(const Tensor& x, const Tensor& weight, const Optional& bias) const {
    if (linear) return at::linear(x, weight, bias);
    return at::convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups);
  }

  std::array<Tensor, 3> backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                 std::array<bool, 3> needs) const {
    if (!linear) {
      const std::vector<int64_t> channels = {grad.size(1)};
      const at::OptionalIntArrayRef bias_sizes = needs[2] ? at::OptionalIntArrayRef(channels) : std::nullopt;
      auto [of_x, of_weight, of_bias] =
          at::convolution_backward(grad, x, weight, bias_sizes, stride, padding, dilation, transposed, output_padding,
                                   groups, needs);
      return {of_x, of_weight, of_bias};
    }
    const Tensor rows = grad.reshape({-1, grad.size(-1)});
    std::array<Tensor, 3> found;
    if (needs[0]) found[0] = rows.mm(weight).view(x.sizes());
    if (needs[1]) found[1] = rows.t().mm(x.reshape({-1, x.size(-1)}));
    if (needs[2]) found[2] = rows.sum(0);
    return found;
  }
};

// Numbers that a call comes with, in the order of native/layer.py.
struct Settings {
  int bits, weight_bits;
  bool fixed_min, on_grid, bias_follows;
  int64_t rows;

  explicit Settings(at::IntArrayRef values)
      : bits(values[0]), weight_bits(values[1]), fixed_min(values[2]), on_grid(values[3]), bias_follows(values[4]),
        rows(values[5]) {}
};

bool is_dense(const Tensor& tensor) {
  return tensor.is_contiguous() || tensor.is_contiguous(at::MemoryFormat::ChannelsLast) ||
         tensor.is_contiguous(at::MemoryFormat::ChannelsLast3d);
}

// The tensor in the memory layout of another one.
Tensor as_lies(const Tensor& tensor, const Tensor& like) {
  if (tensor.strides() == like.strides() && tensor.scalar_type() == like.scalar_type()) return tensor;
  return at::empty_like(like).copy_(tensor);
}

Tensor numbers(at::IntArrayRef shape) { return at::empty(shape, at::TensorOptions().dtype(at::kFloat)); }

// Memory in the layout of a tensor for what is gone when the product is computed: the same for all layers. Memory that
// is allocated and freed for each of them is given back to the system and zeroed by it again every time.
Tensor passing(const Tensor& like, int which) {
  thread_local Tensor memory[2];
  Tensor& kept = memory[which];
  if (!kept.defined() || kept.numel() < like.numel()) {
    kept = Tensor();  // before there is another one
    kept = numbers({like.numel()});
  }
  return kept.as_strided(like.sizes(), like.strides());
}

Tensor quantized_weight(const Tensor& weight, const Tensor& scales, const Settings& s) {
  Tensor out = passing(weight, 1);
  weight_values<false>(floats(weight), s.rows, weight.numel() / s.rows, s.weight_bits, floats(scales), floats(out),
                       at::get_num_threads());
  return out;
}

// The output on the device's grid, of codes.
Tensor grid_output(const Product& product, const Tensor& codes, const Tensor& weight, const Optional& bias,
                   const Tensor& scales, float input_scale, const Settings& s) {
  Tensor weight_codes = passing(weight, 1), products = numbers({s.rows}), kept = numbers({s.rows});
  weight_values<true>(floats(weight), s.rows, weight.numel() / s.rows, s.weight_bits, floats(scales),
                      floats(weight_codes), at::get_num_threads());
  product_scales(floats(scales), s.rows, input_scale, floats(products), floats(kept));
  std::vector<int64_t> shape(weight.dim() - 1, 1);
  shape[0] = -1;
  Tensor output = product.forward(codes, weight_codes, std::nullopt);
  if (bias && !s.bias_follows) output.add_(at::div(*bias, products).round_().view(shape));
  output.mul_(kept.view(shape));
  if (bias && s.bias_follows) output.add_(*bias);
  return output;
}

}  // namespace
