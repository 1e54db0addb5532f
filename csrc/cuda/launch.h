// What a host wrapper needs to run a kernel on torch tensors. The kernel itself takes one plain
// params struct and never sees torch.
//
//   TOKCORE_DEVICE_TYPE       where every tensor argument has to be: CUDA, or CPU in emulation
//   DeviceGuard guard(device_index(tensor));
//                             makes the tensor's device the current one; nothing in emulation
//   allocate_output(like, sizes, dtype)
//                             contiguous and uninitialised on like's device; poisoned in emulation
//   current_stream(tensor)    torch's stream on the tensor's device
//   block_count(rows)         grid.x for one block a row. There may be more rows than blocks in a
//                             grid, so kernels loop: for (row = blockIdx.x; ...; row += gridDim.x)
//   launch(grid, block, shared_bytes, stream, kernel, params)
//                             a function, as <<<>>> breaks inside dispatch macros. An empty grid
//                             launches nothing; what the launch reports is thrown
//
// Element types are torch::headeronly::Half and BFloat16; float(x) and static_cast<scalar_t>(y)
// work on them everywhere.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <limits>

#include "cuda/primitives/device.h"

#if defined(TOKCORE_EMULATED)
#include "emulation/launch.h"
#define TOKCORE_DEVICE_TYPE ::torch::headeronly::DeviceType::CPU
#else
#define TOKCORE_DEVICE_TYPE ::torch::headeronly::DeviceType::CUDA
#endif

namespace tokcore {

// grid.x may be as large as this; y and z stop at 65535.
#ifdef TOKCORE_EMULATED
constexpr int64_t kMaxBlocks = 8;  // so few that tests run what a block does after its first item
#else
constexpr int64_t kMaxBlocks = std::numeric_limits<int32_t>::max();
#endif

inline unsigned block_count(int64_t rows) {
  return static_cast<unsigned>(rows < kMaxBlocks ? rows : kMaxBlocks);
}

#if defined(TOKCORE_EMULATED)

inline int32_t device_index(const torch::stable::Tensor&) { return 0; }

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

inline Stream current_stream(const torch::stable::Tensor&) { return {}; }

#else

using DeviceGuard = torch::stable::accelerator::DeviceGuard;
using Stream = cudaStream_t;

inline int32_t device_index(const torch::stable::Tensor& tensor) {
  return tensor.get_device_index();
}

inline Stream current_stream(const torch::stable::Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index(tensor), &stream));
  return static_cast<Stream>(stream);
}

template <typename Params>
void launch(dim3 grid, dim3 block, size_t shared_bytes, Stream stream, void (*kernel)(Params),
            const Params& params) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  // What every device grants unasked; beyond it a kernel has to opt in.
  constexpr size_t kDefaultSharedBytes = 48 * 1024;
  if (shared_bytes > kDefaultSharedBytes) {
    STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared_bytes)));
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  STD_CUDA_CHECK(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments,
                                  shared_bytes, stream));
}

#endif

inline torch::stable::Tensor allocate_output(const torch::stable::Tensor& like,
                                             torch::headeronly::IntHeaderOnlyArrayRef sizes,
                                             torch::headeronly::ScalarType dtype) {
  torch::stable::Tensor output = torch::stable::new_empty(like, sizes, dtype);
#if defined(TOKCORE_EMULATED)
  // NaN in every floating dtype, -1 in every integer: an element that no thread writes cannot pass
  // for a result.
  if (output.numel() > 0) {
    std::memset(output.mutable_data_ptr(), 0xff,
                static_cast<size_t>(output.numel()) * output.element_size());
  }
#endif
  return output;
}

}  // namespace tokcore
