// Sizes of tiles, and the types that kernels are made for.
#pragma once

namespace glora {

constexpr int kTileRows = 4;        // rows a thread assembles, so that an `up` that was read serves that often
constexpr int kThreads = 128;       // of a block
constexpr int kVectorBytes = 16;    // of one access to memory

// Weight type, compute type. In fp64 there is the host's arithmetic alone: on a GPU the torch backend serves it.
#define GLORA_FOR_GPU_TYPES(DO) DO(float, float) DO(c10::Half, float) DO(c10::BFloat16, float)
#define GLORA_FOR_TYPES(DO) GLORA_FOR_GPU_TYPES(DO) DO(double, double)

}  // namespace glora
