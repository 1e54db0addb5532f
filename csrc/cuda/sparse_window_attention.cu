// Sparse window attention by tiles in shared memory. A block takes a tile of queries, or for the
// gradients of keys one of keys, and walks the tiles of the other side that it sees: listed tokens
// first, then the window. All threads find the products of a pair of tiles; then each warp has rows
// of its own, a lane for each column, and sums them up in registers. Which columns a row sees is
// one ballot: where it is not all of them, the others are skipped, so that NaN there is harmless.
#include <torch/csrc/stable/library.h>

#include "common/namespace.h"
#include "common/sparse_window_attention_call.h"
#include "cuda/launch.h"
#include "cuda/primitives/dispatch.h"
#include "cuda/primitives/tiles.cuh"

namespace tokcore {
namespace {

// ---- pairs ------------------------------------------------------------------------------------

// Where there is no query: before every key.
constexpr int64_t kNoQuery = -1;

// Whether the query at one position sees the key at another, within its window or beyond it.
__device__ __forceinline__ bool sees(const WindowTensors& p, int64_t query, int64_t key,
                                     bool beyond) {
  const bool before = key <= query - p.window;
  return beyond ? before : key <= query && !before;
}

// Of a (b, KV head): its list, and how many of it there are, -1 if it is none.
struct List {
  const int32_t* tokens;
  int64_t count;

