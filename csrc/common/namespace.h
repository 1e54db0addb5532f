// The dispatcher namespace and key that a library registers under. The emulated library compiles
// the CUDA sources for CPU tensors under a namespace of its own, so that both can live in one
// process.
#pragma once

#if defined(TOKCORE_EMULATED)
#define TOKCORE_NAMESPACE tokcore_emulated
#define TOKCORE_DEVICE_KEY CPU
#else
#define TOKCORE_NAMESPACE tokcore
#define TOKCORE_DEVICE_KEY CUDA
#endif
