// int8fx::int8_linear and int8fx::quantized_linears_cpu; int8fx::attention is in attention_operator.h.
//
//   y = ((x_int8 @ w_int8ᵀ) · x_scale + x_outlier @ w_int8ᵀ) · w_scale + bias
//
// Rows are packed once for all threads; then threads take units of rows x channels from a queue.
// A unit keeps its packed rows in the L2 cache and streams each panel of weights past them.

#include <atomic>
#include <cmath>
#include <mutex>
#include <string>
#include <vector>

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "identity.h"
#include "kernels.h"
#include "storage.h"

using namespace std::string_literals;

namespace int8fx {
namespace {

constexpr int64_t FORK_BYTES = 64 << 10;      // of rows: less is not worth a second thread
constexpr int64_t MIN_UNIT_BYTES = 16 << 10;  // of weights, times tiles of rows: a microsecond of work
constexpr int64_t UNITS_PER_THREAD = 32;      // so that no thread waits long for the last

// The kernels that this machine can execute, best first.
const std::vector<const Kernel*>& usable_kernels() {
  static const auto usable = [] {
    std::vector<const Kernel*> found;
    for (const Kernel& kernel : KERNELS)
      if (kernel.supported()) found.push_back(&kernel);
    return found;
  }();
  return usable;
}

std::atomic<const Kernel*> forced_kernel{nullptr};

const Kernel& kernel_for(int64_t M) {
  if (const Kernel* forced = forced_kernel.load(std::memory_order_relaxed)) return *forced;
  for (const Kernel* kernel : usable_kernels())
    if (M >= kernel->min_rows) return *kernel;
  return *usable_kernels().back();
}

int64_t l2_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 1 << 20;
}

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Memory for one call. Small calls, the ones that count microseconds, stay on the stack.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    if (bytes > static_cast<int64_t>(sizeof stack_)) {
      heap_ = at::Tensor(at::detail::empty_cpu({bytes}, at::kByte));
      next_ = static_cast<char*>(heap_.data_ptr());
    }
  }

  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(next_);
    next_ += bytes_for<T>(count);
    return taken;
  }

  template <class T>
  static int64_t bytes_for(int64_t count) {
    return round_up(count * sizeof(T), 64);
  }

 private:
  alignas(64) char stack_[16 << 10];
  at::Tensor heap_;
  char* next_ = stack_;
};

// ---- rows

// Columns that hold an outlier, ascending.
std::vector<int32_t> flagged(const bool* columns, int64_t K) {
  std::vector<int32_t> found;
  int64_t k = 0;
  for (; k + 8 <= K; k += 8) {
    uint64_t eight;
    std::memcpy(&eight, columns + k, 8);
    if (eight == 0) continue;
    for (int64_t i = k; i < k + 8; ++i)
      if (columns[i]) found.push_back(i);
  }
  for (; k < K; ++k)
    if (columns[k]) found.push_back(k);
  return found;
}

// Collect the outliers of one tile of rows: of each row those that are not zero, or, when most are
// not, all flagged columns of all rows, which can then walk them together.
template <class T>
void collect_outliers(const Activations& a, int64_t tile) {
  const int64_t m0 = tile * a.row_tile;
  const int64_t rows = std::min(a.row_tile, a.M - m0);
  Outlier* const outliers = a.outliers + m0 * a.column_count;
  const auto outlier = [&](int64_t r, int32_t k) {
    const float value = static_cast<const T*>(a.x_outlier)[(m0 + r) * a.K + k];
    // With a threshold, a NaN is no outlier; without, everything that is not zero is.
    return a.threshold == 0 || std::abs(value) >= a.threshold ? value : 0.0f;
  };
  int64_t non_zero = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t before = non_zero;
    for (int64_t i = 0; i < a.column_count; ++i) {
      const float value = outlier(r, a.columns[i]);
      outliers[non_zero] = {a.columns[i], value};
      non_zero += value != 0;
    }
    a.outlier_count[m0 + r] = non_zero - before;
  }
  a.dense[tile] = 4 * non_zero >= rows * a.column_count;
  if (!a.dense[tile]) return;
  auto* values = reinterpret_cast<float*>(outliers);
  for (int64_t i = 0; i < a.column_count; ++i)
    for (int64_t r = 0; r < rows; ++r) *values++ = outlier(r, a.columns[i]);
}