  __device__ __forceinline__ List(const WindowTensors& p, int64_t b, int64_t h)
      : tokens(p.index + p.list(b, h) * p.listed),
        count(p.index == nullptr ? 0 : p.counts[p.list(b, h)]) {}
  // How many lie before a position.
  __device__ __forceinline__ int64_t before(int64_t position) const {
    int64_t begin = 0, end = count;
    while (begin < end) {
      const int64_t middle = (begin + end) / 2;
      if (tokens[middle] < position)
        begin = middle + 1;
      else
        end = middle;
    }
    return begin;
  }
};

// Position of the i-th key of a tile: of listed tokens from `first` on, or of all; S: there is
// none.
__device__ __forceinline__ int64_t key_at(const WindowTensors& p, const List& list, bool beyond,
                                          int64_t first, int i) {
  const int64_t at = first + i;
  if (beyond) return at < list.count ? int64_t(list.tokens[at]) : p.keys;
  return at < p.keys ? at : p.keys;
}

// ---- lists ------------------------------------------------------------------------------------

// counts: a warp for each list.
__global__ void __launch_bounds__(kWarpThreads) window_lists_kernel(WindowTensors p) {
  for (int64_t list = blockIdx.x; list < p.batch * p.list_heads; list += gridDim.x) {
    const int32_t* const tokens = p.index + list * p.listed;
    int count = 0;
    bool good = true;
    for (int64_t m = lane_of_thread(); m < p.listed; m += kWarpThreads) {
      const int32_t token = tokens[m], previous = m == 0 ? -2 : tokens[m - 1];
      good = good && token >= -1 && token < p.keys &&
             (token == -1 || previous == -2 || (previous >= 0 && previous < token));
      count += token != -1;
    }
    good = __all_sync(kWholeWarp, good);
#pragma unroll
    for (int lanes = kWarpThreads / 2; lanes > 0; lanes /= 2)
      count += __shfl_xor_sync(kWholeWarp, count, lanes);
    if (lane_of_thread() == 0) const_cast<int32_t*>(p.counts)[list] = good ? count : -1;
  }
}

// ---- queries: the output, or their gradients --------------------------------------------------

template <typename Tile, bool kBackward>
__global__ void __launch_bounds__(kTileThreads) window_query_kernel(WindowTensors p) {
  using T = typename Tile::Scalar;
  using acc_t = typename Tile::acc_t;
  constexpr int kTiles = kBackward ? 4 : 3;
  const Shared<acc_t> x = Tile::tile(0), key = Tile::tile(1), value = Tile::tile(2);
  const Shared<acc_t> up = Tile::tile(kTiles - 1);  // of the backward only
  const Shared<acc_t> weight = Tile::pairs(kTiles, 0);
  const Shared<acc_t> slope = Tile::pairs(kTiles, kBackward ? 1 : 0);  // of the backward only
  const int own = warp_of_thread(), dim = int(p.dim);
  const acc_t scale = acc_t(p.scale);
  const int64_t tiles = (p.queries + Tile::kSide - 1) / Tile::kSide;
  for (int64_t unit = blockIdx.x; unit < p.batch * p.heads * tiles; unit += gridDim.x) {
    const int64_t t = unit % tiles * Tile::kSide, b = unit / tiles / p.heads,
                  h = unit / tiles % p.heads, key_head = h / p.group();
    const int64_t end = t + Tile::kSide < p.queries ? t + Tile::kSide : p.queries;
    const List list(p, b, key_head);
    const auto row_of = [&](int i) { return t + i < end ? p.query_row(b, h, t + i) : int64_t(-1); };
    // Read in products alone, and a barrier follows these: none is needed here.
    load_tile<Tile>(p.query, p.dim, scale, row_of, x);
    if (kBackward) load_tile<Tile>(p.grad_output, p.dim, acc_t(1), row_of, up);

    // Forward: the sum of weights times values, the greatest score and the sum of weights.
    // Backward: of weights times slopes times keys, of weights times keys, and lse, delta.
    typename Tile::Sums sums, mean;
    acc_t top[Tile::kRows], total[Tile::kRows];
#pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) {
      const int64_t row = row_of(own + r * kTileWarps);
      top[r] = !kBackward ? -kInfinity<acc_t>
               : row >= 0 ? static_cast<const acc_t*>(p.lse)[row]
                          : acc_t(0);
      total[r] = 0;
    }
    const int64_t last = p.offset() + end - 1;
    const int64_t listed = list.count > 0 ? list.before(last - p.window + 1) : 0;
    const int64_t list_tiles = (listed + Tile::kSide - 1) / Tile::kSide;
    const int64_t oldest = p.offset() + t - p.window + 1;
    const int64_t first_tile = (oldest > 0 ? oldest : 0) / Tile::kSide;
    const int64_t visits = list.count < 0 ? 0 : list_tiles + last / Tile::kSide - first_tile + 1;
    for (int64_t visit = 0; visit < visits; ++visit) {
      const bool beyond = visit < list_tiles;
      const int64_t first = (beyond ? visit : first_tile + visit - list_tiles) * Tile::kSide;
      const auto key_row_of = [&](int j) {
        const int64_t at = key_at(p, list, beyond, first, j);
        return at < p.keys ? p.key_row(b, key_head, at) : int64_t(-1);
      };
      // Everyone has read the tiles of the visit before this one.
      __syncthreads();
      load_tile<Tile>(p.key, p.dim, acc_t(1), key_row_of, key);
      load_tile<Tile>(p.value, p.dim, acc_t(1), key_row_of, value);
      // The tiles are written.
      __syncthreads();
      multiply<Tile>(x, key, dim, weight);
      if (kBackward) multiply<Tile>(up, value, dim, slope);
      // The products are written.
      __syncthreads();
      const int64_t column = lane_of_thread() < Tile::kSide
                                 ? key_at(p, list, beyond, first, lane_of_thread())
                                 : p.keys;
      unsigned seen[Tile::kRows];
#pragma unroll
      for (int r = 0; r < Tile::kRows; ++r) {
        const int i = own + r * kTileWarps, pair = i * Tile::kPairStride + lane_of_thread();
        const int64_t position = t + i < end ? p.offset() + t + i : kNoQuery;
        const bool sees_it = sees(p, position, column, beyond);
        seen[r] = __ballot_sync(kWholeWarp, sees_it);
        const acc_t score = sees_it ? acc_t(weight[pair]) : -kInfinity<acc_t>;
        if (kBackward) {
          const acc_t w = sees_it ? exp2_of((score - top[r]) * acc_t(kLog2E)) : acc_t(0);
          const acc_t sloped = sees_it ? w * acc_t(slope[pair]) : acc_t(0);
          total[r] += warp_sum(sloped);
          if (sees_it) {
            weight[pair] = w;
            slope[pair] = sloped;
          }
        } else {
          const acc_t here = warp_max(score), greatest = here > top[r] ? here : top[r];
          const acc_t anchor = greatest == -kInfinity<acc_t> ? acc_t(0) : greatest;
          const acc_t kept = exp2_of((top[r] - anchor) * acc_t(kLog2E));
          const acc_t w = sees_it ? exp2_of((score - anchor) * acc_t(kLog2E)) : acc_t(0);
          // A row that sees nothing here stays as it is, whatever it holds.
          if (seen[r] != 0) {
            total[r] = total[r] * kept;
#pragma unroll
            for (int c = 0; c < Tile::kPer; ++c) sums.of[r][c] *= kept;
          }
          total[r] += warp_sum(w);
          top[r] = greatest;
          if (sees_it) weight[pair] = w;
        }
      }
      // The weights of this warp's rows are written.
      __syncwarp();
      combine<Tile>(seen, kBackward ? slope : weight, kBackward ? key : value, own, sums);
      if (kBackward) combine<Tile>(seen, weight, key, own, mean);
    }
#pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) {
      const int64_t row = row_of(own + r * kTileWarps);
      if (row < 0) continue;
      const acc_t nan_or_1 = list.count < 0 ? kNaN<acc_t> : acc_t(1);
      if (kBackward) {
#pragma unroll
        for (int c = 0; c < Tile::kPer; ++c) sums.of[r][c] -= total[r] * mean.of[r][c];
        store_row<Tile, T>(sums, r, scale * nan_or_1, p.grad_query, row, p.dim);
        if (lane_of_thread() == 0) static_cast<acc_t*>(p.delta)[row] = total[r];
      } else {
        store_row<Tile, T>(sums, r, nan_or_1 / total[r], p.output, row, p.dim);
        if (lane_of_thread() == 0)
          static_cast<acc_t*>(p.lse)[row] = nan_or_1 * (top[r] + std::log(total[r]));
      }
    }
  }
}

