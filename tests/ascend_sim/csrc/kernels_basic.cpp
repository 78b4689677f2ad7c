// Kernels that the CPU ones do not cover: copies between devices, fused cells and attention, torch_npu's own operators.
#include "kernels.h"

namespace sim {

using at::Tensor;
using Optional = std::optional<Tensor>;

namespace {

bool given(const Optional& tensor) { return tensor && tensor->defined(); }

Tensor& copy_(Tensor& self, const Tensor& source, bool) {
  TORCH_CHECK(source.layout() == at::kStrided && self.layout() == at::kStrided,
              "copy_ of a sparse tensor is not simulated");
  Call call;
  BelowAutograd guard;
  call.view(self).copy_(call.view(source));
  return self;
}

Tensor copy_from(const Tensor& self, const Tensor& destination, bool non_blocking) {
  Tensor to = destination;
  return copy_(to, self, non_blocking);
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& destination) {
  Tensor to = destination;
  to.resize_(self.sizes());
  return copy_(to, self, false);
}

// The device counts integers too, which torch's CPU kernel refuses.
Tensor histogram(const Tensor& x, int64_t bins, const at::Scalar& low, const at::Scalar& high) {
  Tensor counts;
  Call call;
  {
    BelowAutograd guard;
    Tensor values = call.view(x);
    bool whole = at::isIntegralType(x.scalar_type(), false);
    counts = at::histc(whole ? values.to(at::kDouble) : values, bins, low, high).to(x.scalar_type());
  }
  return call.back(counts);
}

Tensor& histogram_out(const Tensor& x, int64_t bins, const at::Scalar& low, const at::Scalar& high, Tensor& out) {
  out.resize_({bins});
  return out.copy_(histogram(x, bins, low, high));
}

int64_t attention_choice(const Tensor&, const Tensor&, const Tensor&, const Optional&, double, bool,
                         std::optional<double>, bool) {
  return 0;  // the formula, no fused kernel
}

Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, const Optional& mask, double dropout,
                 bool causal, std::optional<double> scale, bool grouped) {
  Optional added = mask;
  if (given(mask) && mask->scalar_type() == at::kBool)
    added = at::zeros(mask->sizes(), query.options())
                .masked_fill_(mask->logical_not(), -std::numeric_limits<double>::infinity());
  return std::get<0>(
      at::_scaled_dot_product_attention_math(query, key, value, added, dropout, causal, std::nullopt, scale, grouped));
}

Tensor with_bias(const Tensor& gates, const Optional& bias) { return given(bias) ? gates + *bias : gates; }

std::tuple<Tensor, Tensor, Tensor> lstm_cell(const Tensor& input_gates, const Tensor& hidden_gates, const Tensor& cell,
                                             const Optional& input_bias, const Optional& hidden_bias) {
  Tensor gates = with_bias(with_bias(input_gates + hidden_gates, input_bias), hidden_bias);
  auto part = gates.unsafe_chunk(4, 1);  // input, forget, cell, output
  Tensor next_cell = part[1].sigmoid() * cell + part[0].sigmoid() * part[2].tanh();
  return {part[3].sigmoid() * next_cell.tanh(), next_cell, at::empty({0}, gates.options())};
}

std::tuple<Tensor, Tensor> gru_cell(const Tensor& input_gates, const Tensor& hidden_gates, const Tensor& hidden,
                                    const Optional& input_bias, const Optional& hidden_bias) {
  auto in = with_bias(input_gates, input_bias).unsafe_chunk(3, 1);  // reset, update, new
  auto rec = with_bias(hidden_gates, hidden_bias).unsafe_chunk(3, 1);
  Tensor reset = (rec[0] + in[0]).sigmoid(), update = (rec[1] + in[1]).sigmoid(),
         fresh = (in[2] + rec[2] * reset).tanh();
  return {(hidden - fresh) * update + fresh, at::empty({0}, input_gates.options())};
}

// Formats are an affair of the hardware: a cast to another one changes nothing here.
Tensor format_cast(const Tensor& x, int64_t, std::optional<int64_t>, std::optional<int64_t>) { return x.clone(); }
Tensor format_cast_short(const Tensor& x, int64_t) { return x.clone(); }
Tensor& format_cast_(Tensor& x, int64_t, std::optional<int64_t>, std::optional<int64_t>) { return x; }

Tensor dtype_cast(const Tensor& x, int64_t dtype, std::optional<int64_t>) {
  return x.to(static_cast<at::ScalarType>(dtype));
}
Tensor dtype_cast_short(const Tensor& x, at::ScalarType dtype) { return x.to(dtype); }
Tensor dtype_cast_backward(const Tensor& x, at::ScalarType dtype, std::optional<int64_t>, std::optional<int64_t>) {
  return x.to(dtype);
}

// The overflow flag of old chips; in INF_NAN mode nothing ever sets it.
Tensor float_status(const Tensor& x) { return at::zeros({8}, x.options().dtype(at::kFloat)); }
Tensor float_status_of(const Tensor& x, int64_t) { return float_status(x); }

bool any_non_finite(at::TensorList tensors) {
  for (auto& tensor : tensors)
    if (!at::isfinite(tensor).all().item<bool>()) return true;
  return false;
}

}  // namespace

void register_counting(torch::Library& device) {
  device.impl("histc", histogram);
  device.impl("histc.out", histogram_out);
}

void register_copies(torch::Library& device) {
  device.impl("copy_", copy_);
  device.impl("_copy_from", copy_from);
  device.impl("_copy_from_and_resize", copy_from_and_resize);
}

// Made of differentiable operators, so they are the kernel on the device and for autograd.
void register_networks(torch::Library& device, torch::Library& autograd) {
  device.impl("_fused_sdp_choice", attention_choice);
  for (auto* library : {&device, &autograd}) {
    library->impl("scaled_dot_product_attention", attention);
    library->impl("_thnn_fused_lstm_cell", lstm_cell);
    library->impl("_thnn_fused_gru_cell", gru_cell);
  }
}

void register_npu_operators(torch::Library& npu) {
  npu.impl("npu_format_cast", format_cast);
  npu.impl("_npu_format_cast", format_cast_short);
  npu.impl("npu_format_cast_.acl_format", format_cast_);
  npu.impl("npu_dtype_cast", dtype_cast);
  npu.impl("_npu_dtype_cast", dtype_cast_short);
  npu.impl("npu_dtype_cast_backward", dtype_cast_backward);
  npu.impl("_npu_dtype_cast_backward", dtype_cast_short);
  npu.impl("npu_alloc_float_status", float_status);
  npu.impl("npu_get_float_status", float_status_of);
  npu.impl("npu_clear_float_status", float_status_of);
  npu.impl("_amp_foreach_non_finite_check", any_non_finite);
}

}  // namespace sim