void pack(const Product& product, const Activations& a, int64_t tile) {
  product.pack(a, tile);
  if (a.column_count == 0) return;
  switch (a.dtype) {
    case at::kBFloat16: return collect_outliers<at::BFloat16>(a, tile);
    case at::kHalf: return collect_outliers<at::Half>(a, tile);
    default: return collect_outliers<float>(a, tile);
  }
}

// ---- units

struct Blocks {
  const Weight* weight;
  int64_t begin, end;
};

// Rows a tile: as many as the product likes, or fewer, so that the last tile is not much shorter.
int64_t even_tiles(const Product& product, int64_t M) {
  const int64_t tiles = M <= product.one_tile ? 1 : at::divup(M, product.row_tile);
  return round_up(at::divup(M, tiles), product.row_step);
}

// What dense outliers take in the cache, for each row on average.
int64_t dense_outlier_bytes(const Activations& a) {
  if (a.column_count == 0) return 0;
  const int64_t tiles = at::divup(a.M, a.row_tile);
  return std::count(a.dense, a.dense + tiles, true) * a.column_count * sizeof(float) / tiles;
}

// Cut every weight into runs of blocks, and rows into as many as half of an L2 cache holds.
struct Plan {
  std::vector<Blocks> runs;
  int64_t rows, units;

  Plan(const Product& product, const Activations& a, c10::ArrayRef<Weight> weights, int64_t threads) {
    const int64_t row_bytes =
        std::max(a.K_padded, K_MULTIPLE) * product.element_bytes + dense_outlier_bytes(a);
    const int64_t cached_tiles = l2_bytes() / 2 / (row_bytes * a.row_tile);
    rows = std::max<int64_t>(cached_tiles, 1) * a.row_tile;
    const int64_t row_units = at::divup(a.M, rows);
    rows = round_up(at::divup(a.M, row_units), a.row_tile);

    int64_t blocks = 0;
    for (const Weight& weight : weights) blocks += at::divup(weight.N, BLOCK_N);
    const int64_t wanted = at::divup(blocks * row_units, threads * UNITS_PER_THREAD);
    const int64_t tiles = at::divup(std::min(rows, a.M), a.row_tile);
    const int64_t least = at::divup(MIN_UNIT_BYTES, block_bytes(a.K_padded) * tiles);
    const int64_t run = round_up(std::max(wanted, least), product.panel);
    for (const Weight& weight : weights) {
      const int64_t end = at::divup(weight.N, BLOCK_N);
      for (int64_t b = 0; b < end; b += run)
        runs.push_back({&weight, b, std::min(b + run, end)});
    }
    units = row_units * runs.size();
  }

  void execute(const Product& product, const Activations& a, int64_t unit) const {
    const int64_t m0 = unit / runs.size() * rows;
    const Blocks& run = runs[unit % runs.size()];
    product.multiply(a, *run.weight, m0, std::min(m0 + rows, a.M), run.begin, run.end);
  }
};

// Each thread works through a range of its own, whose weights it prefetches from unit to unit, and
// then helps the others, so that a thread which the machine holds up does not hold up the call.
class Queue {
 public:
  Queue(int64_t units, int64_t threads) : ranges_(threads) {
    for (int64_t t = 0; t < threads; ++t) {
      ranges_[t].next = units * t / threads;
      ranges_[t].end = units * (t + 1) / threads;
    }
  }

  template <class F>
  void drain(int64_t thread, const F& execute) {
    const int64_t threads = ranges_.size();
    for (int64_t i = 0; i < threads; ++i) {
      Range& range = ranges_[(thread + i) % threads];
      for (int64_t unit; (unit = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;)
        execute(unit);
    }
  }

 private:
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Range> ranges_;
};

void multiply_all(const Product& product, const Activations& a, c10::ArrayRef<Weight> weights) {
  int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const Plan plan(product, a, weights, threads);
  threads = std::min(threads, plan.units);
  Queue queue(plan.units, threads);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    if (product.enter) product.enter(a);
    for (int64_t thread = begin; thread < end; ++thread)
      queue.drain(thread, [&](int64_t unit) { plan.execute(product, a, unit); });
    if (product.leave) product.leave();
  });
}

// ---- the operators

c10::MaybeOwned<at::Tensor> contiguous(const at::Tensor& tensor) {
  return tensor.expect_contiguous();
}

void check_activation(const at::Tensor& x) {
  const auto dtype = x.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
              "x must be float32, bfloat16 or float16, and is ", dtype);
  TORCH_CHECK(x.dim() > 0, "x must have a last dimension");
}

