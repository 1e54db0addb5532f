// New tokens written behind those in use: a warp copies or quantises the token of a head, so that a
// group's least and greatest entry is a matter of shuffles. The lists are a kernel of their own, as
// every token's place comes from what it writes.
#include <torch/csrc/stable/library.h>

#include "common/kv_append_call.h"
#include "common/namespace.h"
#include "cuda/launch.h"
#include "cuda/primitives/block.cuh"
#include "cuda/primitives/dispatch.h"
#include "cuda/primitives/units.cuh"

namespace tokcore {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarpThreads;
// Registers for so many blocks a processor: without a number the compiler aims higher and spills.
constexpr int kBlocks = 4;

// visit(side, head, i), by a whole warp, for each token that has a place.
template <typename Visit>
__device__ __forceinline__ void for_each_token(const KvAppend& p, const Visit& visit) {
  const int64_t heads = p.sizes.batch * p.sizes.heads, units = 2 * heads * p.queries;
  const int64_t step = int64_t(gridDim.x) * kWarps;
  for (int64_t unit = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarpThreads; unit < units;
       unit += step) {
    const int64_t i = unit % p.queries, head = unit / p.queries % heads;
    if (i >= p.valid_tokens[head / p.sizes.heads] || !p.valid(p.sizes.list_of_head(head))) continue;
    visit(p.sides[unit / p.queries / heads], head, i);
  }
}

// Whole units of unit_t: Pack where rows allow it, else an entry each.
template <typename unit_t>
__global__ void __launch_bounds__(kThreads, kBlocks) kv_copy_kernel(KvAppend p) {
  const int64_t units = p.dim * p.entry_bytes / int64_t(sizeof(unit_t));
  for_each_token(p, [&](const Appended& side, int64_t head, int64_t i) {
    unit_t* const to = static_cast<unit_t*>(side.stored) + p.stored_row(head, i) * units;
    const unit_t* const from =
        static_cast<const unit_t*>(side.tokens) + p.token_row(head, i) * units;
    for (int64_t k = threadIdx.x % kWarpThreads; k < units; k += kWarpThreads)
      store_unit(to + k, load_unit(from + k));
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks) kv_quantize_kernel(KvAppend p) {
  const int lane = threadIdx.x % kWarpThreads;
  for_each_token(p, [&](const Appended& side, int64_t head, int64_t i) {
    const int64_t row = p.stored_row(head, i), size = p.dim / side.groups;
    const T* const token = static_cast<const T*>(side.tokens) + p.token_row(head, i) * p.dim;
    uint8_t* const out = static_cast<uint8_t*>(side.stored) + row * p.dim;
    for (int64_t g = 0; g < side.groups; ++g) {
      const int64_t first = g * size;
      float least = float(token[first]), greatest = least;
      bool finite = true;
      for (int64_t d = lane; d < size; d += kWarpThreads) {
        const float x = float(token[first + d]);
        least = x < least ? x : least;
        greatest = x > greatest ? x : greatest;
        finite = finite && x - x == 0;
      }
      for (int lanes = kWarpThreads / 2; lanes > 0; lanes /= 2) {
        const float other_least = __shfl_xor_sync(kWholeWarp, least, lanes);
        const float other_greatest = __shfl_xor_sync(kWholeWarp, greatest, lanes);
        least = other_least < least ? other_least : least;
        greatest = other_greatest > greatest ? other_greatest : greatest;
      }
      const Quantizer quantizer(least, greatest, __all_sync(kWholeWarp, finite) != 0);
      for (int64_t d = lane; d < size; d += kWarpThreads)
        out[first + d] = quantizer.varies() ? quantizer.code(float(token[first + d])) : 0;
      if (lane != 0) continue;
      float* const pair = side.quantization + 2 * (row * side.groups + g);
      pair[0] = quantizer.stored_scale;
      pair[1] = quantizer.stored_offset;
    }
  });
}

__global__ void __launch_bounds__(kThreads) kv_list_kernel(KvAppend p) {
  for (int64_t list = blockIdx.x; list < p.sizes.all_lists(); list += gridDim.x) {
    const int64_t b = list / p.sizes.lists, n = p.count[list];
    const bool valid = p.valid(list);
    const int64_t added = valid ? p.valid_tokens[b] : 0;
    // The count is read, and the last position, which are written now.
    __syncthreads();
    for (int64_t i = threadIdx.x; i < added; i += kThreads) {
      p.position[list * p.sizes.slots + n + i] = int32_t(p.length[b] + i);
      p.last_selected[list * p.sizes.slots + n + i] = -1;
    }
    if (threadIdx.x == 0) p.count[list] = valid ? int32_t(n + added) : -1;
  }
}

bool in_packs(const KvAppend& p) {
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  bool all = p.dim * p.entry_bytes % 16 == 0;
  for (const Appended& side : p.sides) all = all && aligned(side.stored) && aligned(side.tokens);
  return all;
}

void kv_append_cuda(Tensor key, Tensor value, Tensor position, Tensor last_selected, Tensor count,
                    const Tensor& new_key, const Tensor& new_value, const Tensor& length,
                    const Tensor& valid, std::optional<Tensor> key_quantization,
                    std::optional<Tensor> value_quantization) {
  const KvAppendCall call =
      checked_append("kv_append", key, value, position, last_selected, count, new_key, new_value,
                     length, valid, key_quantization, value_quantization);
  const KvAppend& p = call.p;
  const DeviceGuard guard(device_index(key));
  const Stream stream = current_stream(key);
  const int64_t units = 2 * p.sizes.batch * p.sizes.heads * p.queries;
  const auto run = [&](auto kernel) {
    launch(dim3(block_count((units + kWarps - 1) / kWarps)), dim3(kThreads), 0, stream, kernel, p);
  };
  if (call.quantized) {
    dispatch_logits(call.tokens, [&](auto element) { run(kv_quantize_kernel<decltype(element)>); });
  } else if (in_packs(p)) {
    run(kv_copy_kernel<Pack<uint32_t>>);
  } else if (p.entry_bytes == 8) {
    run(kv_copy_kernel<uint64_t>);
  } else if (p.entry_bytes == 4) {
    run(kv_copy_kernel<uint32_t>);
  } else {
    run(kv_copy_kernel<uint16_t>);
  }
  launch(dim3(block_count(p.sizes.all_lists())), dim3(kThreads), 0, stream, kv_list_kernel, p);
}

}  // namespace
}  // namespace tokcore

STABLE_TORCH_LIBRARY_IMPL(TOKCORE_NAMESPACE, TOKCORE_DEVICE_KEY, m) {
  m.impl("kv_append", TORCH_BOX(&tokcore::kv_append_cuda));
}