// ---- keys: their gradients --------------------------------------------------------------------

// kListed: those of listed tokens from the queries beyond their windows, kept apart. Otherwise
// those of all keys, from the queries in their windows and what was kept.
template <typename Tile, bool kListed>
__global__ void __launch_bounds__(kTileThreads) window_key_kernel(WindowTensors p) {
  using T = typename Tile::Scalar;
  using acc_t = typename Tile::acc_t;
  const Shared<acc_t> x = Tile::tile(0), x_up = Tile::tile(1), y = Tile::tile(2),
                      y_up = Tile::tile(3);
  const Shared<acc_t> weight = Tile::pairs(4, 0), slope = Tile::pairs(4, 1);
  const int own = warp_of_thread(), dim = int(p.dim);
  const int64_t count = kListed ? p.listed : p.keys;
  const int64_t tiles = (count + Tile::kSide - 1) / Tile::kSide;
  for (int64_t unit = blockIdx.x; unit < p.batch * p.key_heads * tiles; unit += gridDim.x) {
    const int64_t first = unit % tiles * Tile::kSide, b = unit / tiles / p.key_heads,
                  h = unit / tiles % p.key_heads;
    const List list(p, b, h);
    const auto key_of = [&](int i) { return key_at(p, list, kListed, first, i); };
    const auto row_of = [&](int i) {
      const int64_t at = key_of(i);
      return at < p.keys ? p.key_row(b, h, at) : int64_t(-1);
    };
    // Read in products alone, and a barrier follows these: none is needed here.
    load_tile<Tile>(p.key, p.dim, acc_t(1), row_of, x);
    load_tile<Tile>(p.value, p.dim, acc_t(1), row_of, x_up);
    typename Tile::Sums grad_key, grad_value;
    if (!kListed && list.count > 0) {
#pragma unroll
      for (int r = 0; r < Tile::kRows; ++r) {
        const int64_t at = key_of(own + r * kTileWarps), m = list.before(at);
        if (m == list.count || list.tokens[m] != at) continue;
        const int64_t row = p.listed_row(b, h, m) * p.dim;
#pragma unroll
        for (int c = 0; c < Tile::kPer; ++c) {
          const int64_t d = lane_of_thread() + c * kWarpThreads;
          if (d >= p.dim) continue;
          grad_key.of[r][c] = static_cast<const acc_t*>(p.listed_grad_key)[row + d];
          grad_value.of[r][c] = static_cast<const acc_t*>(p.listed_grad_value)[row + d];
        }
      }
    }
    // Queries that see any of them: from the first of the first key to the last of the last.
    const int64_t has = list.count < 0 ? 0 : kListed ? list.count : p.keys;
    const int64_t here = has - first < Tile::kSide ? has - first : Tile::kSide;
    const int64_t nearest = here > 0 ? key_of(0) - p.offset() + (kListed ? p.window : 0) : 0;
    const int64_t farthest = here > 0 ? key_of(int(here) - 1) - p.offset() + p.window : 0;
    const int64_t begin = (nearest > 0 ? nearest : 0) / Tile::kSide * Tile::kSide;
    const int64_t end = here <= 0 ? 0 : kListed || farthest > p.queries ? p.queries : farthest;
    for (int64_t g = 0; g < p.group(); ++g)
      for (int64_t t = begin; t < end; t += Tile::kSide) {
        const int64_t head = h * p.group() + g;
        const auto query_row_of = [&](int j) {
          return t + j < p.queries ? p.query_row(b, head, t + j) : int64_t(-1);
        };
        // Everyone has read the tiles of the visit before this one.
        __syncthreads();
        load_tile<Tile>(p.query, p.dim, acc_t(p.scale), query_row_of, y);
        load_tile<Tile>(p.grad_output, p.dim, acc_t(1), query_row_of, y_up);
        // The tiles are written.
        __syncthreads();
        multiply<Tile>(x, y, dim, weight);
        multiply<Tile>(x_up, y_up, dim, slope);
        // The products are written.
        __syncthreads();
        const int64_t column =
            lane_of_thread() < Tile::kSide ? query_row_of(lane_of_thread()) : int64_t(-1);
        const int64_t position = column >= 0 ? p.offset() + t + lane_of_thread() : kNoQuery;
        const acc_t lse = column >= 0 ? static_cast<const acc_t*>(p.lse)[column] : acc_t(0);
        const acc_t delta = column >= 0 ? static_cast<const acc_t*>(p.delta)[column] : acc_t(0);
        unsigned seen[Tile::kRows];
#pragma unroll
        for (int r = 0; r < Tile::kRows; ++r) {
          const int i = own + r * kTileWarps, pair = i * Tile::kPairStride + lane_of_thread();
          const bool is_seen = sees(p, position, key_of(i), kListed);
          seen[r] = __ballot_sync(kWholeWarp, is_seen);
          if (!is_seen) continue;
          const acc_t w = exp2_of((acc_t(weight[pair]) - lse) * acc_t(kLog2E));
          weight[pair] = w;
          slope[pair] = w * (acc_t(slope[pair]) - delta);
        }
        // The weights and slopes of this warp's rows are written.
        __syncwarp();
        combine<Tile>(seen, slope, y, own, grad_key);
        combine<Tile>(seen, weight, y_up, own, grad_value);
      }
#pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) {
      const int i = own + r * kTileWarps;
      if (kListed) {
        if (i >= here) continue;
        const int64_t row = p.listed_row(b, h, first + i);
        store_row<Tile, acc_t>(grad_key, r, acc_t(1), p.listed_grad_key, row, p.dim);
        store_row<Tile, acc_t>(grad_value, r, acc_t(1), p.listed_grad_value, row, p.dim);
      } else if (row_of(i) >= 0) {
        const acc_t nan_or_1 = list.count < 0 ? kNaN<acc_t> : acc_t(1);
        store_row<Tile, T>(grad_key, r, nan_or_1, p.grad_key, row_of(i), p.dim);
        store_row<Tile, T>(grad_value, r, nan_or_1, p.grad_value, row_of(i), p.dim);
      }
    }
  }
}

