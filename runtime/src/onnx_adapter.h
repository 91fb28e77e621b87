// An adapter of flavor ort: one of ONNX Runtime's own .onnx_adapter files, checked and loaded.
#pragma once

#include <string>
#include <vector>

#include "src/adapter_store.h"
#include "src/onnxruntime_library.h"

namespace edgelora {

class OnnxAdapter {
 public:
  // Throws Error unless every parameter is a factor of one of `targets`. The file names no base:
  // base_fingerprint is that of the bundle it is in, invocation what the manifest says.
  OnnxAdapter(const OnnxRuntime& ort, const std::string& path, const std::string& base_fingerprint,
              const Targets& targets, std::vector<int32_t> invocation);

  const std::string& base_fingerprint() const { return base_fingerprint_; }
  const std::vector<int32_t>& invocation() const { return invocation_; }
  const OrtLoraAdapter* get() const { return adapter_.get(); }

  // Two libraries in one process know nothing of each other's adapters.
  bool is_of(const OnnxRuntime& ort) const { return api_ == &ort.api(); }

 private:
  std::string base_fingerprint_;
  std::vector<int32_t> invocation_;
  const OrtApi* api_;
  OrtHandle<OrtLoraAdapter> adapter_;
};

}  // namespace edgelora