void check_weight(
    int64_t K, const at::Tensor& weight, const at::Tensor& w_scale,
    const std::optional<at::Tensor>& bias) {
  const int64_t N = w_scale.numel();
  TORCH_CHECK(w_scale.scalar_type() == at::kFloat, "w_scale must be float32");
  TORCH_CHECK(weight.scalar_type() == at::kChar && weight.dim() == 2 &&
                  weight.size(0) == at::divup(N, BLOCK_N) &&
                  weight.size(1) == block_bytes(round_up(K, K_MULTIPLE)) && weight.is_contiguous(),
              "weight must be packed from int8 [", N, ", ", K, "]");
  TORCH_CHECK(!bias || bias->numel() == N, "bias must hold one value per output channel");
}

void check(
    const at::Tensor& x_int8, const at::Tensor& x_scale, const at::Tensor& x_outlier,
    const std::optional<at::Tensor>& outlier_columns, const at::Tensor& weight,
    const at::Tensor& w_scale, const std::optional<at::Tensor>& bias) {
  const int64_t K = x_int8.size(-1);
  check_activation(x_outlier);
  TORCH_CHECK(x_int8.scalar_type() == at::kChar, "x_int8 must be int8");
  TORCH_CHECK(x_scale.scalar_type() == at::kFloat, "x_scale must be float32");
  TORCH_CHECK(K == 0 || x_scale.numel() * K == x_int8.numel(), "x_scale must hold one scale per row");
  TORCH_CHECK(!outlier_columns || (outlier_columns->scalar_type() == at::kBool &&
                                   outlier_columns->numel() == K &&
                                   x_outlier.numel() == x_int8.numel()),
              "outlier_columns must be bool [K], and x_outlier of x_int8's shape");
  check_weight(K, weight, w_scale, bias);
}

at::Tensor float_bias(const std::optional<at::Tensor>& bias) {
  if (!bias) return {};
  const auto dtype = bias->scalar_type();
  if (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf) return bias->contiguous();
  return bias->to(at::kFloat).contiguous();
}

// y = ((x_int8 @ w_int8ᵀ) · x_scale + outliers @ w_int8ᵀ) · w_scale + bias, for rows described in
// `a` up to dtype, with their outliers in `columns`; or, weights only, (x @ w_int8ᵀ) · w_scale + bias.
// Given `floats`, a tile's rows are quantised where they are packed, while they are in the cache.
void multiply_rows(
    const Product& product, Activations a, c10::ArrayRef<int32_t> columns,
    c10::ArrayRef<Weight> weights, const Input* floats = nullptr) {
  a.K_padded = round_up(a.K, K_MULTIPLE);
  a.row_tile = even_tiles(product, a.M);
  a.columns = columns.data();
  a.column_count = columns.size();

  const int64_t tiles = at::divup(a.M, a.row_tile);
  const int64_t packed_rows = a.M < 16 ? a.M : round_up(a.M, 16);
  const int64_t packed_bytes = packed_rows * a.K_padded * product.element_bytes;
  const int64_t outlier_rows = columns.empty() ? 0 : a.M;
  Scratch scratch(
      packed_bytes + Scratch::bytes_for<Outlier>(outlier_rows * a.column_count) +
      Scratch::bytes_for<int32_t>(outlier_rows) + Scratch::bytes_for<bool>(tiles) +
      Scratch::bytes_for<float>(a.M));
  a.packed = scratch.take<char>(packed_bytes);
  a.row_scale = scratch.take<float>(a.M);
  a.outliers = scratch.take<Outlier>(outlier_rows * a.column_count);
  a.outlier_count = scratch.take<int32_t>(outlier_rows);
  a.dense = scratch.take<bool>(tiles);

  const Kernel& kernel = kernel_for(a.M);
  const int64_t grain = at::divup(FORK_BYTES / (floats ? 4 : 1), a.row_tile * a.K_padded);
  at::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t m = tile * a.row_tile;
      if (floats) kernel.quantize_rows(*floats, m, std::min(m + a.row_tile, a.M));
      pack(product, a, tile);
    }
  });
  multiply_all(product, a, weights);
}