// ---- host -------------------------------------------------------------------------------------

// f(tiles) with tiles of the element type, wide enough for a row.
template <typename F>
void dispatch_tiles(const WindowCall& call, F f) {
  dispatch_logits(call.type, [&](auto element) {
    using T = decltype(element);
    if (call.tensors.dim <= 64) return f(Tiles<T, 64>());
    if (call.tensors.dim <= 128) return f(Tiles<T, 128>());
    return f(Tiles<T, kMostWindowDim>());
  });
}

template <int side>
unsigned blocks_of(int64_t heads, int64_t rows) {
  return block_count(heads * ((rows + side - 1) / side));
}

// Fills counts, which live as long as the tensor that comes back.
Tensor count_lists(const Tensor& query, const WindowCall& call, WindowTensors& p) {
  Tensor counts = allocate_output(query, call.of_lists(), ScalarType::Int);
  p.counts = static_cast<const int32_t*>(counts.mutable_data_ptr());
  if (p.index != nullptr)
    launch(dim3(block_count(p.batch * p.list_heads)), dim3(kWarpThreads), 0, current_stream(query),
           window_lists_kernel, p);
  return counts;
}

WindowOutputs sparse_window_attention_cuda(const Tensor& query, const Tensor& key,
                                           const Tensor& value, const std::optional<Tensor>& index,
                                           int64_t window, double scale) {
  const WindowCall call =
      checked_window_call("sparse_window_attention", query, key, value, index, window, scale);
  WindowTensors p = call.tensors;
  const DeviceGuard guard(device_index(query));
  Tensor output = allocate_output(query, shape_of(query), call.type);
  Tensor lse = allocate_output(query, call.of_rows(), call.statistics);
  const Tensor counts = count_lists(query, call, p);
  p.output = output.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr();
  dispatch_tiles(call, [&](auto tiles) {
    using Tile = decltype(tiles);
    launch(dim3(blocks_of<Tile::kSide>(p.batch * p.heads, p.queries)), dim3(kTileThreads),
           Tile::bytes(3, 1), current_stream(query), window_query_kernel<Tile, false>, p);
  });
  return {output, lse};
}

