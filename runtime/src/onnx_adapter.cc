#include "src/onnx_adapter.h"

#include <utility>

#include "src/error.h"
#include "src/onnx_adapter_file.h"

namespace edgelora {
namespace {

OrtHandle<OrtLoraAdapter> create_adapter(const OnnxRuntime& ort, const std::string& path,
                                         const Targets& targets) {
  check_onnx_adapter_file(path, targets);
  OrtLoraAdapter* adapter = nullptr;
  try {
    ort.check(ort.api().CreateLoraAdapter(path.c_str(), nullptr, &adapter));
  } catch (const Error& error) {
    if (error.status() == EDGELORA_OUT_OF_MEMORY) throw;
    throw Error(EDGELORA_BAD_FILE, path + ": " + error.what() + "; export the bundle again");
  }
  return {adapter, ort.api().ReleaseLoraAdapter};
}

}  // namespace

OnnxAdapter::OnnxAdapter(const OnnxRuntime& ort, const std::string& path,
                         const std::string& base_fingerprint, const Targets& targets,
                         std::vector<int32_t> invocation)
    : base_fingerprint_(base_fingerprint),
      invocation_(std::move(invocation)),
      api_(&ort.api()),
      adapter_(create_adapter(ort, path, targets)) {}

}  // namespace edgelora
