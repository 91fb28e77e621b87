// Registers edgelora's operators on a session's options.
#pragma once

struct OrtApi;
struct OrtSessionOptions;
struct OrtStatus;

namespace edgelora {

// What the operators of one registration share.
struct OpsOptions {
  bool exact = false;  // accuracy="float": float32 activations, no int8 rounding
};

// Adds the custom-op domain "edgelora" to `options`. The domain lives as long as the process (one for each OrtApi and options).
// Returns null on success, else a status owned by the caller. Thread-safe.
OrtStatus* register_ops(const OrtApi* api, OrtSessionOptions* options, const OpsOptions& ops);

}  // namespace edgelora