WindowGradients sparse_window_attention_backward_cuda(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value,
    const std::optional<Tensor>& index, const Tensor& lse, int64_t window, double scale) {
  const char* op = "sparse_window_attention_backward";
  WindowCall call = checked_window_call(op, query, key, value, index, window, scale);
  check_window_gradient(op, grad_output, lse, call);
  WindowTensors p = call.tensors;
  const DeviceGuard guard(device_index(query));
  Tensor grad_query = allocate_output(query, shape_of(query), call.type);
  Tensor grad_key = allocate_output(key, shape_of(key), call.type);
  Tensor grad_value = allocate_output(value, shape_of(value), call.type);
  Tensor delta = allocate_output(query, call.of_rows(), call.statistics);
  Tensor listed_key = allocate_output(query, call.of_listed(), call.statistics);
  Tensor listed_value = allocate_output(query, call.of_listed(), call.statistics);
  const Tensor counts = count_lists(query, call, p);
  p.grad_query = grad_query.mutable_data_ptr();
  p.grad_key = grad_key.mutable_data_ptr();
  p.grad_value = grad_value.mutable_data_ptr();
  p.delta = delta.mutable_data_ptr();
  p.listed_grad_key = listed_key.mutable_data_ptr();
  p.listed_grad_value = listed_value.mutable_data_ptr();
  dispatch_tiles(call, [&](auto tiles) {
    using Tile = decltype(tiles);
    const auto stream = current_stream(query);
    const int64_t heads = p.batch * p.key_heads;
    launch(dim3(blocks_of<Tile::kSide>(p.batch * p.heads, p.queries)), dim3(kTileThreads),
           Tile::bytes(4, 2), stream, window_query_kernel<Tile, true>, p);
    launch(dim3(blocks_of<Tile::kSide>(heads, p.listed)), dim3(kTileThreads), Tile::bytes(4, 2),
           stream, window_key_kernel<Tile, true>, p);
    launch(dim3(blocks_of<Tile::kSide>(heads, p.keys)), dim3(kTileThreads), Tile::bytes(4, 2),
           stream, window_key_kernel<Tile, false>, p);
  });
  return {grad_query, grad_key, grad_value};
}

}  // namespace
}  // namespace tokcore

STABLE_TORCH_LIBRARY_IMPL(TOKCORE_NAMESPACE, TOKCORE_DEVICE_KEY, m) {
  m.impl("sparse_window_attention", TORCH_BOX(&tokcore::sparse_window_attention_cuda));
  m.impl("sparse_window_attention_backward",
         TORCH_BOX(&tokcore::sparse_window_attention_backward_cuda));
}
