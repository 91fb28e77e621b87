// Registers edgelora's operators on a session's options.
#pragma once

#include <cstdint>

#include "kernels/kernels.h"

struct OrtApi;
struct OrtSessionOptions;
struct OrtStatus;

namespace edgelora {

// What the operators of one registration share.
struct OpsOptions {
  bool exact = false;   // accuracy="float": float32 activations, no int8 rounding
  int32_t threads = 0;  // that a call shares its work among; 0: as many as the machine has
  bool spinning = true;  // they wait awhile for the next call before they sleep
  const kernels::KernelTable* kernels = nullptr;  // null: selected_kernels()
};

// The kernels of this process: the best for this machine, or those that EDGELORA_FORCE_ISA names
// (the only reader of it). Throws Error, naming the supported ones, if the forced ISA is unknown or
// not supported here.
const kernels::KernelTable& selected_kernels();

// Adds the custom-op domain "edgelora" to `options`. The domain lives as long as the process (one
// for each OrtApi, options and process: its threads do not outlive a fork). Returns null on
// success, else a status owned by the caller. Thread-safe.
OrtStatus* register_ops(const OrtApi* api, OrtSessionOptions* options, const OpsOptions& ops);

}  // namespace edgelora