void run(
    const at::Tensor& x_int8_any, const at::Tensor& x_scale_any, const at::Tensor& x_outlier_any,
    const std::optional<at::Tensor>& outlier_columns, c10::ArrayRef<Weight> weights) {
  const auto x_int8 = contiguous(x_int8_any), x_scale = contiguous(x_scale_any),
             x_outlier = contiguous(x_outlier_any);
  Activations a{};
  a.M = x_scale->numel();
  a.K = x_int8->size(-1);
  a.x_int8 = x_int8->const_data_ptr<int8_t>();
  a.x_scale = x_scale->const_data_ptr<float>();
  a.x_outlier = x_outlier->const_data_ptr();
  a.dtype = x_outlier->scalar_type();
  std::vector<int32_t> columns;
  if (outlier_columns) {
    const auto flags = contiguous(*outlier_columns);
    columns = flagged(flags->const_data_ptr<bool>(), a.K);
  }
  if (a.M > 0) multiply_rows(kernel_for(a.M).int8, a, columns, weights);
}

// The columns of x that hold an outlier. Threads share the rows, which they read from end to end.
std::vector<int32_t> find_outlier_columns(const Kernel& kernel, const Input& in) {
  const int64_t width = round_up(in.K, BLOCK_N);
  std::vector<int32_t> flags(width);
  std::mutex mutex;
  at::parallel_for(0, in.M, at::divup(FORK_BYTES, in.K), [&](int64_t m0, int64_t m1) {
    if (m1 - m0 == in.M) return kernel.flag_columns(in, m0, m1, flags.data());
    std::vector<int32_t> found(width);
    kernel.flag_columns(in, m0, m1, found.data());
    const std::lock_guard<std::mutex> lock(mutex);
    for (int64_t k = 0; k < width; ++k) flags[k] |= found[k];
  });
  std::vector<int32_t> columns;
  for (int64_t k = 0; k < in.K; ++k)
    if (flags[k]) columns.push_back(k);
  return columns;
}

void quantize_and_run(
    const at::Tensor& x, float threshold, bool column, c10::ArrayRef<Weight> weights) {
  Input in{};
  in.K = x.size(-1);
  in.M = x.numel() / std::max<int64_t>(in.K, 1);
  in.x = x.const_data_ptr();
  in.dtype = x.scalar_type();
  in.threshold = threshold;
  if (in.M == 0) return;
  const Kernel& kernel = kernel_for(in.M);
  std::vector<int32_t> columns;
  if (threshold > 0) columns = find_outlier_columns(kernel, in);

  Scratch scratch(Scratch::bytes_for<int8_t>(in.M * in.K) + Scratch::bytes_for<float>(in.M));
  in.x_int8 = scratch.take<int8_t>(in.M * in.K);
  in.x_scale = scratch.take<float>(in.M);
  std::vector<int32_t> keep;
  if (columns.empty()) {
    in.threshold = 0;
  } else if (column) {
    keep.assign(round_up(in.K, BLOCK_N), -1);
    for (const int32_t k : columns) keep[k] = 0;
    in.keep = keep.data();
  }
  Activations a{};
  a.M = in.M;
  a.K = in.K;
  a.x_int8 = in.x_int8;
  a.x_scale = in.x_scale;
  a.x_outlier = in.x;
  a.threshold = column ? 0 : threshold;  // a column is taken out whole
  a.dtype = in.dtype;
  multiply_rows(kernel.int8, a, columns, weights, &in);
}

void run_weight_only(const at::Tensor& x, c10::ArrayRef<Weight> weights) {
  Activations a{};
  a.K = x.size(-1);
  a.M = x.numel() / std::max<int64_t>(a.K, 1);
  a.x_outlier = x.const_data_ptr();
  a.dtype = x.scalar_type();
  if (a.M > 0) multiply_rows(kernel_for(a.M).weight_only(a), a, {}, weights);
}

at::Tensor empty_output(const at::Tensor& x_int8, int64_t N, at::ScalarType dtype) {
  at::DimVector sizes(x_int8.sizes());
  sizes.back() = N;
  return at::Tensor(at::detail::empty_cpu(sizes, dtype));
}

Weight describe(
    const at::Tensor& packed, const at::Tensor& w_scale, const at::Tensor& bias, at::Tensor& y) {
  Weight weight{};
  weight.N = w_scale.numel();
  weight.packed = packed.const_data_ptr<int8_t>();
  weight.w_scale = w_scale.const_data_ptr<float>();
  if (bias.defined()) {
    weight.bias = bias.const_data_ptr();
    weight.bias_dtype = bias.scalar_type();
  }
  weight.y = y.data_ptr();
  return weight;
}

