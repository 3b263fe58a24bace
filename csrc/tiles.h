// Sizes of tiles, and the types that kernels are made for.
#pragma once

namespace glora {

constexpr int kTileRows = 4;        // rows that a thread assembles: an `up` is read once for all of them
constexpr int kThreads = 128;       // per block
constexpr int kVectorBytes = 16;    // bytes per access to memory

// Weight type, compute type. fp64 is for the host only: on a GPU the torch backend serves it.
#define GLORA_FOR_GPU_TYPES(DO) DO(float, float) DO(c10::Half, float) DO(c10::BFloat16, float)
#define GLORA_FOR_TYPES(DO) GLORA_FOR_GPU_TYPES(DO) DO(double, double)

}  // namespace glora
