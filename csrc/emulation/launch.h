// launch() of the emulation: the kernel runs to its end before it returns, and throws what went
// wrong in it.
#pragma once

#include <cstddef>
#include <type_traits>

#include "emulation/scheduler.h"

namespace tokcore {

struct Stream {};

template <typename Params>
void launch(dim3 grid, dim3 block, size_t shared_bytes, Stream, void (*kernel)(Params),
            const Params& params, emulation::Site site = emulation::Site::here()) {
  static_assert(std::is_trivially_copyable_v<Params>, "a kernel takes one plain struct");
  struct Closure {
    void (*kernel)(Params);
    const Params& params;
  };
  const Closure closure{kernel, params};
  emulation::run({grid, block, shared_bytes,
                  [](const void* c) {
                    const auto& self = *static_cast<const Closure*>(c);
                    self.kernel(self.params);
                  },
                  &closure, site});
}

}  // namespace tokcore