at::Tensor int8_linear(
    const at::Tensor& x_int8, const at::Tensor& x_scale, const at::Tensor& x_outlier,
    const std::optional<at::Tensor>& outlier_columns, const at::Tensor& weight,
    const at::Tensor& w_scale, const std::optional<at::Tensor>& bias) {
  check(x_int8, x_scale, x_outlier, outlier_columns, weight, w_scale, bias);
  const auto scale = contiguous(w_scale);
  const at::Tensor bias_floats = float_bias(bias);
  at::Tensor y = empty_output(x_int8, w_scale.numel(), x_outlier.scalar_type());
  run(x_int8, x_scale, x_outlier, outlier_columns, {describe(weight, *scale, bias_floats, y)});
  return y;
}

// quantize() and int8_linear() of every weight, in one call.
std::vector<at::Tensor> quantized_linears(
    const at::Tensor& x_any, double threshold, c10::string_view decomposition,
    at::TensorList packed, at::TensorList w_scales, at::TensorList biases) {
  TORCH_CHECK(packed.size() == w_scales.size() && (biases.empty() || packed.size() == biases.size()),
              "weights and w_scales must be as many, and biases as many or none");
  const auto x = contiguous(x_any);
  check_activation(*x);
  std::vector<at::Tensor> kept, outputs;
  std::vector<Weight> weights;
  for (size_t i = 0; i < packed.size(); ++i) {
    const std::optional<at::Tensor> bias =
        biases.empty() ? std::nullopt : std::optional<at::Tensor>(biases[i]);
    check_weight(x->size(-1), packed[i], w_scales[i], bias);
    kept.push_back(w_scales[i].contiguous());
    kept.push_back(float_bias(bias));
    outputs.push_back(empty_output(*x, w_scales[i].numel(), x->scalar_type()));
    weights.push_back(describe(packed[i], kept[2 * i], kept[2 * i + 1], outputs.back()));
  }
  if (decomposition == "all") {
    run_weight_only(*x, weights);
  } else {
    quantize_and_run(*x, static_cast<float>(threshold), decomposition == "column", weights);
  }
  return outputs;
}

at::Tensor quantized_linear(
    const at::Tensor& x, double threshold, c10::string_view decomposition, const at::Tensor& packed,
    const at::Tensor& w_scale, const std::optional<at::Tensor>& bias) {
  const at::TensorList biases = bias.has_value() ? at::TensorList(*bias) : at::TensorList();
  return quantized_linears(x, threshold, decomposition, packed, w_scale, biases)[0];
}

#include "attention_operator.h"

TORCH_LIBRARY_FRAGMENT(int8fx, m) {
  m.def("snapshot(Tensor[] tensors) -> Tensor", snapshot);
  m.def("joined(Tensor[] snapshots) -> Tensor", joined);
  m.def("unchanged(Tensor[] tensors, Tensor snapshot, int first, int sets) -> bool", unchanged);
}

TORCH_LIBRARY_IMPL(int8fx, CPU, m) {
  m.impl("int8_linear", int8_linear);
  m.impl("attention", attention);
  m.impl("quantized_linears_cpu", quantized_linears);
  m.impl("quantized_linear_cpu", quantized_linear);
}

}  // namespace
}  // namespace int8fx

#define INT8FX_EXPORT extern "C" __attribute__((visibility("default")))

INT8FX_EXPORT const char* int8fx_isas() {
  static const std::string names = [] {
    std::string all;
    for (const int8fx::Kernel* kernel : int8fx::usable_kernels()) all += kernel->name + " "s;
    return all;
  }();
  return names.c_str();
}

// Use one kernel for every M, or with "auto" the best. False when this machine has no such kernel.
INT8FX_EXPORT bool int8fx_use_isa(const char* name) {
  const int8fx::Kernel* chosen = nullptr;
  for (const int8fx::Kernel* kernel : int8fx::usable_kernels())
    if (std::strcmp(kernel->name, name) == 0) chosen = kernel;
  if (!chosen && std::strcmp(name, "auto") != 0) return false;
  int8fx::forced_kernel = chosen;
  return true;
}

// Whoever asks for the data of a storage gets an error with this message; with none, the data again.
INT8FX_EXPORT void int8fx_forbid_data_access(c10::StorageImpl* storage, const char* message) {
  if (message)
    storage->release_data_and_set_meta_custom_data_ptr_error_msg_(std::string(message));
  else
    int8fx::allow_data_access(storage);
}
